"""What a real etcd does too seldom to wait for: scripted streams, calls that get lost on the way.

`Scripted` speaks one of etcd's stream methods, each stream as a test wrote it down. `Relay` hands
calls on to a real etcd byte for byte, and lets the transactions among them meet their `Fate`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import Enum
from typing import Any

import grpc
from google.protobuf.message import Message

from raddle.etcd.v1 import rpc_pb2 as rpc

#: Reads what the client sends (`grpc.aio.EOF` at its end) and writes answers.
Stream = Any
Script = Callable[[Stream], Awaitable[None]]
_STREAMS: dict[str, type[Message]] = {
    "/etcdserverpb.Watch/Watch": rpc.WatchRequest,
    "/etcdserverpb.Lease/LeaseKeepAlive": rpc.LeaseKeepAliveRequest,
}
_TXN = "/etcdserverpb.KV/Txn"


@contextlib.asynccontextmanager
async def serving(handler: grpc.GenericRpcHandler) -> AsyncIterator[str]:
    """The endpoint of a server with this handler."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


class Scripted(grpc.GenericRpcHandler):
    """The first stream goes by the first script and so on; all further ones by the last."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self.opened = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        request = _STREAMS.get(details.method)
        if request is None:
            return None
        return grpc.stream_stream_rpc_method_handler(
            self._run,
            request_deserializer=request.FromString,
            response_serializer=lambda answer: answer.SerializeToString(),
        )

    async def _run(self, _requests: object, stream: Stream) -> None:
        script = self._scripts[min(self.opened, len(self._scripts) - 1)]
        self.opened += 1
        await script(stream)


class Fate(Enum):
    """What becomes of a transaction under way."""

    #: It never reaches etcd; the client is told that the member is unavailable.
    NOT_APPLIED = "not applied"
    #: It is applied, and the client is told the same.
    ANSWER_LOST = "answer lost"
    #: It is kept back: the client hears nothing, and `arrive_late` brings it to etcd.
    HELD = "held"


class Relay(grpc.GenericRpcHandler):
    """Unary calls on their way to one etcd; each transaction takes the next fate, if there is one.

    Used as `async with`, which gives its endpoint.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self.fates: deque[Fate] = deque()
        self.transactions = 0
        self._held: deque[bytes] = deque()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = details.method

        async def handle(request: bytes, context: Any) -> bytes:
            if method != _TXN:
                return await self._forward(method, request)
            self.transactions += 1
            return await self._transaction(request, context)

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _forward(self, method: str, request: bytes) -> bytes:
        # Without (de)serializers the messages are bytes, which the type stubs don't know.
        call: Callable[[bytes], Awaitable[bytes]] = self._channel.unary_unary(method)  # type: ignore[assignment]
        return await call(request)

    async def _transaction(self, request: bytes, context: Any) -> bytes:
        fate = self.fates.popleft() if self.fates else None
        if fate is Fate.HELD:
            self._held.append(request)
            await asyncio.Event().wait()  # until the client gives up
        answer = b"" if fate is Fate.NOT_APPLIED else await self._forward(_TXN, request)
        if fate is not None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"transaction {fate.value}")
        return answer

    async def arrive_late(self) -> rpc.TxnResponse:
        """etcd's answer to the transaction that was kept back longest."""
        return rpc.TxnResponse.FromString(await self._forward(_TXN, self._held.popleft()))

    async def __aenter__(self) -> str:
        self._serving = serving(self)
        return await self._serving.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await self._serving.__aexit__(None, None, None)
        await self._channel.close()
