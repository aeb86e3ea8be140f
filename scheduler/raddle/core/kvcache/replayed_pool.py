"""The pool while a trace is replayed: blocks, their copies, room, and what hosts come and go.

In go blocks to keep and hosts that fail, drain and join; out come hits, copies and losses. Time is
the replay's business: here is only what is where. Blocks are least recently used first; a block
leaves with all its copies. A host that is full passes a block on to the next of its ranking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from raddle.core.kvcache.index import mixed
from raddle.core.kvcache.pool import PoolMap, PoolMember, ramp
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
        self._ramping = [n for n, host in self.hosts.items() if host.joined_s is not None]
        for number, host in self.hosts.items():
            self._taking[number] = host.live and not host.draining and host.capacity != 0
            self._room[number] = self._taking[number] and host.has_room(now)
        self._map_anew()
        self.wanted_copies = min(self.replicas, sum(host.live for host in self.hosts.values()))
        self._new_copies = min(self.replicas, sum(self._taking))

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

    def only_on(self, block: int, node: str) -> bool:
        """Is this node the only place of the block?"""
        return [node_name(host) for host in self._copies.get(block, ())] == [node]

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

    def keep(self, block: int, ranking: Sequence[int], now: float, writer_node: str = "") -> bool:
        """Take a block with all its copies, evicting what was not used for longest.

        False if there is nowhere to put it.
        """
        if block in self._copies:
            return True
        hosts = self._with_room(block, ranking, self._new_copies, (), now, writer_node)
        if not hosts:
            return False
        self._copies[block] = hosts
        for host in hosts:
            self._occupy(host, 1, now)
        if len(hosts) < self.wanted_copies:
            self.below.add(block)
        return True

    def add_copy(
        self, block: int, ranking: Sequence[int], now: float, writer_node: str = ""
    ) -> bool:
        """One copy more, elsewhere than the others; False if it cannot be or is gone."""
        held = self._copies.get(block)
        if held is None:
            return False
        hosts = self._with_room(block, ranking, len(held) + 1, held, now, writer_node)
        if len(hosts) <= len(held):
            return False
        self._copies[block] = hosts
        self._occupy(hosts[-1], 1, now)
        if len(hosts) >= self.wanted_copies:
            self.below.discard(block)
        return True

    def _with_room(
        self,
        block: int,
        ranking: Sequence[int],
        want: int,
        held: Sequence[int],
        now: float,
        writer_node: str,
    ) -> list[int]:
        """Hosts for a block, making room for it; `held` alone (or nothing) if there is none.

        Nothing is evicted where that could not help, nor what is hotter than the block itself.
        """
        for number in self._ramping:
            self._occupy(number, 0, now)
        room, best = self._room, -1
        while True:
            hosts = self._map.pick(ranking, want, usable=room, held=held, writer_node=writer_node)
            if len(hosts) >= want:
                return hosts
            if best < 0:
                taking = self._taking
                whole = self._map.pick(
                    ranking, want, usable=taking, held=held, writer_node=writer_node
                )
                best = len(whole)
            oldest = next(iter(self._copies), block)
            if len(hosts) >= best or oldest == block:
                return hosts
            self._evict(oldest, now)

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

    def to_move(self, number: int) -> list[int]:
        """Blocks of a draining host that need a copy elsewhere before it may leave."""
        staying = {n for n, host in self.hosts.items() if host.live and not host.draining}
        want = min(self.replicas, len(staying))
        return [
            block
            for block, hosts in self._copies.items()
            if number in hosts and len(staying.intersection(hosts)) < want
        ]

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

    def hottest_below(self) -> list[int]:
        """Blocks that lack copies, the most recently used first."""
        return [block for block in reversed(self._copies) if block in self.below]

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


def node_name(host: int) -> str:
    return f"n{host}"
