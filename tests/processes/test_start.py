"""Programs of ours as processes: what they find is the same, forked or started anew."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raddle.processes import fork_server
from raddle.processes.start import SERVER_VARIABLE, Command, ForkedProcess, Process, start
from tests.support import eventually, stopped

MODULE = "tests.processes.program"


class Started:
    """Starts the test's program and reads what it told."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment | {"RADDLE_TEST": "here"}

    def run(self, action: str, *, niceness: int = 0) -> Process:
        arguments = (str(self.folder / "report"), action)
        log = self.folder / "log"
        return start(Command(MODULE, arguments, log, self.environment, niceness))

    async def report(self) -> dict[str, Any]:
        path = self.folder / "report"
        await eventually(lambda: path.exists() and bool(path.read_text()), "the program told")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with fork_server.running((MODULE,), tmp_path_factory.mktemp("server") / "log") as path:
        yield path


@pytest.fixture(params=["forked", "anew"])
def started(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> Started:
    more = {SERVER_VARIABLE: server} if request.param == "forked" else {}
    return Started(tmp_path, dict(os.environ) | more)


async def test_a_program_finds_what_it_was_given(started: Started) -> None:
    """Arguments, environment, session, niceness and log are its own; no handle of ours is open."""
    process = started.run("7", niceness=5)
    assert process.wait(20.0) == 7
    assert process.poll() == 7
    report = await started.report()
    assert report["pid"] == report["session"] == process.pid
    assert (report["niceness"], report["variable"]) == (5, "here")
    assert report["handles"] == []
    assert (started.folder / "log").read_text() == "a line for the log\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_signal_is_its_exit_code(started: Started, number: signal.Signals) -> None:
    """A process that a signal ends has the code that `subprocess` gives it."""
    process = started.run("wait")
    await started.report()
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert process.wait(20.0) == -number
    process.kill()


async def test_a_mistake_is_told_in_the_log(started: Started) -> None:
    """An error that nobody caught ends with 1 and its traceback."""
    assert started.run("raise").wait(20.0) == 1
    assert "ValueError: a mistake" in (started.folder / "log").read_text()


async def test_a_log_that_cannot_be_written_is_told(started: Started) -> None:
    """The caller gets the error, not the program's exit code."""
    (started.folder / "log").mkdir()
    with pytest.raises(IsADirectoryError):
        started.run("0")


async def test_a_forked_process_outlives_who_asked_and_the_server(tmp_path: Path) -> None:
    """Dropped by its starter, and its server gone: it runs on; the next one starts anew."""
    with fork_server.running((MODULE,), tmp_path / "server.log") as path:
        started = Started(tmp_path, dict(os.environ) | {SERVER_VARIABLE: path})
        process = started.run("wait")
        assert isinstance(process, ForkedProcess)
        report = await started.report()
        assert report["name"] == "raddle-program"
    assert process.poll() is None
    process.kill()
    assert process.wait(20.0) == -1
    (tmp_path / "report").unlink()
    assert isinstance(again := started.run("3"), subprocess.Popen)
    assert again.wait(20.0) == 3


async def test_a_server_without_its_modules_is_told(tmp_path: Path) -> None:
    """A module that cannot be loaded is an error that names the log."""
    log = tmp_path / "server.log"
    with (
        pytest.raises(ChildProcessError, match=r"No module named 'raddle\.nowhere'"),
        fork_server.running(("raddle.nowhere",), log),
    ):
        pass


async def test_a_process_that_has_ended_before_its_start_is_read(started: Started) -> None:
    """Number and exit code arrive together, and both count."""
    processes = [started.run("3") for _ in range(8)]
    assert [process.wait(20.0) for process in processes] == [3] * 8


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def request(server: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(20.0)
    connection.connect(server)
    return connection


async def test_bad_requests_cost_nobody_else_anything(started: Started, server: str) -> None:
    """Half a request, none and one that cannot be read are refused; the next one is served."""
    with request(server) as half, request(server) as garbage:
        half.sendall(b'{"module":')
        garbage.sendall(b"nonsense\n")
        assert b"JSONDecodeError" in garbage.makefile("rb").readline()
        request(server).close()
        assert started.run("5").wait(20.0) == 5
        assert b"timed out" in half.makefile("rb").readline()


async def test_who_gave_up_gets_no_process(tmp_path: Path) -> None:
    """The server was stopped for so long that nobody waits any more: nothing is started."""
    with fork_server.running((MODULE,), tmp_path / "server.log") as path:
        started = Started(tmp_path, dict(os.environ) | {SERVER_VARIABLE: path})
        first = started.run("wait")
        server = parent_of(first.pid)
        await started.report()
        (tmp_path / "report").unlink()
        with stopped(server), request(path) as given_up:
            line = {"module": MODULE, "arguments": [str(tmp_path / "report"), "0"]}
            given_up.sendall(json.dumps(line).encode() + b"\n")
        assert started.run("4").wait(20.0) == 4
        assert (await started.report())["pid"] != 0
        assert children_of(server) == [first.pid]
        first.kill()


async def test_a_process_is_forked_or_not_but_never_twice(tmp_path: Path) -> None:
    """A server that ends after it was asked is an error, not a second start."""
    with fork_server.running((MODULE,), tmp_path / "server.log") as path:
        started = Started(tmp_path, dict(os.environ) | {SERVER_VARIABLE: path})
        first = started.run("wait")
        server = parent_of(first.pid)
        with stopped(server):
            asking = asyncio.create_task(asyncio.to_thread(started.run, "0"))
            queue = Path("/proc/net/unix")
            await eventually(lambda: queue.read_text().count(path) > 2, "the request is queued")
            os.kill(server, signal.SIGKILL)
        with pytest.raises(OSError, match=r"forked|reset"):
            await asking
    first.kill()
