"""The pool while a trace is replayed: blocks, their copies, room, and what hosts come and go.

In go blocks to keep and hosts that fail, drain and join; out come hits, copies and losses. Time is
the replay's business: here is only what is where. Blocks are least recently used first; a block
leaves with all its copies. A host that is full passes a block on to the next of its ranking.

A block enters with all its copies or not at all. Only where a host that joined has no room *yet*
it enters with fewer, and gets the others as the host's room grows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from raddle.core.kvcache.index import mixed
from raddle.core.kvcache.pool import RAMP_S, PoolMap, PoolMember, ramp
from raddle.core.kvcache.slots import SlotMember, assign_slots, slots_for

_SALT = np.uint64(0x5261_6464_6C65)


@dataclass(slots=True)
class Host:
    """One host of the pool. `capacity` counts copies, None is without end."""

    capacity: int | None
    live: bool = True
    draining: bool = False
    used: int = 0
    #: When it joined empty; None if it was there from the beginning.
    joined_s: float | None = None

    def has_room(self, now: float) -> bool:
        if self.capacity is None:
            return True
        share = 1.0 if self.joined_s is None else ramp(now - self.joined_s)
        return self.used < int(self.capacity * share)

    def is_ramping(self, now: float) -> bool:
        return self.live and self.joined_s is not None and now - self.joined_s < RAMP_S


@dataclass(slots=True)
class Counts:
    """What happened so far."""

    copies_restored: int = 0
    copies_drained: int = 0
    blocks_evicted: int = 0
    #: Distinct blocks whose last copy died with a host.
    lost: set[int] = field(default_factory=set[int])


class ReplayedPool:
    """Host h sits on node h; racks are of `nodes_per_rack` nodes."""

    def __init__(
        self, capacities: Sequence[int | None], replicas: int, nodes_per_rack: int, hosts_max: int
    ) -> None:
        self.replicas = replicas
        self.counts = Counts()
        #: Copies that every block should have: no more than there are live hosts.
        self.wanted_copies = 0
        #: Copies that a new block enters with: draining hosts take none.
        self._new_copies = 0
        self.hosts = {number: Host(capacity) for number, capacity in enumerate(capacities)}
        self._nodes_per_rack = nodes_per_rack
        #: Slots of the map by host, and the map.
        self._slots: list[tuple[int, ...]] = [()] * hosts_max
        self._map = PoolMap(())
        #: Hosts of each block; the order is that of use, the least recent first.
        self._copies: OrderedDict[int, list[int]] = OrderedDict()
        #: Blocks with fewer copies than they should have.
        self.below: set[int] = set()
        self._hosts_max = hosts_max
        #: By host: may it take copies at all, and does it have room now? Kept up with each change.
        self._taking: list[bool] = []
        self._room: list[bool] = []
        self._ramping: list[int] = []
        self._hosts_changed(0.0)

    def _hosts_changed(self, now: float) -> None:
        self._taking = [False] * self._hosts_max
        self._room = [False] * self._hosts_max
        self._ramping = [n for n, host in self.hosts.items() if host.is_ramping(now)]
        for number, host in self.hosts.items():
            self._taking[number] = host.live and not host.draining and host.capacity != 0
            self._room[number] = self._taking[number] and host.has_room(now)
        self._map_anew()
        live = [host for host in self.hosts.values() if host.live]
        self.wanted_copies = min(self.replicas, len(live))
        self._new_copies = min(self.replicas, sum(not host.draining for host in live))

    def _map_anew(self) -> None:
        """Give the slots to the hosts that take copies, moving as few as can be."""
        racks = [f"r{number // self._nodes_per_rack}" for number in range(self._hosts_max)]
        taking = [
            SlotMember(
                node=node_name(number),
                rack=racks[number],
                weight=float(self._taking[number]),
                slots=self._slots[number],
            )
            for number in range(self._hosts_max)
        ]
        self._slots = assign_slots(taking, slots_for(self._hosts_max), self.replicas)
        self._map = PoolMap(
            [
                PoolMember(name=f"host-{number}", node=node_name(number), rack=rack, slots=slots)
                for number, (rack, slots) in enumerate(zip(racks, self._slots, strict=True))
            ]
        )

    def _occupy(self, number: int, copies: int, now: float) -> None:
        """A host holds so many copies more (or fewer)."""
        host = self.hosts[number]
        host.used += copies
        self._room[number] = self._taking[number] and host.has_room(now)

    # --- questions -----------------------------------------------------------------------------

    def __contains__(self, block: int) -> bool:
        return block in self._copies

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def copies(self) -> int:
        return sum(host.used for host in self.hosts.values())

    def leading(self, blocks: Sequence[int]) -> int:
        """How many of the first blocks are present."""
        for number, block in enumerate(blocks):
            if block not in self._copies:
                return number
        return len(blocks)

    def holders(self, block: int) -> list[int]:
        """The hosts of a block; none if it is not present."""
        return self._copies.get(block, [])

    def is_alone(self, block: int, using: Collection[int]) -> bool:
        """Is its only copy on a node whose ranks use it? The node's loss would take both."""
        return _is_alone(self._staying(block), using)

    def lacks(self, block: int, using: Collection[int]) -> bool:
        """Does a block that is present need one copy more, those on draining hosts left aside?"""
        if block not in self._copies:
            return False
        staying = self._staying(block)
        return len(staying) < self._new_copies or _is_alone(staying, using)

    def _staying(self, block: int) -> list[int]:
        return [host for host in self.holders(block) if not self.hosts[host].draining]

    def waits_for_room(self, now: float) -> bool:
        """Has a host that joined no room yet, but will have some?"""
        self._ramp_on(now)
        return any(self._taking[number] and not self._room[number] for number in self._ramping)

    def rankings(self, blocks: Sequence[int]) -> list[list[int]]:
        """Of each block: hosts, best keeper first."""
        numbers = np.array(blocks, dtype=np.int64).astype(np.uint64)
        rankings: list[list[int]] = self._map.ranking(mixed(numbers, _SALT)).tolist()
        return rankings

    # --- use and room --------------------------------------------------------------------------

    def touch(self, blocks: Iterable[int]) -> None:
        """These were used now; the last named is the most recent."""
        for block in blocks:
            if block in self._copies:
                self._copies.move_to_end(block)

    def keep(
        self, block: int, ranking: Sequence[int], now: float, using: Collection[int] = ()
    ) -> bool:
        """Take a block with all its copies, evicting what was not used for longest.

        `using` are nodes whose ranks use it: its only copy is on none of them. False if there is
        nowhere to put it.
        """
        if block in self._copies:
            return True
        want = self._new_copies
        barred = using if want == 1 else ()
        hosts = self._with_room(block, ranking, want, barred, now)
        if not hosts and barred:
            # Used on every node: two copies are as good.
            want = 2
            hosts = self._with_room(block, ranking, want, (), now)
        is_short = len(hosts) < want and not self.waits_for_room(now)
        if not hosts or is_short or _is_alone(hosts, using):
            return False
        self._copies[block] = hosts
        for host in hosts:
            self._occupy(host, 1, now)
        if len(hosts) < self.wanted_copies:
            self.below.add(block)
        return True

    def add_copy(
        self, block: int, ranking: Sequence[int], now: float, using: Collection[int] = ()
    ) -> bool:
        """One copy more, elsewhere than the others; False if it cannot be or is gone."""
        held = self._copies.get(block)
        if held is None:
            return False
        # Where it will be the only one, it is on no node whose ranks use the block, if it can be.
        barred = () if self._staying(block) else using
        hosts = self._with_room(block, ranking, len(held) + 1, barred, now)
        if len(hosts) <= len(held) and barred:
            hosts = self._with_room(block, ranking, len(held) + 1, (), now)
        if len(hosts) <= len(held):
            return False
        self._copies[block] = hosts
        self._occupy(hosts[-1], 1, now)
        if len(hosts) >= self.wanted_copies:
            self.below.discard(block)
        return True

    def leave_if_short(self, block: int, now: float) -> None:
        """A block that cannot get its copies for want of room leaves the pool."""
        if block in self._copies and len(self._copies[block]) < self._new_copies:
            self._evict(block, now)

    def _ramp_on(self, now: float) -> None:
        """Count the room of hosts that joined anew; once all is there they are like the others."""
        for number in self._ramping:
            self._occupy(number, 0, now)
        self._ramping = [number for number in self._ramping if self.hosts[number].is_ramping(now)]

    def _with_room(
        self,
        block: int,
        ranking: Sequence[int],
        want: int,
        barred: Collection[int],
        now: float,
    ) -> list[int]:
        """Hosts for a block, making room for it; those that hold it (or none) if there is none.

        Nothing is evicted where that could not help, nor what is hotter than the block itself.
        """
        self._ramp_on(now)
        held, best = self.holders(block), -1
        while True:
            hosts = self._picked(ranking, want, held, barred, self._room)
            if len(hosts) >= want:
                return hosts
            if best < 0:
                best = self._attainable(ranking, want, held, barred, now)
            oldest = None
            if len(hosts) < best:
                oldest = self._oldest_in_the_way(block, held, barred)
            if oldest is None:
                return hosts
            self._evict(oldest, now)

    def _picked(
        self,
        ranking: Sequence[int],
        want: int,
        held: Sequence[int],
        barred: Collection[int],
        usable: Sequence[bool],
    ) -> list[int]:
        if barred:
            usable = [ok and number not in barred for number, ok in enumerate(usable)]
        return self._map.pick(ranking, want, usable=usable, held=held)

    def _attainable(
        self,
        ranking: Sequence[int],
        want: int,
        held: Sequence[int],
        barred: Collection[int],
        now: float,
    ) -> int:
        """How many copies the block can have once others made room; 0 if that is not enough.

        What leaves a host that joined gives no room that its time would not give as well.
        """
        could = list(self._taking)
        for number in self._ramping:
            could[number] = self._room[number]
        best = len(self._picked(ranking, want, held, barred, could))
        return best if best >= want or self.waits_for_room(now) else 0

    def _oldest_in_the_way(
        self, block: int, held: Sequence[int], barred: Collection[int]
    ) -> int | None:
        """The block not used for longest of those on hosts that would take this one in its place.

        None if there is none, or only hotter ones than the block itself.
        """
        for other, hosts in self._copies.items():
            if other == block:
                return None
            for host in hosts:
                is_full = self._taking[host] and not self._room[host]
                if is_full and host not in held and host not in barred:
                    return other
        return None

    def _evict(self, block: int, now: float) -> None:
        self.counts.blocks_evicted += 1
        self._forget(block, now)

    def _forget(self, block: int, now: float) -> None:
        """Drop all copies of a block."""
        for host in self._copies.pop(block):
            self._occupy(host, -1, now)
        self.below.discard(block)

    # --- hosts ---------------------------------------------------------------------------------

    def fail(self, number: int, now: float) -> None:
        """The host is gone with its copies."""
        self.hosts[number].live = False
        for block in [block for block, hosts in self._copies.items() if number in hosts]:
            hosts = [host for host in self._copies[block] if host != number]
            if hosts:
                self._copies[block] = hosts
            else:
                self.counts.lost.add(block)
                self._forget(block, now)
        self.hosts[number].used = 0
        self.hosts[number].draining = False
        self._recount(now)

    @property
    def draining(self) -> list[int]:
        return [number for number, host in self.hosts.items() if host.draining]

    def drain(self, number: int, now: float) -> None:
        """No new copies there from now on; what is there waits to be moved."""
        self.hosts[number].draining = True
        self._hosts_changed(now)

    def to_move(self) -> list[int]:
        """Blocks of draining hosts that need a copy elsewhere, the most recently used last."""
        return [
            block
            for block, hosts in self._copies.items()
            if any(self.hosts[host].draining for host in hosts) and self.lacks(block, ())
        ]

    def is_moving(self, block: int) -> bool:
        """Is one of its copies on a draining host?"""
        return any(self.hosts[host].draining for host in self.holders(block))

    def leave(self, number: int, now: float) -> None:
        """The drained host goes; what it alone holds goes with it."""
        for block in [block for block, hosts in self._copies.items() if number in hosts]:
            if self._copies[block] == [number]:
                self._evict(block, now)
            else:
                self._copies[block] = [host for host in self._copies[block] if host != number]
        self.hosts[number] = Host(self.hosts[number].capacity, live=False)
        self._recount(now)

    def join(self, number: int, capacity: int | None, now: float) -> None:
        """An empty host is there; its room grows by and by."""
        self.hosts[number] = Host(capacity, joined_s=now)
        self._recount(now)

    def _recount(self, now: float) -> None:
        self._hosts_changed(now)
        want = self.wanted_copies
        self.below = {block for block, hosts in self._copies.items() if len(hosts) < want}

    def hottest(self, blocks: Collection[int]) -> list[int]:
        """Those that are present, the most recently used first."""
        return [block for block in reversed(self._copies) if block in blocks]

    def validate(self) -> None:
        """Assert what holds between any two calls."""
        used = dict.fromkeys(self.hosts, 0)
        for block, hosts in self._copies.items():
            assert hosts, f"{block} is present without a copy"
            assert len({node_name(host) for host in hosts}) == len(hosts), (
                f"{block}: one node twice"
            )
            for host in hosts:
                assert self.hosts[host].live, f"{block} is on {host}, which is gone"
                used[host] += 1
        for number, one in self.hosts.items():
            assert used[number] == one.used, f"{number} counts {one.used}, holds {used[number]}"
            assert one.capacity is None or one.used <= one.capacity, f"{number} is too full"
        want = self.wanted_copies
        below = {block for block, hosts in self._copies.items() if len(hosts) < want}
        assert below == self.below, "blocks without enough copies are counted wrongly"


def _is_alone(hosts: Sequence[int], using: Collection[int]) -> bool:
    return len(hosts) == 1 and hosts[0] in using


def node_name(host: int) -> str:
    return f"n{host}"
