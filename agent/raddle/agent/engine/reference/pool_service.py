"""The `PoolMember` service of a cache rank."""

from __future__ import annotations

from typing import Any

from raddle.agent.engine.reference.fences import Context, Standing, refusals_told
from raddle.agent.engine.reference.pool import Block, BlockStore
from raddle.v1 import reference_pb2, reference_pb2_grpc


class PoolService(reference_pb2_grpc.PoolMemberServicer):
    """Fenced: a writer of an older epoch is refused, so a woken one changes nothing."""

    def __init__(self, standing: Standing, blocks: BlockStore) -> None:
        self._standing = standing
        self._blocks = blocks

    @refusals_told
    async def PutBlocks(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=True)
        blocks = [(b.block_hash, Block(b.payload, b.checksum)) for b in request.blocks]
        whole = [(name, block) for name, block in blocks if block.is_whole]
        return reference_pb2.PutBlocksResponse(
            blocks_stored=self._blocks.put(whole), blocks_corrupt=len(blocks) - len(whole)
        )

    @refusals_told
    async def GetBlocks(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=True)
        answer = reference_pb2.GetBlocksResponse()
        for name, block in self._blocks.get(request.block_hashes):
            answer.blocks.add(block_hash=name, payload=block.payload, checksum=block.checksum)
        return answer

    @refusals_told
    async def HasBlocks(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=True)
        here = [name for name in request.block_hashes if self._blocks.peek(name) is not None]
        return reference_pb2.HasBlocksResponse(block_hashes=here)
