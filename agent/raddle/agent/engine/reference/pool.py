"""The writing and reading side of the KV pool: calls to members, and where blocks go.

A block goes to its keepers; one that is full passes it on to the next of the block's ranking.
When nobody has room, the keepers make some.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import structlog

from raddle.agent.engine.reference.block_store import Block
from raddle.agent.engine.reference.places import Places
from raddle.model.types import Fence, Member, RankKey
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import RANK, RANK_NAME, TlsFiles
from raddle.v1 import reference_pb2, reference_pb2_grpc, types_pb2
from raddle.wire.codec import to_message

_TIMEOUT_S = 1.0
BLOCKS_A_CALL = 32
NAMES_A_CALL = 1_000
# A block is found at its keepers, or a little further: when its writer's node was among them, or
# members came since.
ROUNDS_BEYOND_REPLICAS = 2
log = structlog.get_logger()


class PoolPeers:
    """Calls to pool members. One that does not answer costs time, never a result."""

    def __init__(self, writer: RankKey, node: str, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._writer = to_message(writer, types_pb2.RankKey)
        self._node = node
        self._channels: dict[str, grpc.aio.Channel] = {}

    def _stub(self, member: Member) -> Any:
        address = member.engine_address
        if address not in self._channels:
            self._channels[address] = make_channel(
                address, identity=RANK, tls=self._tls, server_name=RANK_NAME
            )
        return reference_pb2_grpc.PoolMemberStub(self._channels[address])

    async def put(
        self,
        fence: Fence,
        member: Member,
        blocks: Sequence[tuple[str, Block]],
        evict_idle_s: float | None = None,
    ) -> set[str] | None:
        """Write blocks to a member: names of those that found no room there.

        It makes room of what was not used for `evict_idle_s`; None makes none. Gives None if the
        member does not answer, or what arrives there is broken.
        """
        refused: set[str] = set()
        for start in range(0, len(blocks), BLOCKS_A_CALL):
            request = reference_pb2.PutBlocksRequest(
                fence=to_message(fence, types_pb2.Fence), writer=self._writer
            )
            for name, block in blocks[start : start + BLOCKS_A_CALL]:
                request.blocks.add(
                    block_hash=name,
                    payload=block.payload,
                    checksum=block.checksum,
                    writer_node=block.writer_node or self._node,
                )
            if evict_idle_s is not None:
                request.evict_idle.FromNanoseconds(round(evict_idle_s * 1e9))
            try:
                answer = await self._stub(member).PutBlocks(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.info("blocks were not pooled", why=error.details())
                return None
            if answer.blocks_corrupt:
                log.warning("blocks broke on their way", blocks=answer.blocks_corrupt)
                return None
            refused.update(answer.block_hashes_refused)
        return refused

    async def get(
        self, fence: Fence, member: Member, names: Sequence[str]
    ) -> list[tuple[str, Block]]:
        """Those of the blocks that a member has, whole ones only."""
        found: list[tuple[str, Block]] = []
        for start in range(0, len(names), BLOCKS_A_CALL):
            request = reference_pb2.GetBlocksRequest(
                fence=to_message(fence, types_pb2.Fence),
                block_hashes=names[start : start + BLOCKS_A_CALL],
            )
            try:
                answer = await self._stub(member).GetBlocks(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.info("a pool member did not answer", why=error.details())
                break
            for message in answer.blocks:
                block = Block(message.payload, message.checksum)
                if block.is_whole:
                    found.append((message.block_hash, block))
                else:
                    log.warning("a block is broken", block=message.block_hash, at=member.rank)
        return found

    async def has(self, fence: Fence, member: Member, names: Sequence[str]) -> set[str] | None:
        """Those of the blocks that a member has; None if it does not say."""
        found: set[str] = set()
        for start in range(0, len(names), NAMES_A_CALL):
            request = reference_pb2.HasBlocksRequest(
                fence=to_message(fence, types_pb2.Fence),
                block_hashes=names[start : start + NAMES_A_CALL],
            )
            try:
                answer = await self._stub(member).HasBlocks(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.info("a pool member did not answer", why=error.details())
                return None
            found.update(answer.block_hashes)
        return found

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


class PoolClient:
    """Puts and gets blocks of one rank, wherever the pool's map says that they are."""

    def __init__(
        self,
        writer: RankKey,
        node: str,
        tls: TlsFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = PoolPeers(writer, node, tls)
        self._node = node
        self._places = Places(clock)

    def set_members(self, members: Sequence[Member]) -> None:
        self._places.set_members(members)

    async def put(self, fence: Fence, blocks: Mapping[str, Block]) -> None:
        """Write finished blocks to all their keepers; a failure is told and forgotten."""
        names = list(blocks)
        rankings = dict(zip(names, self._places.rankings(names), strict=True))
        held: dict[str, list[int]] = {name: [] for name in names}
        # Each round finds another member full, or is the last one.
        for _ in self._places.members:
            groups = self._groups(rankings, held, self._places.with_room())
            if not groups:
                break
            await self._put_groups(fence, blocks, groups, held, evict_idle_s=None)
        groups = self._groups(rankings, held, None)
        await self._put_groups(fence, blocks, groups, held, evict_idle_s=0.0)

    def _groups(
        self,
        rankings: Mapping[str, Sequence[int]],
        held: Mapping[str, list[int]],
        usable: Sequence[bool] | None,
    ) -> dict[int, list[str]]:
        """Members with the blocks that they should get, by member."""
        groups: dict[int, list[str]] = {}
        for name, ranking in rankings.items():
            picked = self._places.pick(
                ranking, held=held[name], usable=usable, writer_node=self._node
            )
            for number in picked[len(held[name]) :]:
                groups.setdefault(number, []).append(name)
        return groups

    async def _put_groups(
        self,
        fence: Fence,
        blocks: Mapping[str, Block],
        groups: Mapping[int, list[str]],
        held: Mapping[str, list[int]],
        *,
        evict_idle_s: float | None,
    ) -> None:
        members = self._places.members
        answers = await asyncio.gather(
            *(
                self._peers.put(
                    fence, members[number], [(name, blocks[name]) for name in names], evict_idle_s
                )
                for number, names in groups.items()
            )
        )
        if members is not self._places.members:
            # The members changed meanwhile: their numbers say nothing any more.
            return
        for (number, names), refused in zip(groups.items(), answers, strict=True):
            if refused:
                self._places.is_full(number)
            # One that does not answer counts as having the block: the repair makes up for it.
            for name in names:
                if not refused or name not in refused:
                    held[name].append(number)

    async def get(
        self, fence: Fence, names: Sequence[str], *, everywhere: bool = False
    ) -> dict[str, Block]:
        """Those blocks that pool members hold and whose bytes are whole.

        Members are asked in the order in which they would keep a block; with `everywhere` all of
        them, which finds what a change of members left at a former keeper.
        """
        found: dict[str, Block] = {}
        rounds = len(self._places.members)
        if not everywhere:
            rounds = min(rounds, self._places.replicas + ROUNDS_BEYOND_REPLICAS)
        for number in range(rounds):
            missing = [name for name in names if name not in found]
            if not missing:
                break
            answers = await asyncio.gather(
                *(
                    self._peers.get(fence, member, asked)
                    for member, asked in self._places.by_rank(missing, number)
                )
            )
            found.update(pair for part in answers for pair in part)
        return found

    async def get_from(
        self, fence: Fence, members: Sequence[Member], names: Sequence[str]
    ) -> dict[str, Block]:
        """Those blocks that ranks hold in their own memory; each is asked for what is missing."""
        found: dict[str, Block] = {}
        for member in members:
            missing = [name for name in names if name not in found]
            if not missing:
                break
            found.update(await self._peers.get(fence, member, missing))
        return found

    async def close(self) -> None:
        await self._peers.close()
