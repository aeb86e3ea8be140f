"""Calls that stream messages: what they take from whom, and when they stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc
import pytest

from raddle.telemetry.channels import make_channel, send_stream
from raddle.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.support import eventually

Request = scheduler_pb2.ReportStatsRequest


class Server:
    """Takes streams of reports; refuses the first ones, each after its first message."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.calls = 0
        self.heard: list[str] = []
        self._server = grpc.aio.server()
        handler = grpc.stream_unary_rpc_method_handler(
            self._report, Request.FromString, scheduler_pb2.ReportStatsResponse.SerializeToString
        )
        self._server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("raddle.v1.Scheduler", {"ReportStats": handler})]
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(None)

    async def _report(self, request_iterator: Any, context: Any) -> Any:
        self.calls += 1
        async for request in request_iterator:
            if self.calls <= self.refusals:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not the leader")
            self.heard.append(request.node)
        return scheduler_pb2.ReportStatsResponse()


@pytest.mark.parametrize("identity", ["", "agent/n0"])
async def test_a_broken_call_takes_no_message_of_the_next_one(identity: str) -> None:
    """What is queued after a call broke goes into the next call, all of it."""
    queue: asyncio.Queue[str] = asyncio.Queue()

    async def messages() -> AsyncIterator[Request]:
        while True:
            yield Request(node=await queue.get())

    async with Server(1) as server, make_channel(server.address, identity=identity) as channel:
        method = scheduler_pb2_grpc.SchedulerStub(channel).ReportStats
        queue.put_nowait("refused")
        with pytest.raises(grpc.aio.AioRpcError, match="not the leader"):
            await send_stream(method, messages())
        for number in range(5):
            queue.put_nowait(str(number))
        sending = asyncio.create_task(send_stream(method, messages()))
        await eventually(lambda: len(server.heard) == 5, "all messages arrive")
        assert server.heard == [str(number) for number in range(5)]
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def test_a_call_ends_with_its_messages() -> None:
    """When there are no more, the server hears it and answers."""

    async def messages() -> AsyncIterator[Request]:
        yield Request(node="n0")

    async with Server(0) as server, make_channel(server.address, identity="agent/n0") as channel:
        method = scheduler_pb2_grpc.SchedulerStub(channel).ReportStats
        assert await send_stream(method, messages()) == scheduler_pb2.ReportStatsResponse()
        assert server.heard == ["n0"]
