"""`raddle up` as a child process: where it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from raddle.cli.demo.report import show_result
from raddle.cli.session import EXIT_FAILED, EXIT_OK
from raddle.store.ports import free_port
from tests.cli.program import PROGRAM, Program
from tests.e2e.served import SMALL_MACHINE
from tests.support import eventually


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names the folder, or whose log is in it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit():
                continue
            log = (entry / "fd" / "2").readlink()
            command = (entry / "cmdline").read_bytes()
            if str(folder).encode() in command or log.is_relative_to(folder):
                found.append(int(entry.name))
    return found


@asynccontextmanager
async def up(
    program: Program, folder: Path, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A running `raddle up` of the small machine, killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *("up", "--machine", SMALL_MACHINE, "--port", "0", "--data-dir", str(folder)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=program.variables() | environment,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def told(process: asyncio.subprocess.Process, word: str) -> str:
    """What was said on stderr up to the line with this word."""
    assert process.stderr is not None
    lines: list[str] = []
    while not lines or word not in lines[-1]:
        line = (await asyncio.wait_for(process.stderr.readline(), 60.0)).decode()
        assert line, lines
        lines.append(line)
    return "".join(lines)


async def test_stdout_is_for_data(alone: Program, tmp_path: Path) -> None:
    """Without a built etcd the warning about the one for development goes to stderr alone."""
    only_python = str(Path(sys.executable).parent)
    empty = {"RADDLE_TOOLS": str(tmp_path / "none"), "PATH": only_python}
    async with up(alone, tmp_path / "data", **empty) as process:
        assert "development only" in await told(process, "ready:")
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert await process.stdout.read() == b""
        assert await process.wait() == EXIT_OK


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
async def test_nothing_is_left_when_nobody_listens(
    alone: Program, tmp_path: Path, end: signal.Signals
) -> None:
    """With its output pipes gone `up` still ends its children, and itself with code 0."""
    folder = tmp_path / "data"
    reading, writing = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        *("up", "--machine", SMALL_MACHINE, "--port", "0", "--data-dir", str(folder)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
        env=alone.variables(),
    )
    os.close(writing)
    said = b""
    while b"ready:" not in said:
        more = await asyncio.to_thread(os.read, reading, 4096)
        assert more, said
        said += more
    os.close(reading)
    children = [pid for pid in processes_of(folder) if pid != process.pid]
    assert children
    process.send_signal(end)
    assert await asyncio.wait_for(process.wait(), 60.0) == EXIT_OK
    await eventually(lambda: not processes_of(folder), "no process of the cluster is left")


async def test_a_port_in_use(alone: Program) -> None:
    """`up` on a port that somebody listens on says what to do, and starts nothing."""
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        done = await alone("up", "--port", str(port), "--data-dir", "data")
    assert done.code == EXIT_FAILED
    assert done.err.startswith(f"raddle up: port {port} of this machine is in use")
    assert "--port" in done.err
    assert not (alone.home / "data").exists()


RESULT = {
    "requests_finished": 2,
    "requests_sent": 2,
    "tokens_compared": 9,
    "tokens_different": 0,
    "experts_moved": 1,
    "kv_tokens_restored": 3,
    "kv_tokens_recomputed": 0,
}


@pytest.mark.parametrize(
    ("output", "begins"), [("json", "{"), ("yaml", "requests_finished: 2\n"), ("table", "\n2 of 2")]
)
def test_the_demos_result(output: str, begins: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The demonstration's result is one document in the form that was asked for."""
    show_result(RESULT, output)
    assert capsys.readouterr().out.startswith(begins)
