"""Which pool members keep which slot: even shares, few moves, copies far apart.

A block's key chooses one of a fixed number of slots; a slot has keepers. In go the members with
the slots that they keep already, out come the slots that they keep from now on. The old ones are
part of the question, because that is what lets a change of members move no more than it must:
where a map is drawn anew from the members alone, a member that is alone in its rack wins too
often, and what corrects it for one set of members has to be corrected again for the next.

Of the two wishes, even shares come first. A member keeps at most `SPARE` more than its share (or
one slot more, where that is more), so its loss, or its coming, moves no more than that, whatever
the racks. Within this bound the copies of a slot stand in different racks; a rack with more than
an n-th of all weight cannot have at most one of n copies of each slot, so some slots have two
there. Copies never share a node. Where a change leaves room below the bound, it is used to bring
copies that share a rack apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raddle.core.kvcache.index import mixed

#: What a member may keep above its share so that copies stand in different racks, and the part
#: of it that one change may spend on bringing copies apart.
SPARE = 0.06
_APART = 0.03
_SLOTS_A_MEMBER = 10
_SLOTS_MIN, SLOTS_MAX = 256, 65_536
_HALF = np.uint64(32)
_SALT = np.uint64(0x5261_6464_6C65)
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMember:
    """One member; weight is relative, 0 keeps nothing. `slots` are those that it keeps now."""

    node: str
    rack: str = ""
    weight: float = 1.0
    slots: tuple[int, ...] = ()


def slots_for(members: int) -> int:
    """How many slots a pool has that is made for so many members: a power of two.

    At least 10 a member and copy, so that a share of whole slots is at most a tenth too large.
    """
    wanted = max(_SLOTS_MIN, members * _SLOTS_A_MEMBER)
    return min(SLOTS_MAX, 1 << (wanted - 1).bit_length())


def assign_slots(members: Sequence[SlotMember], slots: int, replicas: int) -> list[tuple[int, ...]]:
    """The slots of each member, in order.

    Each slot gets `replicas` copies, or one on each node if there are fewer nodes: members of the
    same node together keep a slot once.
    """
    return _Assignment(members, slots, replicas).made()


def pack_slots(slots: Sequence[int]) -> bytes:
    """16 bits each, little-endian."""
    return np.array(slots, dtype="<u2").tobytes()


def unpack_slots(data: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(data, dtype="<u2").tolist())


class _Assignment:
    def __init__(self, members: Sequence[SlotMember], slots: int, replicas: int) -> None:
        self._members = members
        self._open = [number for number, member in enumerate(members) if member.weight > 0]
        nodes = {members[number].node for number in self._open}
        self._copies = min(replicas, len(nodes))
        self._closed = np.array([member.weight <= 0 for member in members], dtype=np.bool_)
        self._shares = _shares(members, self._open, slots, self._copies)
        # Whole slots: a share of 10.2 may be 11.
        self._limits = np.maximum(np.ceil(self._shares), np.floor(self._shares * (1 + SPARE)))
        self._loads = np.zeros(len(members), dtype=np.int64)
        self._nodes = _numbered(member.node for member in members)
        self._racks = _numbered(member.rack for member in members)
        self._keepers: list[list[int]] = [[] for _ in range(slots)]
        #: Slots that members got to fill what was missing.
        self._new: list[list[int]] = [[] for _ in members]
        for number in self._open:
            for slot in members[number].slots:
                if slot < slots and self._fits(slot, number):
                    self._add(slot, number)
        self._is_new = not self._loads.any()

    def made(self) -> list[tuple[int, ...]]:
        if self._copies:
            self._fill()
            self._level()
            if not self._is_new:
                self._bring_apart()
        found: list[list[int]] = [[] for _ in self._members]
        for slot, keepers in enumerate(self._keepers):
            for number in keepers:
                found[number].append(slot)
        return [tuple(mine) for mine in found]

    # --- one slot ------------------------------------------------------------------------------

    def _fits(self, slot: int, number: int) -> bool:
        keepers = self._keepers[slot]
        if len(keepers) >= self._copies:
            return False
        return self._members[number].node not in {self._members[k].node for k in keepers}

    def _add(self, slot: int, number: int) -> None:
        self._keepers[slot].append(number)
        self._loads[number] += 1

    def _move(self, slot: int, giver: int, taker: int) -> None:
        self._keepers[slot].remove(giver)
        self._loads[giver] -= 1
        self._add(slot, taker)

    def _left(self, number: int) -> float:
        """What a member may still take of its share."""
        return float(self._shares[number] - self._loads[number])

    def _is_apart(self, slot: int, number: int, leaving: int = -1) -> bool:
        """Would the member's rack be a new one among the other keepers?"""
        rack = self._members[number].rack
        others = self._keepers[slot]
        return all(self._members[k].rack != rack for k in others if k not in (leaving, number))

    # --- all slots -----------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give every slot its copies, those that have most of them first."""
        order = sorted(
            (slot for slot, keepers in enumerate(self._keepers) if len(keepers) < self._copies),
            key=lambda slot: -len(self._keepers[slot]),
        )
        racks = self._racks
        wanted = np.zeros(int(racks.max(initial=0)) + 1)
        for number in self._open:
            wanted[racks[number]] += max(0.0, self._left(number))
        for place, slot in enumerate(order):
            # One slot at a time: all of them together are gigabytes for thousands of members.
            draws = _draws(slot, len(self._members))
            while len(self._keepers[slot]) < self._copies:
                # A rack that wants as much as there are slots left has to be in each of them.
                is_tight = (wanted >= len(order) - place - 0.5)[racks]
                number = self._best(slot, draws, is_tight)
                if self._loads[number] >= self._limits[number]:
                    self._relieve(number, slot)
                self._add(slot, number)
                self._new[number].append(slot)
                wanted[racks[number]] -= 1

    def _best(self, slot: int, draws: FloatArray, is_tight: BoolArray) -> int:
        """Drawn by what members have left, so that each shares slots with all others.

        What one loses is then spread over all; and of what it leaves, each can take a part.
        """
        cost = np.minimum(draws / np.maximum(self._shares - self._loads, 1e-3), 1e5)
        cost[~is_tight] += 1e6
        for keeper in self._keepers[slot]:
            cost[self._racks == self._racks[keeper]] += 1e7
            cost[self._nodes == self._nodes[keeper]] += 1e10
        cost[self._loads >= self._limits] += 1e9
        cost[self._closed] += 1e10
        return int(cost.argmin())

    def _relieve(self, number: int, filled: int) -> None:
        """A member that alone is left for a slot is full: another one takes one of its slots.

        Best one that it got just now: that moves nothing more. Even shares come before racks.
        """
        takers = [n for n in self._open if n != number and self._left(n) >= 1]
        takers.sort(key=lambda n: (-self._left(n), n))
        for is_new, is_apart in ((True, True), (True, False), (False, True), (False, False)):
            for taker in takers:
                slot = self._given(number, taker, filled, is_new=is_new, is_apart=is_apart)
                if slot is not None:
                    self._move(slot, number, taker)
                    return

    def _given(
        self, giver: int, taker: int, filled: int, *, is_new: bool, is_apart: bool
    ) -> int | None:
        """A slot that the taker can take over."""
        node = self._members[taker].node
        mine = self._new[giver] if is_new else range(len(self._keepers))
        for slot in mine:
            keepers = self._keepers[slot]
            if giver not in keepers or slot == filled or taker in keepers:
                continue
            if any(self._members[k].node == node for k in keepers if k != giver):
                continue
            if not is_apart or self._is_apart(slot, taker, leaving=giver):
                return slot
        return None

    def _level(self) -> None:
        """Members far below their share, as new ones are, take slots of those with the most.

        Of those above their limit any slots, of others such that stand in other racks, and
        only what is still lacking then from anybody.
        """
        for taker in sorted(self._open, key=lambda number: -self._left(number)):
            if self._loads[taker] >= self._shares[taker] / 2:
                continue
            for any_slot in (False, True):
                self._take(taker, any_slot=any_slot)

    def _take(self, taker: int, *, any_slot: bool) -> None:
        offers = self._offers(taker)
        while self._left(taker) >= 1:
            givers = [
                number
                for number, mine in offers.items()
                if mine and (mine[-1][0] or any_slot or self._loads[number] > self._limits[number])
            ]
            if not givers:
                return
            giver = min(givers, key=lambda number: (self._left(number), number))
            _, slot = offers[giver].pop()
            keepers = self._keepers[slot]
            if giver in keepers and taker not in keepers:
                self._move(slot, giver, taker)

    def _offers(self, taker: int) -> dict[int, list[tuple[int, int]]]:
        """By giver: (worth, slot) of what the member may take, the best last.

        Worth 2 brings copies apart that share a rack, 1 keeps them apart, 0 does not.
        """
        node = self._members[taker].node
        found: dict[int, list[tuple[int, int]]] = {number: [] for number in self._open}
        for slot, keepers in enumerate(self._keepers):
            for giver in keepers:
                if any(self._members[k].node == node for k in keepers if k != giver):
                    continue
                worth = 0
                if self._is_apart(slot, taker, leaving=giver):
                    worth = 1 if self._is_apart(slot, giver) else 2
                found[giver].append((worth, slot))
        for mine in found.values():
            mine.sort()
        return found

    def _bring_apart(self) -> None:
        """Part copies that share a rack, as far as one change may move more than it must."""
        room = int(_APART * float(self._shares.sum()) / max(1, len(self._open)))
        for slot, keepers in enumerate(self._keepers):
            if room <= 0:
                return
            giver = next((k for k in keepers if not self._is_apart(slot, k)), None)
            if giver is None:
                continue
            taker = self._parted(slot, giver)
            if taker is not None:
                self._move(slot, giver, taker)
                room -= 1

    def _parted(self, slot: int, giver: int) -> int | None:
        """The member with the most room that would stand in a rack of its own."""
        nodes = {self._members[k].node for k in self._keepers[slot]}
        fit = [
            number
            for number in self._open
            if self._loads[number] < self._limits[number]
            and self._members[number].node not in nodes
            and self._is_apart(slot, number, leaving=giver)
        ]
        return max(fit, key=lambda number: (self._left(number), -number), default=None)


