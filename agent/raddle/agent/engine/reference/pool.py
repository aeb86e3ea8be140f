"""Both sides of the KV pool: the member that keeps blocks, and the rank that puts and gets them."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grpc
import structlog

from raddle.agent.engine.reference.places import Places
from raddle.model.kv import KvEventKind
from raddle.model.types import Fence, Member, RankKey
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import AGENT_NAME, TlsFiles
from raddle.v1 import reference_pb2, reference_pb2_grpc, types_pb2
from raddle.wire.codec import to_message

_TIMEOUT_S = 1.0
BLOCKS_A_CALL = 32
NAMES_A_CALL = 1_000
# A block is found at its keepers, or a little further: when its writer's node was among them, or
# members came since.
_ROUNDS_BEYOND_REPLICAS = 2
log = structlog.get_logger()


class Block(NamedTuple):
    """A block's bytes and the CRC-32 that the rank made which computed them."""

    payload: bytes
    checksum: int

    @staticmethod
    def of(payload: bytes) -> Block:
        return Block(payload, zlib.crc32(payload))

    @property
    def is_whole(self) -> bool:
        return zlib.crc32(self.payload) == self.checksum


class BlockStore:
    """Blocks in memory, the least recently used ones going first when it is full."""

    def __init__(
        self, bytes_max: int, changed: Callable[[KvEventKind, tuple[str, ...]], None]
    ) -> None:
        self._bytes_max = bytes_max
        self._changed = changed
        self._blocks: OrderedDict[str, Block] = OrderedDict()
        self._bytes = 0
        #: Called with the names of blocks that are new here.
        self.added: Callable[[tuple[str, ...]], None] = lambda _: None

    def put(self, blocks: Sequence[tuple[str, Block]]) -> int:
        """How many were new."""
        new = [(name, block) for name, block in blocks if name not in self._blocks]
        for name, block in new:
            self._blocks[name] = block
            self._bytes += len(block.payload)
        if new:
            self._changed(KvEventKind.STORED, tuple(name for name, _ in new))
        gone = []
        while self._bytes > self._bytes_max and self._blocks:
            name, block = self._blocks.popitem(last=False)
            self._bytes -= len(block.payload)
            gone.append(name)
        if gone:
            self._changed(KvEventKind.REMOVED, tuple(gone))
        self.added(tuple(name for name, _ in new))
        return len(new)

    def get(self, names: Iterable[str]) -> list[tuple[str, Block]]:
        """The blocks that are here; that is a use of them."""
        found = []
        for name in names:
            block = self._blocks.get(name)
            if block is not None:
                self._blocks.move_to_end(name)
                found.append((name, block))
        return found

    def peek(self, name: str) -> Block | None:
        """A block without using it."""
        return self._blocks.get(name)

    def names(self) -> tuple[str, ...]:
        """All blocks, the least recently used first."""
        return tuple(self._blocks)


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
                address, identity=f"agent/{self._node}", tls=self._tls, server_name=AGENT_NAME
            )
        return reference_pb2_grpc.PoolMemberStub(self._channels[address])

    async def put(self, fence: Fence, member: Member, blocks: Sequence[tuple[str, Block]]) -> bool:
        """Write blocks to a member; False if it did not take all of them."""
        for start in range(0, len(blocks), BLOCKS_A_CALL):
            request = reference_pb2.PutBlocksRequest(
                fence=to_message(fence, types_pb2.Fence), writer=self._writer
            )
            for name, block in blocks[start : start + BLOCKS_A_CALL]:
                request.blocks.add(block_hash=name, payload=block.payload, checksum=block.checksum)
            try:
                answer = await self._stub(member).PutBlocks(request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                log.info("blocks were not pooled", why=error.details())
                return False
            if answer.blocks_corrupt:
                log.warning("blocks broke on their way", blocks=answer.blocks_corrupt)
                return False
        return True

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

    async def put(self, fence: Fence, blocks: dict[str, bytes]) -> None:
        """Write finished blocks to all their keepers; a failure is told and forgotten."""
        made = {name: Block.of(payload) for name, payload in blocks.items()}
        groups = self._places.by_keeper(list(made), self._node)
        await asyncio.gather(
            *(
                self._peers.put(fence, member, [(name, made[name]) for name in names])
                for member, names in groups
            )
        )

    async def get(
        self, fence: Fence, names: Sequence[str], *, everywhere: bool = False
    ) -> dict[str, bytes]:
        """Those blocks that pool members hold and whose bytes are whole.

        Members are asked in the order in which they would keep a block; with `everywhere` all of
        them, which finds what a change of members left at a former keeper.
        """
        found: dict[str, bytes] = {}
        rounds = self._places.members_count
        if not everywhere:
            rounds = min(rounds, self._places.replicas + _ROUNDS_BEYOND_REPLICAS)
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
            found.update((name, block.payload) for part in answers for name, block in part)
        return found

    async def close(self) -> None:
        await self._peers.close()
