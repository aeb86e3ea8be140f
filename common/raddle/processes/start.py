"""How one of our programs is started as a process of its own.

A Python program spends most of a second loading its modules. Where many start on one machine (a
laptop's cluster, tests), a fork server has loaded them once: `RADDLE_FORK_SERVER` names its socket,
and everything that is started here, and by what is started, is forked from it. Elsewhere each
process starts anew. The programs do not notice; `ps` shows the server's command line for all (their
own names are in `ps -o comm`), and limits, umask and what libraries read while they are loaded are
the server's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

SERVER_VARIABLE = "RADDLE_FORK_SERVER"
_ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Command:
    """A program that is to run in a session of its own, with all output in its log."""

    #: The module whose `main` it is.
    module: str
    arguments: tuple[str, ...]
    log: Path
    #: All of its environment.
    environment: dict[str, str]
    #: How much it yields to others; 0 is as we do.
    niceness: int = 0


class Process(Protocol):
    """What `subprocess.Popen` offers, as far as it is used."""

    pid: int

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it; None while it runs."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it ended; raises `subprocess.TimeoutExpired`."""
        ...

    def send_signal(self, number: signal.Signals) -> None:
        """Does nothing once it ended."""
        ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


def start(command: Command) -> Process:
    """Start a process that outlives us; blocks for as long as that takes.

    Raises:
        OSError: its log cannot be opened, or no process can be started.
    """
    # Told to the caller, not to the fork server's log.
    command.log.open("ab").close()
    server = command.environment.get(SERVER_VARIABLE)
    connection = _connect(server) if server else None
    return _start_anew(command) if connection is None else _fork(command, connection)


def _start_anew(command: Command) -> Process:
    nice = ["nice", "-n", str(command.niceness)] if command.niceness else []
    with command.log.open("ab") as output:
        return subprocess.Popen(
            [*nice, sys.executable, "-m", command.module, *command.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=command.environment,
        )


def _connect(server: str) -> socket.socket | None:
    """None if nobody serves there (any more): its cluster has ended."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_TIMEOUT_S)
    try:
        connection.connect(server)
    except OSError:
        connection.close()
        return None
    return connection


def _fork(command: Command, connection: socket.socket) -> ForkedProcess:
    """From here on only the server may start it: whether it did is not known without an answer."""
    request = {
        "module": command.module,
        "arguments": command.arguments,
        "log": str(command.log.absolute()),
        "environment": command.environment,
        "niceness": command.niceness,
        "folder": str(Path.cwd()),
    }
    with connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        answers = connection.makefile("rb")
    with contextlib.ExitStack() as unless_started:
        unless_started.callback(answers.close)
        answer = _read_answer(answers) or {"error": "it ended"}
        if "error" in answer:
            raise ChildProcessError(f"no {command.module} was forked: {answer['error']}")
        process = ForkedProcess(answers, int(answer["pid"]))
        unless_started.pop_all()
    return process


def _read_answer(answers: BinaryIO) -> dict[str, Any] | None:
    """The next of a server's answers; None at the end."""
    line = answers.readline()
    if not line:
        return None
    found: dict[str, Any] = json.loads(line)
    return found


class ForkedProcess:
    """A child of the fork server; dropping this leaves the process alone."""

    def __init__(self, answers: BinaryIO, pid: int) -> None:
        self.pid = pid
        self._answers = answers
        self._code: int | None = None
        weakref.finalize(self, answers.close)
        try:
            self._handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = -1
            self._code = self._read_code()
        else:
            weakref.finalize(self, os.close, self._handle)

    def poll(self) -> int | None:
        return self._code if self._ended(0.0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        assert self._code is not None
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        if not self._ended(0.0):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        if self._code is None:
            ended = select.poll()
            ended.register(self._handle, select.POLLIN)
            if not ended.poll(None if timeout is None else timeout * 1000):
                return False
            self._code = self._read_code()
        return True

    def _read_code(self) -> int:
        """The server has it as the parent; -1 if the server is gone."""
        try:
            answer = _read_answer(self._answers)
        except OSError:
            return -1
        return int(answer["code"]) if answer is not None else -1
