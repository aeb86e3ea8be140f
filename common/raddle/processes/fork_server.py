"""Loads modules once and forks a process for each request: `fork_server.py SOCKET MODULE...`.

A request is a line of JSON on a connection of its own (see `start`); the answers are the process's
number and, when it ends, its exit code. The server ends with its standard input, its children go
on. It runs a single thread and never talks to anybody else: what it forks is as good as new.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raddle.processes.start import read_line

_REQUEST_TIMEOUT_S = 5.0
_READY = b"ready\n"


@contextmanager
def running(modules: tuple[str, ...], log: Path) -> Iterator[str]:
    """A fork server with these modules, until the block ends; gives its socket's path.

    Raises:
        OSError: it did not come up; its log says why.
    """
    # A name of a socket has a hundred characters at most; only our own user gets into the folder.
    with tempfile.TemporaryDirectory(prefix="raddle-") as folder, log.open("ab") as errors:
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
        with server:
            assert server.stdout is not None
            if server.stdout.readline() != _READY:
                raise ChildProcessError(f"the fork server did not come up; see {log}")
            yield path


@dataclass(slots=True)
class _Server:
    listener: socket.socket
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
        connection, _ = self.listener.accept()
        connection.settimeout(_REQUEST_TIMEOUT_S)
        try:
            request = read_line(connection)
        except (OSError, ValueError):
            request = None
        if request is None:
            connection.close()
            return
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

    def _reap(self, handle: int) -> None:
        pid, connection = self.children.pop(handle)
        self.selector.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        _answer(connection, code=os.waitstatus_to_exitcode(status))
        connection.close()


def _answer(connection: socket.socket, **answer: int) -> None:
    with suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b"\n")


def _become(request: dict[str, Any]) -> None:
    """Run the program in this process, which is a fresh child; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(request["folder"])
        _redirect(request["log"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.nice(request["niceness"])
        sys.argv = [request["module"], *request["arguments"]]
        module = importlib.import_module(request["module"])
        Path("/proc/self/comm").write_text(_short(request["module"]))
        module.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001 - the last words of a process
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _short(module: str) -> str:
    """What `ps` and `top` show: `raddle.agent.main` is `raddle-agent`."""
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
    for module in modules:
        importlib.import_module(module)
    # Pages that the collector does not touch stay shared with the children.
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        sys.stdout.buffer.write(_READY)
        sys.stdout.buffer.flush()
        _Server(listener).serve()


if __name__ == "__main__":
    main()
