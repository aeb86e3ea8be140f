"""The way to the leader: its address from the store, one channel, a stats stream for each node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
import structlog

from raddle.model import keys
from raddle.model.errors import RaddleError
from raddle.model.stats import RankStats
from raddle.store.follow import follow_key
from raddle.store.protocol import Store
from raddle.telemetry.channels import make_channel, send_stream
from raddle.telemetry.tls import TlsFiles
from raddle.v1 import engine_pb2, scheduler_pb2, scheduler_pb2_grpc
from raddle.wire import records as wire
from raddle.wire.codec import to_message

QUEUE_MAX = 20_000
_RETRY_S = 0.2
log = structlog.get_logger()


class LeaderAddress:
    """Follows the `leader` record."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.address = ""
        #: Grows with each change, so that streams know to move.
        self.term = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        while True:
            try:
                async for value in follow_key(self._store, keys.LEADER):
                    if value is not None:
                        self._set(wire.decode(keys.LEADER, value).address)
            except RaddleError as error:
                log.warning("cannot follow the leader's record", why=str(error))
            await asyncio.sleep(_RETRY_S)

    def _set(self, address: str) -> None:
        self.address = address
        self.term += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_change(self) -> None:
        await self._changed.wait()


class Stream(Protocol):
    """A node's way to tell whoever leads; open as long as `run` runs."""

    async def run(self) -> None: ...


class StatsStream:
    """One node's stream of reports to whoever leads."""

    def __init__(
        self,
        node: str,
        leader: LeaderAddress,
        tls: TlsFiles | None,
    ) -> None:
        self._node = node
        self._leader = leader
        self._tls = tls
        #: Called for each leader, which knows nothing of what ranks told the one before, and when
        #: it missed something.
        self.on_connect: list[Callable[[], None]] = []
        self._queue: asyncio.Queue[tuple[str, RankStats]] = asyncio.Queue(QUEUE_MAX)
        #: Reports were dropped: whoever takes the next one needs all of it again.
        self._dropped = False

    def report(self, job_uid: str, stats: RankStats) -> None:
        """Queue a report; when nobody takes them the oldest go."""
        if self._queue.full():
            self._queue.get_nowait()
            self._dropped = True
        self._queue.put_nowait((job_uid, stats))

    async def run(self) -> None:
        while True:
            if not self._leader.address:
                await self._leader.wait_change()
            channel = make_channel(
                self._leader.address, identity=f"agent/{self._node}", tls=self._tls
            )
            moved = asyncio.create_task(self._leader.wait_change())
            sending = asyncio.create_task(self._send(channel))
            try:
                await asyncio.wait({moved, sending}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                moved.cancel()
                sending.cancel()
                await asyncio.gather(moved, sending, return_exceptions=True)
                await channel.close()
            await asyncio.sleep(_RETRY_S)

    async def _send(self, channel: grpc.aio.Channel) -> None:
        stub: Any = scheduler_pb2_grpc.SchedulerStub(channel)
        try:
            self._tell_again()
            await send_stream(stub.ReportStats, self._messages())
        except grpc.aio.AioRpcError as error:
            log.info("stats stream ended", node=self._node, why=error.details())

    def _tell_again(self) -> None:
        self._dropped = False
        for tell_again in self.on_connect:
            tell_again()

    async def _messages(self) -> AsyncIterator[scheduler_pb2.ReportStatsRequest]:
        yield scheduler_pb2.ReportStatsRequest(node=self._node)
        while True:
            job_uid, stats = await self._queue.get()
            if self._dropped:
                self._tell_again()
            request = scheduler_pb2.ReportStatsRequest(node=self._node, job_uid=job_uid)
            request.reports.append(to_message(stats, engine_pb2.WatchStatsResponse))
            yield request
