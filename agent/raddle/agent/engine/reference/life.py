"""The life line between a rank and its agent: a unix socket in the rank's folder.

The rank listens from its first moment to its last one; the agent holds a connection. When the
process is gone, however it ended, the kernel closes the connection, at once and in any namespace.
`stop` on the connection asks the rank to end.

The socket is also the claim on the folder: a folder serves one process and never another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from raddle.agent.engine.reference.config import ADDRESS_FILE
from raddle.model.errors import PermanentError, Reason

LIFE_FILE = "life.sock"
STOP = b"stop"
_READ_BYTES = 64


@contextlib.contextmanager
def _short_name(folder: Path) -> Iterator[Path]:
    """The folder under a short name: an address of a unix socket has 107 bytes at most."""
    handle = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def connect(folder: Path) -> socket.socket | None:
    """A connection to the rank of the folder; None while none has come up.

    Raises:
        ConnectionRefusedError: a rank was there, and is gone.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with _short_name(folder) as short:
            connection.connect(str(short / LIFE_FILE))
    except (FileNotFoundError, BlockingIOError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise
    return connection


class LifeLine:
    """The rank's side. Its sockets are closed by the end of the process and by nothing else."""

    def __init__(self, folder: Path) -> None:
        """Claim the folder.

        Raises:
            PermanentError: ENGINE_FAILED when another process has had it.
        """
        self._listener = _claim(folder)

    def serve(self, on_stop: Callable[[], None]) -> None:
        """Hear agents from now on."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._listener, self._accept, loop, on_stop)

    def _accept(self, loop: asyncio.AbstractEventLoop, on_stop: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            connection = self._listener.accept()[0].detach()
            os.set_blocking(connection, False)
            loop.add_reader(connection, self._hear, loop, connection, on_stop)

    def _hear(
        self, loop: asyncio.AbstractEventLoop, connection: int, on_stop: Callable[[], None]
    ) -> None:
        try:
            data = os.read(connection, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if STOP in data:
            on_stop()
        if not data:
            # The agent is gone, and another one will come.
            loop.remove_reader(connection)
            os.close(connection)


def _claim(folder: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    os.fchmod(listener.fileno(), 0o600)
    try:
        with _short_name(folder) as short:
            _listen(listener, short)
    except OSError as error:
        listener.close()
        message = f"{folder} cannot be used: {error.strerror}."
        if error.errno in (errno.EEXIST, errno.EADDRINUSE):
            message = (
                f"{folder} holds the files of a rank that ran before: a rank is never started in"
                " the place of another one; start it in a folder of its own."
            )
        raise PermanentError(Reason.ENGINE_FAILED, message) from error
    return listener


def _listen(listener: socket.socket, folder: Path) -> None:
    """The socket has its name only once it listens: who is refused knows that the rank ended."""
    if (folder / ADDRESS_FILE).exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    new = folder / f"{LIFE_FILE}.new"
    listener.bind(str(new))
    try:
        listener.listen()
        os.link(new, folder / LIFE_FILE)
    finally:
        new.unlink()
