"""How one of our programs is started as a process of its own.

A Python program spends most of a second loading its modules. Where many start on one machine (a
laptop's cluster, tests), a fork server has loaded them once: `RADDLE_FORK_SERVER` names its socket,
and everything that is started here, and by what is started, is forked from it. Elsewhere each
process starts anew. What runs is the same either way.
"""

from __future__ import annotations

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
from typing import Any, Protocol

SERVER_VARIABLE = "RADDLE_FORK_SERVER"
_ANSWER_TIMEOUT_S = 30.0


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
    """Start a process that outlives us.

    Raises:
        OSError: its log cannot be written, or no process can be started.
    """
    # Checked here, so that a full or missing disk is told to the caller.
    command.log.open("ab").close()
    server = command.environment.get(SERVER_VARIABLE)
    if server:
        try:
            return _fork(command, server)
        except (FileNotFoundError, ConnectionError):
            # Its cluster has ended, or it was killed.
            pass
    return _start_anew(command)


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


def _fork(command: Command, server: str) -> ForkedProcess:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        connection.connect(server)
        request = {
            "module": command.module,
            "arguments": command.arguments,
            "log": str(command.log.absolute()),
            "environment": command.environment,
            "niceness": command.niceness,
            "folder": str(Path.cwd()),
        }
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = read_line(connection)
    except BaseException:
        connection.close()
        raise
    if answer is None:
        connection.close()
        raise ConnectionResetError("the fork server ended")
    return ForkedProcess(connection, int(answer["pid"]))


def read_line(connection: socket.socket) -> dict[str, Any] | None:
    """The next object on a connection; None at its end."""
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1 << 20)
        if not part:
            return None
        line += part
    found: dict[str, Any] = json.loads(line)
    return found


class ForkedProcess:
    """A child of the fork server; dropping this leaves the process alone."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._code: int | None = None
        weakref.finalize(self, connection.close)
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
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        if self._code is None:
            if not select.select([self._handle], [], [], timeout)[0]:
                return False
            self._code = self._read_code()
        return True

    def _read_code(self) -> int:
        """The server has it as the parent; -1 if the server is gone."""
        try:
            answer = read_line(self._connection)
        except OSError:
            return -1
        return int(answer["code"]) if answer is not None else -1
