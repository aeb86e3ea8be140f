"""The `PoolMember` service: of a cache rank, and of ranks that let others read their own blocks."""

from __future__ import annotations

from typing import Any

from raddle.agent.engine.reference.block_store import Block, BlockStore
from raddle.agent.engine.reference.fences import Context, Standing, refusals_told
from raddle.model.errors import PermanentError, Reason
from raddle.v1 import reference_pb2, reference_pb2_grpc


class OwnBlocksService(reference_pb2_grpc.PoolMemberServicer):
    """Reads of what a prefill or decode rank holds; fenced, but they move no epoch.

    A peer that takes sequences over may know the next epoch before this rank does.
    """

    def __init__(self, standing: Standing, blocks: BlockStore) -> None:
        self._standing = standing
        self._blocks = blocks

    def _require_reader(self, fence: Any) -> None:
        self._standing.require_reader(fence)

    @refusals_told
    async def PutBlocks(self, _request: Any, _context: Context) -> Any:
        raise PermanentError(
            Reason.ENGINE_UNSUPPORTED, "this rank is no pool member: its blocks are its own."
        )

    @refusals_told
    async def GetBlocks(self, request: Any, _context: Context) -> Any:
        self._require_reader(request.fence)
        answer = reference_pb2.GetBlocksResponse()
        for name, block in self._blocks.get(request.block_hashes):
            answer.blocks.add(block_hash=name, payload=block.payload, checksum=block.checksum)
        return answer

    @refusals_told
    async def HasBlocks(self, request: Any, _context: Context) -> Any:
        self._require_reader(request.fence)
        here = [name for name in request.block_hashes if self._blocks.peek(name) is not None]
        return reference_pb2.HasBlocksResponse(block_hashes=here)


class PoolService(OwnBlocksService):
    """Fenced: a writer of an older epoch is refused, so a woken one changes nothing."""

    def _require_reader(self, fence: Any) -> None:
        self._standing.require(fence, newer=True)

    @refusals_told
    async def PutBlocks(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=True)
        blocks = [
            (b.block_hash, Block(b.payload, b.checksum, b.writer_node)) for b in request.blocks
        ]
        whole = [(name, block) for name, block in blocks if block.is_whole]
        idle_s = None
        if request.HasField("evict_idle"):
            idle_s = request.evict_idle.ToNanoseconds() / 1e9
        stored, refused = self._blocks.put(whole, evict_idle_s=idle_s)
        return reference_pb2.PutBlocksResponse(
            blocks_stored=stored,
            blocks_corrupt=len(blocks) - len(whole),
            block_hashes_refused=refused,
        )
