"""Ranks as processes: started in a session of their own, found again after the agent's restart.

A process is known by its number and its start time, so that a number used anew is not mistaken
for it. Its death is seen through a pidfd, whoever its parent is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from raddle.agent.engine.launcher import (
    START_TIMEOUT_S,
    EndWatch,
    Running,
    make_folder,
    remove_folder,
)
from raddle.agent.engine.reference.config import (
    CONFIG_FILE,
    RankConfig,
    process_start_ticks,
    read_address,
    read_config,
    write_config,
)
from raddle.model.errors import Reason, TemporaryError
from raddle.model.health import EXIT_CODE_UNKNOWN
from raddle.processes.start import Command, Process, start

STOP_GRACE_S = 2.0
LOG_FILE = "rank.log"
_MODULE = "raddle.agent.engine.reference.rank"
_POLL_S = 0.005
# Ranks yield to the agent: a busy host must not cost the agent its lease.
_NICENESS = 15


class ProcessLauncher:
    """Starts a process a rank."""

    def __init__(self, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self._start_timeout_s = start_timeout_s

    async def start(
        self, folder: Path, config: RankConfig, wanted: Callable[[], bool]
    ) -> Running | None:
        """As `Launcher.start`; an error carries the process's last words."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        process = await asyncio.to_thread(_launch, folder, config)
        life = ProcessWatch(process.pid, process)
        while wanted():
            address = read_address(folder)
            if address is not None and address.pid == process.pid:
                return Running(address, config, life)
            if life.is_over or loop.time() > deadline:
                await life.end()
                words = (folder / LOG_FILE).read_text(errors="replace")[-400:]
                code = await life.wait()
                raise TemporaryError(
                    Reason.ENGINE_FAILED, f"the rank did not come up (code {code}): {words}"
                )
            await asyncio.sleep(_POLL_S)
        await life.end()
        await life.wait()
        return None

    async def adopt(self, folder: Path) -> Running | None:
        address = read_address(folder)
        if address is not None and process_start_ticks(address.pid) == address.start_time_ticks:
            try:
                config = read_config(folder / CONFIG_FILE)
            except (OSError, ValueError):
                return None
            return Running(address, config, ProcessWatch(address.pid))
        remove_folder(folder)
        return None


def _launch(folder: Path, config: RankConfig) -> Process:
    """Start a rank process that outlives us."""
    make_folder(folder)
    write_config(folder / CONFIG_FILE, config)
    environment = os.environ | _environment(config)
    command = Command(_MODULE, (str(folder),), folder / LOG_FILE, environment, _NICENESS)
    return start(command)


def _environment(config: RankConfig) -> dict[str, str]:
    return {
        "RADDLE_JOB_UID": config.job_uid,
        "RADDLE_EPOCH": str(config.epoch),
        "RADDLE_RANK": f"{config.role}/{config.instance}/{config.rank}",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


class ProcessWatch(EndWatch):
    """The life of one process, started by us or found."""

    def __init__(self, pid: int, process: Process | None = None) -> None:
        self.pid = pid
        self._process = process
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            handle = -1
        super().__init__(handle)

    async def wait(self) -> int:
        """The exit code if we started it."""
        await self._ended.wait()
        code = self._process.poll() if self._process is not None else None
        return EXIT_CODE_UNKNOWN if code is None else code

    async def end(self) -> None:
        """SIGTERM, then SIGKILL after a grace."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._send(number)
            try:
                await asyncio.wait_for(self._ended.wait(), STOP_GRACE_S)
                return
            except TimeoutError:
                continue

    def _send(self, number: signal.Signals) -> None:
        """Signal this very process: never another one that got its number."""
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)
