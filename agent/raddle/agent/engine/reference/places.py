"""Which pool member keeps which block, from the members that a rank was told.

The map is the scheduler's (`raddle.core.kvcache.pool`): members and ranks compute it alike, so a
block is found without asking anybody. What they learn for themselves is who has no room just now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from raddle.core.kvcache.index import block_keys
from raddle.core.kvcache.pool import PoolMap, PoolMember
from raddle.core.kvcache.slots import unpack_slots
from raddle.model.types import Member, RankKey

# A member that had no room is asked again after this time.
_FULL_S = 1.0


class Places:
    """The map over the pool's members of this epoch. Members go by their numbers in `members`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._map = PoolMap(())
        #: Until when a member counts as full, by process.
        self._full_until: dict[str, float] = {}
        self.members: tuple[Member, ...] = ()
        self.replicas = 1

    def set_members(self, members: Sequence[Member]) -> None:
        """Members with an address take blocks, unless they are being drained."""
        self.members = tuple(member for member in members if member.engine_address)
        self.replicas = max((member.kv_replicas for member in self.members), default=1) or 1
        self._full_until = {}
        self._map = PoolMap([_pool_member(member) for member in self.members])

    def number(self, key: RankKey) -> int | None:
        """The number of a member, None if it is none."""
        return next((n for n, member in enumerate(self.members) if member.rank == key), None)

    def rankings(self, names: Sequence[str]) -> list[list[int]]:
        """Of each block: all members, best keeper first."""
        if not self.members or not names:
            return [[] for _ in names]
        found: list[list[int]] = self._map.ranking(block_keys(names)).tolist()
        return found

    def pick(
        self,
        ranking: Sequence[int],
        *,
        held: Sequence[int] = (),
        usable: Sequence[bool] | None = None,
        writer_node: str = "",
    ) -> list[int]:
        """Who should keep a block, `held` (who has it already) first."""
        return self._map.pick(
            ranking, self.replicas, usable=usable, held=held, writer_node=writer_node
        )

    def is_full(self, number: int) -> None:
        """A member had no room."""
        self._full_until[self.members[number].incarnation] = self._clock() + _FULL_S

    def with_room(self) -> list[bool]:
        """By member: did it not lack room just now?"""
        now = self._clock()
        return [self._full_until.get(m.incarnation, now) <= now for m in self.members]

    def by_rank(self, names: Sequence[str], number: int) -> list[tuple[Member, list[str]]]:
        """Each member with the blocks for which it is the `number`-th best keeper."""
        groups: dict[int, list[str]] = {}
        for name, ranking in zip(names, self.rankings(names), strict=True):
            groups.setdefault(ranking[number], []).append(name)
        return [(self.members[member], asked) for member, asked in groups.items()]


def _pool_member(member: Member) -> PoolMember:
    key = member.rank
    return PoolMember(
        name=f"{key.role}/{key.instance}/{key.rank}",
        node=member.node,
        rack=member.rack,
        weight=0.0 if member.kv_draining else max(1, member.dram_bytes),
        slots=unpack_slots(member.kv_slots),
    )
