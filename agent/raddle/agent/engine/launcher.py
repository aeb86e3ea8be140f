"""Who starts ranks, and how their end is seen: one interface, two implementations.

Both write what a rank must know into its folder (`config.json`) and read there where it listens
(`rank.json`). `process.py` starts a process beside the agent and holds its pidfd. `pod.py` starts
nothing: somebody else brings the rank up in a pod of its own, and its end is seen on a socket.

They stay two, since each has what the other cannot have. A pidfd gives exit codes, and SIGKILL for
a rank that hangs, without the rank's help; but a process in another pod has no number here. The
socket needs no number, and gives neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raddle.agent.engine.reference.config import RankAddress, RankConfig

START_TIMEOUT_S = 60.0


class Life(Protocol):
    """One rank that runs, until it is gone."""

    async def wait(self) -> int:
        """Return once it is gone: its exit code, EXIT_CODE_UNKNOWN if nobody can tell."""
        ...

    async def end(self) -> None:
        """Ask it to end; where the launcher can, it is killed if it does not."""
        ...

    def close(self) -> None:
        """Let go; the rank runs on."""
        ...


class EndWatch:
    """Waits for the end that a file descriptor tells by becoming readable, and owns it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if handle < 0:
            self._ended.set()
        else:
            self._loop.add_reader(handle, self._on_end)

    def _on_end(self) -> None:
        self.close()
        self._ended.set()

    @property
    def is_over(self) -> bool:
        return self._ended.is_set()

    def close(self) -> None:
        if self._handle >= 0:
            self._loop.remove_reader(self._handle)
            os.close(self._handle)
            self._handle = -1


@dataclass(frozen=True, slots=True)
class Running:
    """A rank that serves."""

    address: RankAddress
    config: RankConfig
    life: Life


class Launcher(Protocol):
    """Brings ranks up, each in a folder of its own, and finds those of an earlier agent."""

    async def start(
        self, folder: Path, config: RankConfig, wanted: Callable[[], bool]
    ) -> Running | None:
        """Bring a rank up; None when it was not wanted any more before it was up.

        Raises:
            TemporaryError: ENGINE_FAILED when it ended, or did not come up in time.
            OSError: the folder cannot be written.
        """
        ...

    async def adopt(self, folder: Path) -> Running | None:
        """The rank that runs in the folder; the folder of one that ended is removed."""
        ...


def make_folder(folder: Path) -> None:
    """Nobody but the agent's and the ranks' own user gets in."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def remove_folder(folder: Path) -> None:
    """A rank's folder, and that of its job with the last one."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
