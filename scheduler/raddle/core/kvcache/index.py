"""Which pool member holds which KV block, as far as the members themselves said.

In go the members' numbered events, out comes how long a prefix the pool still has. A block counts
as present only while the process that reported it is the member's newest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from raddle.model.stats import KvEvent
from raddle.model.types import RankKey

#: Blocks kept of one member; the oldest reports beyond it are forgotten.
BLOCKS_A_MEMBER_MAX = 4_000_000
_RETIRED_MAX = 16


@dataclass(slots=True)
class _Owner:
    incarnation: str
    #: Number of the event that comes next; None before the first.
    expected: int | None = None
    blocks: dict[str, None] = field(default_factory=dict[str, None])
    #: Earlier processes of this member; what arrives late from them is ignored.
    retired: list[str] = field(default_factory=list[str])


class PoolIndex:
    """Blocks of one job's pool by member."""

    def __init__(self) -> None:
        self._owners: dict[RankKey, _Owner] = {}

    def apply(self, member: RankKey, incarnation: str, event: KvEvent) -> bool:
        """Take in one event; False if it is old and was ignored."""
        owner = self._owner(member, incarnation)
        if owner is None or (owner.expected is not None and event.sequence < owner.expected):
            return False
        if owner.expected is not None and event.sequence > owner.expected:
            # A removal may be among what was missed: only what is said from now on counts.
            owner.blocks.clear()
        owner.expected = event.sequence + 1
        if event.kind == "STORED":
            owner.blocks.update(dict.fromkeys(event.block_hashes))
            while len(owner.blocks) > BLOCKS_A_MEMBER_MAX:
                del owner.blocks[next(iter(owner.blocks))]
        elif event.kind == "REMOVED":
            for block in event.block_hashes:
                owner.blocks.pop(block, None)
        elif event.kind == "CLEARED":
            owner.blocks.clear()
        return True

    def _owner(self, member: RankKey, incarnation: str) -> _Owner | None:
        """The member's newest process; None if this is an earlier one."""
        owner = self._owners.get(member)
        if owner is None:
            owner = self._owners[member] = _Owner(incarnation)
        elif owner.incarnation != incarnation:
            if incarnation in owner.retired:
                return None
            retired = [*owner.retired, owner.incarnation][-_RETIRED_MAX:]
            owner = self._owners[member] = _Owner(incarnation, retired=retired)
        return owner

    def drop(self, member: RankKey) -> None:
        """Forget a member's blocks: its process ended."""
        owner = self._owners.get(member)
        if owner is not None:
            owner.blocks.clear()

    def holders(self, block: str, members: Sequence[RankKey]) -> tuple[RankKey, ...]:
        """Those of the members that hold the block."""
        return tuple(
            member
            for member in members
            if member in self._owners and block in self._owners[member].blocks
        )

    def prefix_length(self, block_hashes: Sequence[str], live_members: Sequence[RankKey]) -> int:
        """How many of the first blocks are each held by some live member."""
        held = [self._owners[m].blocks for m in live_members if m in self._owners]
        for number, block in enumerate(block_hashes):
            if not any(block in blocks for blocks in held):
                return number
        return len(block_hashes)

    def blocks(self, member: RankKey) -> int:
        owner = self._owners.get(member)
        return len(owner.blocks) if owner else 0

    def validate(self) -> None:
        for member, owner in self._owners.items():
            assert owner.incarnation not in owner.retired, f"{member} lives and is retired"
            assert len(owner.blocks) <= BLOCKS_A_MEMBER_MAX, f"{member} holds too many blocks"