def _numbered(names: Iterable[str]) -> IntArray:
    """Equal names have equal numbers."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.intp)


def _draws(slot: int, members: int) -> FloatArray:
    """By member: -ln(u), u in (0, 1): always the same for the same slot and member."""
    names = (np.uint64(slot) << _HALF) + np.arange(1, members + 1, dtype=np.uint64)
    spread = mixed(names, _SALT) >> _HALF
    return -np.log((spread.astype(np.float64) + 0.5) / 2.0**32)


def _shares(
    members: Sequence[SlotMember], open_ones: Sequence[int], slots: int, copies: int
) -> FloatArray:
    """Slots of each member by weight; no node keeps one twice, what it cannot take others do."""
    found = np.zeros(len(members))
    weights: dict[str, float] = defaultdict(float)
    for number in open_ones:
        weights[members[number].node] += members[number].weight
    whole_of = dict(weights)
    left = float(slots * copies)
    by_node: dict[str, float] = {}
    while weights:
        whole = sum(weights.values())
        full = [node for node, weight in weights.items() if weight / whole * left >= slots]
        if not full:
            by_node |= {node: weight / whole * left for node, weight in weights.items()}
            break
        for node in full:
            by_node[node] = float(slots)
            left -= slots
            del weights[node]
    for number in open_ones:
        node = members[number].node
        found[number] = by_node.get(node, 0.0) * members[number].weight / whole_of[node]
    return found
