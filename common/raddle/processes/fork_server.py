"""Loads modules once and forks a process for each request: `fork_server.py SOCKET MODULE...`.

A request is a line of JSON on a connection of its own (see `start`); the answers are the process's
number, or why there is none, and its exit code when it ends. The server ends with its standard
input, its children go on. It runs a single thread and never talks to anybody else: what it forks
is as good as new.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_REQUEST_TIMEOUT_S = 2.0
_END_TIMEOUT_S = 5.0
_READY = b"ready\n"


@contextmanager
def running(modules: tuple[str, ...], log: Path) -> Iterator[str]:
    """A fork server with these modules, until the block ends; gives its socket's path.

    Raises:
        ChildProcessError: it did not come up; its log says why.
        OSError: its log or its folder cannot be written.
    """
    with _folder() as folder, log.open("ab") as errors:
        path = str(Path(folder, "forks"))
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, path, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            # Read when a library is loaded: none of our programs gains from threads of numpy's.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        try:
            assert server.stdout is not None
            if server.stdout.readline() != _READY:
                words = log.read_text(errors="replace")[-400:]
                raise ChildProcessError(f"the fork server did not come up: {words}")
            yield path
        finally:
            _end(server)


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of our own user alone, with a short name: a socket's path has a hundred characters at most.

    If we are killed, the server removes it.
    """
    return tempfile.TemporaryDirectory(prefix="raddle-", dir="/tmp", ignore_cleanup_errors=True)


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.close()
    server.stdout.close()
    try:
        server.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@dataclass(slots=True)
class _Server:
    listener: socket.socket
    #: Open files that a child may have; the server needs two for each child.
    files: tuple[int, int]
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    #: pidfd -> (process, the connection that wants its exit code)
    children: dict[int, tuple[int, socket.socket]] = field(default_factory=dict)

    def serve(self) -> None:
        """Until standard input ends."""
        self.selector.register(0, selectors.EVENT_READ)
        self.selector.register(self.listener, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fd == 0:
                    return
                if key.fd == self.listener.fileno():
                    self._accept()
                else:
                    self._reap(key.fd)

    def _accept(self) -> None:
        """One request that fails is told so, and the next one is taken."""
        connection, _ = self.listener.accept()
        try:
            request = _read_request(connection)
            if request is not None and not _is_gone(connection):
                self._fork(request, connection)
                return
        except (OSError, ValueError) as error:
            _answer(connection, error=f"{type(error).__name__}: {error}")
        connection.close()

    def _fork(self, request: dict[str, Any], connection: socket.socket) -> None:
        # A thread would not be there in the child, and what it holds would stay locked.
        assert len(list(Path("/proc/self/task").iterdir())) == 1
        pid = os.fork()
        if pid == 0:
            self._let_go(connection)
            _become(request)
        handle = os.pidfd_open(pid)
        self.children[handle] = (pid, connection)
        self.selector.register(handle, selectors.EVENT_READ)
        _answer(connection, pid=pid)

    def _let_go(self, connection: socket.socket) -> None:
        """Nothing of the server's stays open in a child."""
        self.selector.close()
        for owned in (self.listener, connection, *(c for _, c in self.children.values())):
            owned.detach()
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        resource.setrlimit(resource.RLIMIT_NOFILE, self.files)

    def _reap(self, handle: int) -> None:
        pid, connection = self.children.pop(handle)
        self.selector.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        _answer(connection, code=os.waitstatus_to_exitcode(status))
        connection.close()


def _read_request(connection: socket.socket) -> dict[str, Any] | None:
    """None if it does not come whole and in time."""
    deadline = time.monotonic() + _REQUEST_TIMEOUT_S
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(1 << 20)
        if not part:
            return None
        line += part
    found: dict[str, Any] = json.loads(line)
    return found


def _is_gone(connection: socket.socket) -> bool:
    """Did who asked give up meanwhile? Then nobody would own the process."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def _answer(connection: socket.socket, **answer: int | str) -> None:
    with suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _become(request: dict[str, Any]) -> None:
    """Run the program in this process, which is a fresh child; never returns."""
    code = 1
    try:
        _redirect(request["log"])
        os.setsid()
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.nice(request["niceness"])
        sys.argv = [request["module"], *request["arguments"]]
        module = importlib.import_module(request["module"])
        Path("/proc/self/comm").write_text(_short(request["module"]))
        module.main()
        code = 0
    except SystemExit as end:
        code = _exit_code(end.code)
    except BaseException as error:  # noqa: BLE001 - the last words of a process
        traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    finally:
        _finish(code)


def _exit_code(given: object) -> int:
    """As the interpreter takes it: a text is an error, and is shown."""
    if given is None or isinstance(given, int):
        return int(given or 0)
    sys.stderr.write(f"{given}\n")
    return 1


def _finish(code: int) -> None:
    """What the interpreter does at its end, but for the server's frames below this one."""
    try:
        # As `multiprocessing` ends its children; there is no public way.
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
        atexit._run_exitfuncs()  # noqa: SLF001
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _short(module: str) -> str:
    """What `ps -o comm` shows: `raddle.agent.main` is `raddle-agent`."""
    parts = [part for part in module.split(".") if part != "main"]
    return f"raddle-{parts[-1]}"[:15]


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


def main() -> None:
    """Entry point."""
    path, *modules = sys.argv[1:]
    with redirect_stdout(sys.stderr):
        for module in modules:
            importlib.import_module(module)
    # Pages that the collector does not touch stay shared with the children.
    gc.collect()
    gc.freeze()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(socket.SOMAXCONN)
            os.write(1, _READY)
            _Server(listener, (soft, hard)).serve()
    finally:
        with suppress(OSError):
            Path(path).unlink()
            Path(path).parent.rmdir()


if __name__ == "__main__":
    main()
