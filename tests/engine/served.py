"""Reference services on a loopback port for the length of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from raddle.agent.engine.reference.block_store import BlockStore
from raddle.agent.engine.reference.fences import Standing
from raddle.agent.engine.reference.pool_service import PoolService
from raddle.model.kinds import RoleKind
from raddle.model.types import Fence, Member
from raddle.telemetry.channels import OPTIONS
from raddle.v1 import reference_pb2_grpc
from tests.engine.small import EPOCH, JOB, make_member

FENCE = Fence(job_uid=JOB, epoch=EPOCH)


@asynccontextmanager
async def serving(add: Callable[[grpc.aio.Server], None]) -> AsyncIterator[str]:
    """The address of a server with the services that `add` gives it."""
    server = grpc.aio.server(options=OPTIONS)
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def ignore(_kind: str, _names: tuple[str, ...]) -> None:
    """A listener of a block store who does not care."""


class Cache:
    """A pool member: where it stands, its blocks, and how to reach it."""

    def __init__(self, bytes_max: int) -> None:
        self.standing = Standing(JOB, EPOCH)
        self.blocks = BlockStore(bytes_max, ignore)
        self.member: Member

    def add_to(self, server: grpc.aio.Server) -> None:
        service: Any = PoolService(self.standing, self.blocks)
        reference_pb2_grpc.add_PoolMemberServicer_to_server(service, server)


@asynccontextmanager
async def cache(
    rank: int = 0, *, node: str = "n1", bytes_max: int = 1 << 20
) -> AsyncIterator[Cache]:
    """A running pool member of the job, at the epoch of FENCE."""
    made = Cache(bytes_max)
    async with serving(made.add_to) as address:
        made.member = make_member(rank, kind=RoleKind.CACHE, node=node, engine=address)
        yield made
