"""Which pool members keep which block, and in which order lost copies are made again.

In go members with nodes, racks, weights and slots, out come keepers: those of the block's slot
(`slots`), and after them, for when these are full, gone or on the writer's node, the others by
weighted rendezvous. Member m ranks for block b by -ln(u) / weight with u = hash(b, m) in (0, 1):
the chance to rank first is the member's share of the weights, and a change of members or weights
moves only blocks from or to the members that changed.

`RepairLoop` orders the copies that are to be made again: hottest first, under a bandwidth budget.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from raddle.core.kvcache.index import mixed
from raddle.core.kvcache.rows import Keys

#: An empty member begins with this share of its weight and has all of it after RAMP_S, so that
#: it does not attract all writes while its neighbours are full.
RAMP_BEGIN = 0.1
RAMP_S = 60.0
_MANTISSA_BITS = np.uint64(11)
_HALF = np.uint64(32)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMember:
    """One host of the pool. `name` outlives restarts; weight is relative, 0 takes nothing."""

    name: str
    node: str
    rack: str = ""
    weight: float = 1.0
    #: Slots that it keeps; without any, blocks go by rendezvous alone.
    slots: tuple[int, ...] = ()


def ramp(age_s: float, ramp_s: float = RAMP_S) -> float:
    """The share of its weight that a member has so long after it began empty."""
    return min(1.0, RAMP_BEGIN + (1.0 - RAMP_BEGIN) * max(0.0, age_s) / ramp_s)


class PoolMap:
    """Blocks to members. Order of the members does not matter, their names do."""

    def __init__(self, members: Sequence[PoolMember]) -> None:
        self.members = tuple(members)
        self._salts = np.array([_salt(m.name) for m in members], dtype=np.uint64)
        weights = np.array([m.weight for m in members], dtype=np.float64)
        with np.errstate(divide="ignore"):
            self._inverse = np.where(weights > 0, 1.0 / weights, np.inf)
        self._open = [bool(weight > 0) for weight in weights]
        slots = max((slot for m in members for slot in m.slots), default=0) + 1
        self._keeps = np.zeros((slots, len(members)), dtype=np.bool_)
        for number, member in enumerate(members):
            self._keeps[list(member.slots), number] = True
        #: The most keepers that any slot has.
        self.keepers_a_slot = int(self._keeps.sum(axis=1).max())

    def ranking(self, keys: Keys) -> NDArray[np.intp]:
        """[block, member]: numbers of members, best keeper first."""
        count = np.uint64(len(self._keeps))
        slots = ((mixed(keys, np.uint64(0)) >> _HALF) * count) >> _HALF
        keeps = self._keeps[slots.astype(np.intp)]
        spread = mixed(keys[:, None] ^ self._salts[None, :], np.uint64(0))
        # 53 bits and a half: never 0 and never 1.
        uniform = ((spread >> _MANTISSA_BITS).astype(np.float64) + 0.5) / 2.0**53
        scores = -np.log(uniform) * self._inverse[None, :]
        # Keepers of the slot before all others, among themselves in the same order.
        scores = np.where(keeps, -1.0 / (1.0 + scores), scores)
        order: NDArray[np.intp] = scores.argsort(axis=1, kind="stable")
        return order

    def pick(
        self,
        order: Sequence[int],
        replicas: int,
        *,
        usable: Sequence[bool] | None = None,
        held: Sequence[int] = (),
        writer_node: str = "",
    ) -> list[int]:
        """`replicas` members of a block's ranking on different nodes, `held` ones first.

        Keepers of the slot as they are, others in different racks as long as there are any.
        `usable` leaves members out that are full, draining or gone. The only copy is never on the
        writer's node: a node's loss would take both. Fewer members are given when there are no
        more.
        """
        chosen = list(held)
        nodes = {self.members[m].node for m in chosen}
        racks = {self.members[m].rack for m in chosen}
        same_rack: list[int] = []
        for place, number in enumerate(order):
            if len(chosen) >= replicas:
                break
            member = self.members[number]
            barred = member.node in nodes or (replicas == 1 and member.node == writer_node)
            barred = barred or number in held
            if barred or not self._open[number] or not (usable is None or usable[number]):
                continue
            if member.rack in racks and place >= self.keepers_a_slot:
                same_rack.append(number)
                continue
            chosen.append(number)
            nodes.add(member.node)
            racks.add(member.rack)
        for number in same_rack:
            if len(chosen) < replicas and self.members[number].node not in nodes:
                chosen.append(number)
                nodes.add(self.members[number].node)
        if not held and nodes == {writer_node}:
            return []
        return chosen

    def keepers(
        self,
        keys: Keys,
        replicas: int,
        *,
        usable: Sequence[bool] | None = None,
        writer_node: str = "",
    ) -> list[list[int]]:
        """The keepers of each block, as `pick` chooses them."""
        return [
            self.pick(order, replicas, usable=usable, writer_node=writer_node)
            for order in self.ranking(keys).tolist()
        ]


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass(slots=True)
class RepairProgress:
    """Where a repair stands; bytes and copies count from its beginning."""

    copies_made: int = 0
    copies_left: int = 0
    bytes_made: int = 0
    bytes_left: int = 0


class RepairLoop(Generic[T]):
    """Copies to be made, hottest first, no more bytes a second than the budget.

    Between any two times at most budget x seconds + one copy are handed out.
    """

    def __init__(self, bytes_per_s: float) -> None:
        if bytes_per_s <= 0:
            raise ValueError("a repair's budget must be above 0 bytes a second")
        self._bytes_per_s = bytes_per_s
        self._heap: list[tuple[float, int, T, int]] = []
        self._next = 0
        #: When the budget allows the next copy.
        self.free_at_s = 0.0
        self.progress = RepairProgress()

    def add(self, item: T, *, heat: float, size_bytes: int) -> None:
        """Queue one copy. Of equally hot ones the first comes first."""
        heapq.heappush(self._heap, (-heat, self._next, item, size_bytes))
        self._next += 1
        self.progress.copies_left += 1
        self.progress.bytes_left += size_bytes

    def take(self, now: float) -> T | None:
        """The hottest copy if the budget allows one now, else None."""
        if not self._heap or now < self.free_at_s:
            return None
        _, _, item, size = heapq.heappop(self._heap)
        self.free_at_s = max(self.free_at_s, now) + size / self._bytes_per_s
        self.progress.copies_left -= 1
        self.progress.bytes_left -= size
        self.progress.copies_made += 1
        self.progress.bytes_made += size
        return item

    def clear(self) -> None:
        """Forget what is queued; the budget that was used stays used."""
        self._heap.clear()
        self.progress.copies_left = self.progress.bytes_left = 0

    def seconds_to_protection(self, now: float) -> float:
        """How long what is queued will take."""
        if not self._heap:
            return 0.0
        return max(0.0, self.free_at_s - now) + self.progress.bytes_left / self._bytes_per_s

    def __len__(self) -> int:
        return len(self._heap)
