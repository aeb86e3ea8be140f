"""Both sides of the KV pool: the member that keeps blocks, and the rank that puts and gets them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from raddle.agent.engine.reference.blocks import keeper
from raddle.model.types import Fence, Member, RankKey
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import AGENT_NAME, TlsFiles
from raddle.v1 import reference_pb2, reference_pb2_grpc, types_pb2
from raddle.wire.codec import to_message

_TIMEOUT_S = 1.0
_BLOCKS_A_CALL = 32
log = structlog.get_logger()


class BlockStore:
    """Blocks in memory, the least recently used ones going first when it is full."""

    def __init__(self, bytes_max: int, changed: Callable[[str, tuple[str, ...]], None]) -> None:
        self._bytes_max = bytes_max
        self._changed = changed
        self._blocks: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0

    def put(self, blocks: Sequence[tuple[str, bytes]]) -> int:
        """How many were new."""
        new = [(name, payload) for name, payload in blocks if name not in self._blocks]
        for name, payload in new:
            self._blocks[name] = payload
            self._bytes += len(payload)
        if new:
            self._changed("STORED", tuple(name for name, _ in new))
        gone = []
        while self._bytes > self._bytes_max and self._blocks:
            name, payload = self._blocks.popitem(last=False)
            self._bytes -= len(payload)
            gone.append(name)
        if gone:
            self._changed("REMOVED", tuple(gone))
        return len(new)

    def get(self, names: Sequence[str]) -> list[tuple[str, bytes]]:
        found = []
        for name in names:
            payload = self._blocks.get(name)
            if payload is not None:
                self._blocks.move_to_end(name)
                found.append((name, payload))
        return found

    def names(self) -> tuple[str, ...]:
        """All blocks, for a full report."""
        return tuple(self._blocks)


class PoolClient:
    """Puts and gets blocks of one rank. A pool that does not answer costs time, never a result."""

    def __init__(self, writer: RankKey, node: str, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._writer = to_message(writer, types_pb2.RankKey)
        self._node = node
        self._members: tuple[Member, ...] = ()
        self._channels: dict[str, grpc.aio.Channel] = {}

    def set_members(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)

    def _stub(self, member: Member) -> Any:
        address = member.engine_address
        if address not in self._channels:
            self._channels[address] = make_channel(
                address, identity=f"agent/{self._node}", tls=self._tls, server_name=AGENT_NAME
            )
        return reference_pb2_grpc.PoolMemberStub(self._channels[address])

    def _by_member(self, names: Sequence[str]) -> dict[str, tuple[Member, list[str]]]:
        groups: dict[str, tuple[Member, list[str]]] = {}
        for name in names:
            member = keeper(name, self._members, self._node)
            if member is not None and member.engine_address:
                groups.setdefault(member.engine_address, (member, []))[1].append(name)
        return groups

    async def put(self, fence: Fence, blocks: dict[str, bytes]) -> None:
        """Write finished blocks to their keepers; a failure is told and forgotten."""
        calls = []
        for member, names in self._by_member(list(blocks)).values():
            for start in range(0, len(names), _BLOCKS_A_CALL):
                request = reference_pb2.PutBlocksRequest(
                    fence=to_message(fence, types_pb2.Fence), writer=self._writer
                )
                for name in names[start : start + _BLOCKS_A_CALL]:
                    request.blocks.add(block_hash=name, payload=blocks[name])
                calls.append(self._stub(member).PutBlocks(request, timeout=_TIMEOUT_S))
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, grpc.aio.AioRpcError):
                log.info("blocks were not pooled", why=result.details())

    async def get(self, fence: Fence, names: Sequence[str]) -> dict[str, bytes]:
        """Those blocks that pool members hold.

        Every member is asked for what is still missing: a block's keeper depends on the node of
        the rank that wrote it, which need not be ours.
        """
        found: dict[str, bytes] = {}
        for member in self._members:
            missing = [name for name in names if name not in found]
            for start in range(0, len(missing), _BLOCKS_A_CALL):
                request = reference_pb2.GetBlocksRequest(
                    fence=to_message(fence, types_pb2.Fence),
                    block_hashes=missing[start : start + _BLOCKS_A_CALL],
                )
                try:
                    answer = await self._stub(member).GetBlocks(request, timeout=_TIMEOUT_S)
                except grpc.aio.AioRpcError as error:
                    log.info("a pool member did not answer", why=error.details())
                    break
                found.update({block.block_hash: block.payload for block in answer.blocks})
        return found

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()
