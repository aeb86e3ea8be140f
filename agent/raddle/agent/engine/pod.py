"""Ranks in pods of their own, which somebody else starts and deletes.

The agent writes the folder and waits for the rank to come up in it. A pod's processes have no
number here, so a rank's end is seen on its life line, and it is asked to end there. One that hangs
cannot be killed from here: it is gone when its pod is deleted, and is told as gone no sooner.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
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
    read_address,
    read_config,
    write_config,
)
from raddle.agent.engine.reference.life import STOP, connect
from raddle.model.errors import Reason, TemporaryError
from raddle.model.health import EXIT_CODE_UNKNOWN

_POLL_S = 0.05


class PodLife(EndWatch):
    """A connection to a rank's life line: the rank says nothing there, so what comes is its end."""

    async def wait(self) -> int:
        await self._ended.wait()
        return EXIT_CODE_UNKNOWN

    async def end(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._handle, STOP)


class PodLauncher:
    """Waits for ranks that others bring up."""

    def __init__(self, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self._start_timeout_s = start_timeout_s

    async def start(
        self, folder: Path, config: RankConfig, wanted: Callable[[], bool]
    ) -> Running | None:
        """As `Launcher.start`; what an earlier agent wrote stays, for the rank may have read it."""
        make_folder(folder)
        if not (folder / CONFIG_FILE).exists():
            write_config(folder / CONFIG_FILE, config)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._start_timeout_s
        life: PodLife | None = None
        while wanted():
            try:
                life = life or _connect(folder)
                gone = life is not None and life.is_over
            except ConnectionRefusedError:
                gone = True
            address = read_address(folder)
            if life is not None and address is not None and not gone:
                return Running(address, read_config(folder / CONFIG_FILE), life)
            if gone or loop.time() > deadline:
                story = self._story(life, gone=gone)
                life = await _give_up(folder, life)
                if life is not None:
                    life.close()
                raise TemporaryError(Reason.ENGINE_FAILED, story)
            await asyncio.sleep(_POLL_S)
        life = await _give_up(folder, life)
        if life is not None:
            await life.wait()
            life.close()
        return None

    def _story(self, life: PodLife | None, *, gone: bool) -> str:
        if gone:
            return "the rank's pod ended before the rank served: read the pod's log."
        if life is None:
            return (
                f"no pod of the rank came up within {self._start_timeout_s:g} s: look at the pod's"
                " events, or wait longer with --rank-start-timeout-s."
            )
        return (
            f"the rank's pod is up, and the rank does not serve after {self._start_timeout_s:g} s:"
            " read the pod's log."
        )

    async def adopt(self, folder: Path) -> Running | None:
        """As `Launcher.adopt`; one that is still coming up is left to `start`."""
        try:
            life = _connect(folder)
        except ConnectionRefusedError:
            remove_folder(folder)
            return None
        address = read_address(folder)
        if life is not None and address is not None:
            with contextlib.suppress(OSError, ValueError):
                return Running(address, read_config(folder / CONFIG_FILE), life)
        if life is not None:
            life.close()
        elif _age_s(folder) > self._start_timeout_s:
            # Its pod never came.
            remove_folder(folder)
        return None


def _connect(folder: Path) -> PodLife | None:
    connection = connect(folder)
    return PodLife(connection.detach()) if connection is not None else None


async def _give_up(folder: Path, life: PodLife | None) -> PodLife | None:
    """No rank shall come up here any more; gives the life of one that is up all the same.

    A rank has its life line before it reads its config: once that is gone, a rank that is not
    found here has not read it and never will.
    """
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    if life is None:
        with contextlib.suppress(ConnectionRefusedError):
            life = _connect(folder)
    if life is not None:
        await life.end()
    return life


def _age_s(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0
