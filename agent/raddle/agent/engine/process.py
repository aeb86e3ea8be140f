"""Rank processes: started in a session of their own, found again after the agent's restart.

A process is known by its number and its start time, so that a number used anew is not mistaken
for it. Its death is seen through a pidfd, whoever its parent is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from raddle.agent.engine.reference.config import (
    CONFIG_FILE,
    RankAddress,
    RankConfig,
    process_start_ticks,
    read_address,
    read_config,
    write_config,
)
from raddle.model.errors import Reason, TemporaryError

START_TIMEOUT_S = 60.0
STOP_GRACE_S = 2.0
LOG_FILE = "rank.log"
_MODULE = "raddle.agent.engine.reference.rank"


def launch(
    folder: Path, config: RankConfig, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start a rank process that outlives us."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_config(folder / CONFIG_FILE, config)
    with (folder / LOG_FILE).open("ab") as output:
        return subprocess.Popen(
            # Ranks yield to the agent: a busy host must not cost the agent its lease.
            ["nice", "-n", "15", sys.executable, "-m", _MODULE, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | environment,
        )


async def wait_address(folder: Path, process: subprocess.Popen[bytes]) -> RankAddress:
    """Where the new process listens.

    Raises:
        TemporaryError: ENGINE_FAILED when it ended or did not say so in time; with its last words.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + START_TIMEOUT_S
    while True:
        address = read_address(folder)
        if address is not None and address.pid == process.pid:
            return address
        if process.poll() is not None or loop.time() > deadline:
            with contextlib.suppress(OSError):
                process.kill()
            words = (folder / LOG_FILE).read_text(errors="replace")[-400:]
            raise TemporaryError(
                Reason.ENGINE_FAILED, f"the rank did not come up (code {process.poll()}): {words}"
            )
        await asyncio.sleep(0.005)


def running(folder: Path) -> tuple[RankAddress, RankConfig] | None:
    """The rank of a state folder if its process still runs; a stale folder is removed."""
    address = read_address(folder)
    if address is not None and process_start_ticks(address.pid) == address.start_time_ticks:
        try:
            return address, read_config(folder / CONFIG_FILE)
        except (OSError, ValueError):
            return None
    shutil.rmtree(folder, ignore_errors=True)
    return None


class ProcessWatch:
    """Waits for the end of one process, child or not."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = -1
            self._ended.set()
            return
        self._loop.add_reader(self._fd, self._on_end)

    def _on_end(self) -> None:
        self.close()
        self._ended.set()

    async def ended(self) -> None:
        """Return once the process is gone; its exit code is for whoever calls `wait`."""
        await self._ended.wait()

    async def wait(self) -> int:
        """The exit code if it was our child; else -1."""
        await self._ended.wait()
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)  # noqa: ASYNC222 - it never blocks
        except ChildProcessError:
            return -1
        return os.waitstatus_to_exitcode(status) if pid else -1

    def send(self, number: signal.Signals) -> None:
        """Signal this very process: never another one that got its number."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


async def end(watch: ProcessWatch) -> None:
    """SIGTERM, then SIGKILL after a grace."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        watch.send(number)
        try:
            await asyncio.wait_for(watch.ended(), STOP_GRACE_S)
            return
        except TimeoutError:
            continue
