"""Rank processes: watched and signalled through a pidfd."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from raddle.agent.engine import process
from raddle.agent.engine.process import ProcessWatch

# It says when it listens to nobody.
_STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print('up', flush=True); signal.pause()"
)


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


async def test_a_process_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM first; who does not end by it within the grace gets SIGKILL, and its code is told."""
    monkeypatch.setattr(process, "STOP_GRACE_S", 0.05)
    with start(_STUBBORN) as child:
        assert child.stdout is not None
        await asyncio.to_thread(child.stdout.readline)
        watch = ProcessWatch(child.pid, child)
        code = asyncio.create_task(watch.wait())
        await watch.end()
        assert await code == -signal.SIGKILL


async def test_another_process_of_the_same_number_is_not_signalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A watch whose process is gone signals nobody, whoever has its number by now."""
    with start("") as child:
        watch = ProcessWatch(child.pid, child)
        assert await watch.wait() == 0

        def nobody(*_: object) -> None:
            raise AssertionError("a number is no process")

        monkeypatch.setattr(os, "kill", nobody)
        await watch.end()
