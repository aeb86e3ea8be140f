"""Which pool member holds which KV block of one job, from the members' own numbered reports.

A block counts only where its owner reported it in its newest incarnation. A gap in an owner's
numbers means that reports were lost: what it said before is forgotten until it reports anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from raddle.model.stats import KvEvent
from raddle.model.types import RankKey

BLOCKS_A_MEMBER_MAX = 4_000_000


class PoolIndex:
    """Blocks by pool member."""

    def __init__(self) -> None:
        self._incarnation: dict[RankKey, str] = {}
        self._next: dict[RankKey, int] = {}
        self._blocks: dict[RankKey, dict[str, None]] = {}

    def apply(self, member: RankKey, incarnation: str, event: KvEvent) -> None:
        """Take one report of a member: STORED, REMOVED or CLEARED."""
        if self._incarnation.get(member) != incarnation:
            self._incarnation[member] = incarnation
            self._blocks[member] = {}
            self._next[member] = event.sequence
        if event.sequence < self._next[member]:
            return
        blocks = self._blocks[member]
        if event.sequence > self._next[member] or event.kind == "CLEARED":
            blocks.clear()
        self._next[member] = event.sequence + 1
        if event.kind == "REMOVED":
            for block in event.block_hashes:
                blocks.pop(block, None)
        else:
            room = BLOCKS_A_MEMBER_MAX - len(blocks)
            blocks.update(dict.fromkeys(event.block_hashes[: max(0, room)]))

    def blocks(self, member: RankKey) -> int:
        """How many blocks the member holds."""
        return len(self._blocks.get(member, ()))

    def prefix_length(self, block_hashes: Sequence[str], members: Collection[RankKey]) -> int:
        """How many of the first blocks are held, without a hole, by these members."""
        tables = [self._blocks[m] for m in members if m in self._blocks]
        for count, block in enumerate(block_hashes):
            if not any(block in table for table in tables):
                return count
        return len(block_hashes)
