"""Which pool member keeps which block, from the members that a rank was told.

The map is the scheduler's (`raddle.core.kvcache.pool`): members and ranks compute it alike, so a
block is found without asking anybody. A member that came later begins with a small share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from raddle.core.kvcache.index import block_keys
from raddle.core.kvcache.pool import RAMP_S, PoolMap, PoolMember, ramp
from raddle.model.types import Member

# While members are ramped in the map is made anew this often.
_RAMP_STEP_S = 1.0


class Places:
    """The map over the pool's members of this epoch."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._members: tuple[Member, ...] = ()
        #: When each process was first heard of; None for those of the beginning.
        self._since: dict[str, float | None] = {}
        self._made_at = 0.0
        self._map = PoolMap(())
        self.replicas = 1

    @property
    def members_count(self) -> int:
        return len(self._members)

    def set_members(self, members: Sequence[Member]) -> None:
        """Members with an address take blocks; a new process is empty and is ramped in."""
        first = not self._since
        self._members = tuple(member for member in members if member.engine_address)
        born = None if first else self._clock()
        self._since = {
            member.incarnation: self._since.get(member.incarnation, born)
            for member in self._members
        }
        self.replicas = max((member.kv_replicas for member in self._members), default=1) or 1
        self._make()

    def _make(self) -> None:
        self._made_at = self._clock()
        self._map = PoolMap([self._pool_member(member) for member in self._members])

    def _pool_member(self, member: Member) -> PoolMember:
        since = self._since[member.incarnation]
        share = 1.0 if since is None else ramp(self._made_at - since)
        key = member.rank
        return PoolMember(
            name=f"{key.role}/{key.instance}/{key.rank}",
            node=member.node,
            rack=member.rack,
            weight=max(1, member.dram_bytes) * share,
        )

    def _current(self) -> PoolMap:
        now = self._clock()
        made_at = self._made_at
        ramping = any(s is not None and made_at - s < RAMP_S for s in self._since.values())
        if ramping and now - self._made_at >= _RAMP_STEP_S:
            self._make()
        return self._map

    def keepers(self, names: Sequence[str], writer_node: str = "") -> list[list[Member]]:
        """The members that should keep each block, best first."""
        if not self._members or not names:
            return [[] for _ in names]
        found = self._current().keepers(block_keys(names), self.replicas, writer_node=writer_node)
        return [[self._members[number] for number in numbers] for numbers in found]

    def by_keeper(
        self, names: Sequence[str], writer_node: str = ""
    ) -> list[tuple[Member, list[str]]]:
        """Each member with the blocks that it should keep."""
        groups: dict[str, tuple[Member, list[str]]] = {}
        for name, members in zip(names, self.keepers(names, writer_node), strict=True):
            for member in members:
                groups.setdefault(member.engine_address, (member, []))[1].append(name)
        return list(groups.values())

    def by_rank(self, names: Sequence[str], number: int) -> list[tuple[Member, list[str]]]:
        """Each member with the blocks for which it is the `number`-th best keeper."""
        groups: dict[int, list[str]] = {}
        ranking = self._current().ranking(block_keys(names))[:, number].tolist()
        for name, member in zip(names, ranking, strict=True):
            groups.setdefault(member, []).append(name)
        return [(self._members[member], asked) for member, asked in groups.items()]
