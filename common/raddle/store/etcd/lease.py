"""A lease kept alive by its own task, with a deadline on our clock that ends before the server's.

The deadline counts from when the last answered keepalive was *sent*: the server starts its time
to live later than that. An answer with TTL 0 means lost; it is no error on the wire.
"""

from __future__ import annotations

import asyncio
import time

import grpc
import structlog

from raddle.etcd.v1 import rpc_pb2 as rpc
from raddle.store.etcd.connection import Connection, StoreCallError, send

_MARGIN_S = 0.3
log = structlog.get_logger()


class EtcdLease:
    """A lease of `ttl_s` seconds; `wait_lost` returns before the server expires it."""

    def __init__(self, connection: Connection, lease_id: int, ttl_s: float, sent_s: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self._connection = connection
        #: When its owner stops acting, on our monotonic clock; each renewal moves it.
        self.deadline_s = sent_s + ttl_s - _MARGIN_S
        self._lost = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._keep(), name=f"lease {lease_id:x} keepalive"),
            asyncio.create_task(self._watch_deadline(), name=f"lease {lease_id:x} deadline"),
        ]

    @property
    def alive(self) -> bool:
        return not self._lost.is_set() and time.monotonic() < self.deadline_s

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def _watch_deadline(self) -> None:
        while True:
            left = self.deadline_s - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(left)
        self._end("local deadline passed")

    def _end(self, why: str) -> None:
        if not self._lost.is_set():
            log.warning("lease lost", lease=f"{self.lease_id:x}", why=why)
            self._lost.set()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    async def _keep(self) -> None:
        while not self._lost.is_set():
            endpoint = self._connection.endpoint
            stream = self._connection.stream(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                rpc.LeaseKeepAliveRequest,
                rpc.LeaseKeepAliveResponse,
            )
            try:
                await self._keep_on(stream)
            except grpc.aio.AioRpcError as error:
                log.info("lease keepalive moves on", endpoint=endpoint, why=error.code().name)
            finally:
                stream.cancel()
            self._connection.failed(endpoint)
            await asyncio.sleep(0.05)

    async def _keep_on(self, stream: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        """Renew on one stream until an answer is late, the stream ends, or the lease is lost."""
        patience_s = max(0.5, self.ttl_s / 6)
        while True:
            sent = time.monotonic()
            if not await send(stream, rpc.LeaseKeepAliveRequest(id=self.lease_id)):
                return
            reading = asyncio.ensure_future(stream.read())
            done, _ = await asyncio.wait({reading}, timeout=patience_s)
            if not done:
                reading.cancel()
                return
            answer: rpc.LeaseKeepAliveResponse | object = reading.result()
            if not isinstance(answer, rpc.LeaseKeepAliveResponse):
                return
            if answer.ttl <= 0:
                self._end("the server does not know it any more")
                return
            self.deadline_s = sent + answer.ttl - _MARGIN_S
            await asyncio.sleep(self.ttl_s / 4)

    async def revoke(self) -> None:
        already_lost = self._lost.is_set()
        self._lost.set()
        for task in self._tasks:
            task.cancel()
        if already_lost:
            return
        try:
            await self._connection.call(
                "/etcdserverpb.Lease/LeaseRevoke",
                rpc.LeaseRevokeRequest(id=self.lease_id),
                rpc.LeaseRevokeResponse,
                1.0,
            )
        except StoreCallError as error:
            log.info("lease is left to expire", lease=f"{self.lease_id:x}", why=error.message)
