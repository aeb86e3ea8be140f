"""Lets an agent that is not root speak to kubelet, whose socket is root's alone.

`python -m raddle.agent.health.relay SOCKET OWN` serves the socket OWN and copies bytes to and from
SOCKET, which it opens anew for each connection: kubelet makes another one when it restarts. As root
without capabilities, in a container of its own, it is all that has such rights.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path

import structlog

_PIECE_BYTES = 1 << 16
log = structlog.get_logger()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
    writer.close()


async def relay(socket: Path, own: Path, stop: asyncio.Event) -> None:
    """Serve until told to stop."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(socket)
        except OSError as error:
            log.warning("kubelet is not there", socket=str(socket), why=str(error))
            writer.close()
            return
        await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))

    server = await asyncio.start_unix_server(connected, own)
    # Nobody but the containers of one pod sees it.
    own.chmod(0o666)  # noqa: ASYNC240 - one call, before anybody is served
    await stop.wait()
    server.close()


async def _main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await relay(Path(sys.argv[1]), Path(sys.argv[2]), stop)


if __name__ == "__main__":
    asyncio.run(_main())
