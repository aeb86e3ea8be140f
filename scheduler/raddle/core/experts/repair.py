"""Repair of an expert map after dies were lost, drained, slowed or came back.

In go the old map and the layout as it is now; out comes the new map with the loads that it needs.
What is fine stays. An expert gets another copy only where it has none, or where its copies carry
more than the heaviest copy of the best map for the slots that are left (that is the bound at one
slot a die, so no smaller number of loads reaches it). Room comes from empty slots, else from
copies that are not needed for that bound. Then come improving exchanges, as many as are allowed.
Sources are chosen in `sources`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raddle.core.experts.balance import (
    balance_of_layers,
    copy_loads,
    least_times,
    loads_of_slots,
    slot_indices,
)
from raddle.core.experts.copies import count_copies, heaviest_copy
from raddle.core.experts.exchange import Working, exchange_best
from raddle.core.experts.layout import (
    EMPTY,
    BoolArray,
    FloatArray,
    IntArray,
    Layout,
    nearness,
    numbers,
)
from raddle.core.experts.part import LEVELS_ALWAYS_APART, ROUNDS_MAX, part_copies

# Without a number of swaps: as many as reach this balance...
BALANCE_GOAL = 0.95
# ...while no more than this share of the slots is loaded anew.
LOADS_SHARE_MAX = 0.10
_ROUNDING = 1 + 1e-9
# Sharing the widest domain counts 1; loads, a few times the mean at most, stay far below that.
_LOAD_WEIGHT = 1e-7


@dataclass(frozen=True, slots=True)
class MapChange:
    """A new map and how it differs from the old one."""

    #: [layers, slots]
    table: IntArray
    #: [loads] each of them: what is loaded where, in the order of layer and slot.
    layer: IntArray
    slot: IntArray
    expert: IntArray
    #: (layer, expert) that found no slot, in order.
    uncovered: tuple[tuple[int, int], ...]
    #: Copies of other experts that gave way.
    donor_slots: int
    #: Slots that keep what they have in memory.
    kept: int

    @property
    def loads(self) -> int:
        return len(self.layer)


def repair_map(
    table: IntArray,
    loads: FloatArray,
    layout: Layout,
    *,
    joined: BoolArray | None = None,
    respeeded: BoolArray | None = None,
    swaps: int | None = 0,
) -> MapChange:
    """Repair a map for the hosts of `layout`; nothing lost and nothing new changes nothing.

    Args:
        table: [layers, slots] before; what it has on dies that host nothing (any more) is gone.
        loads: [layers, experts], any unit.
        joined: [dies] hosts that are new: they have nothing in memory, what the map gives them
            is loaded, and their empty slots are filled.
        respeeded: [dies] whose speed is another one than before: what they carry may change.
        swaps: exchanges a layer that may improve the balance; None: as many as reach 0.95 while
            at most 10 % of the slots are loaded.
    """
    fresh = np.zeros(layout.dies, dtype=bool) if joined is None else joined & layout.hosts
    grid = layout.to_grid(table)
    touched = (grid[:, ~layout.hosts] >= 0).any(axis=(1, 2))
    touched |= (count_copies(grid[:, layout.hosts], loads.shape[1]) == 0).any(axis=1)
    touched |= (grid[:, fresh] == EMPTY).any(axis=(1, 2))
    if respeeded is not None and (respeeded & layout.hosts).any():
        touched[:] = True
    return remap_layers(table, loads, layout, np.flatnonzero(touched), fresh=fresh, swaps=swaps)


def remap_layers(
    table: IntArray,
    loads: FloatArray,
    layout: Layout,
    rows: IntArray,
    *,
    fresh: BoolArray | None = None,
    swaps: int | None = 0,
) -> MapChange:
    """Bring some layers up to date; the others keep what their hosts have.

    Args:
        rows: the layers.
        fresh: [dies] hosts that have nothing in memory yet.
        swaps: as for `repair_map`.
    """
    new = np.zeros(layout.dies, dtype=bool) if fresh is None else fresh
    hosts = layout.host_order()
    inner, fresh_hosts = layout.only(hosts), new[hosts]
    before = layout.to_grid(table)
    grid = before[:, hosts, : inner.width]
    old = grid.copy()
    old[:, fresh_hosts] = EMPTY
    donors = 0
    uncovered: tuple[tuple[int, int], ...] = ()
    if len(rows) and inner.dies:
        needed = _needed(loads[rows], inner, before[rows])
        filling = _Filling(grid[rows], loads[rows], inner, fresh_hosts, needed)
        filling.cover()
        filling.fill()
        donors = filling.donor_slots
        uncovered = tuple((int(rows[layer]), expert) for layer, expert in filling.uncovered)
        grid[rows] = filling.grid
    # With one slot a die of one speed, exchanges change nothing but places.
    moot = inner.dies < 2 or (inner.width == 1 and bool((inner.speeds == inner.speeds[0]).all()))  # noqa: PLR2004
    if swaps != 0 and len(rows) and not moot:
        _improve(grid, old, loads, inner, swaps, rows, table.size)
    after = np.where(before >= 0, EMPTY, before)
    after[:, hosts, : inner.width] = grid
    return changed(layout, before, after, new, uncovered, donors)


def changed(
    layout: Layout,
    before: IntArray,
    after: IntArray,
    fresh: BoolArray,
    uncovered: tuple[tuple[int, int], ...] = (),
    donor_slots: int = 0,
) -> MapChange:
    """What must be loaded to get from grid to grid: experts that a die did not have at all."""
    new = (after >= 0) & ((after != before) | fresh[:, None])
    layer, die, place = np.nonzero(new)
    expert = after[layer, die, place]
    had = (before[layer, die] == expert[:, None]).any(axis=1) & ~fresh[die]
    layer, die, place, expert = (x[~had] for x in (layer, die, place, expert))
    first = np.cumsum(layout.slots) - layout.slots
    kept = int(np.count_nonzero(after >= 0)) - len(layer)
    return MapChange(
        layout.to_table(after), layer, first[die] + place, expert, uncovered, donor_slots, kept
    )


class _Filling:
    """Copies that are missing find slots, one a layer and round; all dies are hosts."""

    def __init__(
        self,
        grid: IntArray,
        loads: FloatArray,
        layout: Layout,
        fresh: BoolArray,
        needed: IntArray,
    ) -> None:
        self.grid, self.loads, self.layout, self.fresh = grid, loads, layout, fresh
        self.copies = count_copies(grid, loads.shape[1])
        self.needed = needed
        self.carried = np.zeros(grid.shape[:2])
        #: [layers, experts] the mean die, experts that are to be covered included.
        even = np.maximum(loads.sum(axis=1, keepdims=True) / layout.dies, 1e-300)
        self.even = np.broadcast_to(even, loads.shape)
        #: The slots' experts in the two tables below, kept up to date with the grid.
        self.index = slot_indices(grid, loads.shape[1] + 2)
        self.shared = np.zeros((len(grid), loads.shape[1] + 2))
        self.price = np.full(self.shared.shape, np.inf)
        self.price[:, EMPTY] = 0.0
        #: [dies] loads of this repair so far.
        self.burden = np.zeros(layout.dies)
        self.donor_slots = 0
        self.uncovered: list[tuple[int, int]] = []
        self._price((slice(None), slice(0, loads.shape[1])))
        self._weigh(numbers(len(grid)))

    @cached_property
    def _members(self) -> list[IntArray]:
        """Not needed where all that is missing had no copy left."""
        return self.layout.members()

    def _weigh(self, layers: IntArray) -> None:
        """Loads of the dies. With one slot a die any donor does as well: nothing is weighed."""
        if self.layout.width > 1:
            self.carried[layers] = self.shared.ravel()[self.index[layers]].sum(axis=2)

    def _price(self, at: tuple[IntArray | slice, IntArray | slice]) -> None:
        """What a copy weighs, and what it costs that it gives way: infinite if it is needed.

        `at` are (layers, experts). Its die gets rid of its load, its siblings take it over; in
        units of the mean die.
        """
        copies, loads = self.copies[at], self.loads[at]
        share = loads / np.maximum(copies, 1)
        self.shared[at] = share
        price = np.zeros(copies.shape)
        if self.layout.width > 1:
            price = (loads / np.maximum(copies - 1, 1) - 2 * share) / self.even[at]
        surplus = copies > self.needed[at]
        self.price[at] = np.where(surplus, price * _LOAD_WEIGHT, np.inf)

    def cover(self) -> None:
        """Give every expert the copies that it needs: uncovered ones first, then by load."""
        missing = np.maximum(self.needed - self.copies, 0)
        layer, expert = np.nonzero(missing)
        times = missing[layer, expert]
        layer, expert = np.repeat(layer, times), np.repeat(expert, times)
        share = self.loads[layer, expert] / self.needed[layer, expert]
        order = np.lexsort((expert, -share, self.copies[layer, expert] > 0, layer))
        layer, expert = layer[order], expert[order]
        turn = numbers(len(layer)) - np.searchsorted(layer, layer, side="left")
        for number in range(int(turn.max(initial=-1)) + 1):
            now = turn == number
            self._place(layer[now], expert[now])
        self.uncovered.sort()

    def _place(self, layer: IntArray, expert: IntArray) -> None:
        """One more copy of an expert in each of these layers, in the least harmful slot."""
        if not len(layer):
            return
        grid = self.grid[layer]
        rows = numbers(len(layer))
        score: FloatArray = self.price.ravel()[self.index[layer]]
        score += self._harm(layer, expert, grid)[:, :, None]
        flat = score.reshape(len(layer), -1)
        best = flat.argmin(axis=1)
        found = np.isfinite(flat[rows, best])
        for at, lost in zip(layer[~found].tolist(), expert[~found].tolist(), strict=True):
            if self.copies[at, lost] == 0:
                self.uncovered.append((at, lost))
        layer, expert, rows, best = layer[found], expert[found], rows[found], best[found]
        die, place = np.divmod(best, grid.shape[2])
        given = grid[rows, die, place]
        donor = given >= 0
        self.donor_slots += int(np.count_nonzero(donor))
        self.grid[layer, die, place] = expert
        self.index[layer, die, place] = layer * self.shared.shape[1] + expert
        self.copies[layer, expert] += 1
        self.copies[layer[donor], given[donor]] -= 1
        self.burden += np.bincount(die, minlength=self.layout.dies)
        self._price((layer, expert))
        self._price((layer[donor], given[donor]))
        self._weigh(layer)

    def _harm(self, layer: IntArray, expert: IntArray, grid: IntArray) -> FloatArray:
        """[rows, dies] what a copy costs on each die: domains in common, then the die's time."""
        copies = self.copies[layer, expert]
        if self.layout.width == 1:
            harm = self._turns(layer)
        else:
            share = (self.loads[layer, expert] / (copies + 1))[:, None]
            even = self.even[layer, :1] * self.layout.speeds
            harm = (self.carried[layer] + share) / even
        harm *= _LOAD_WEIGHT
        # New processes have to load in any case: what they were to hold gives way first.
        harm -= self.fresh * 1e-3
        some = np.flatnonzero(copies)
        if len(some):
            holds = (grid[some] == expert[some, None, None]).any(axis=2)
            harm[some] += nearness(holds, self._members)
            harm[some] += np.where(holds, np.inf, 0.0)
        return harm

    def _turns(self, layer: IntArray) -> FloatArray:
        """[rows, dies] with one slot a die all donors do equally well: spread what they load.

        Few loads so far come first, then dies in turn, each layer starting at another one.
        """
        dies = self.layout.dies
        start = layer * dies // len(self.grid)
        return self.burden + (numbers(dies) - start[:, None]) % dies / dies

    def fill(self) -> None:
        """Empty slots take one more copy of the experts that are heaviest a copy."""
        full: BoolArray = np.zeros(self.copies.shape, dtype=bool)
        for _ in range(self.layout.dies * self.layout.width + self.copies.shape[1]):
            empty = self.grid == EMPTY
            value = self.loads / np.maximum(self.copies, 1)
            value[full | (self.copies >= self.layout.dies)] = -1.0
            expert = value.argmax(axis=1)
            rows = numbers(len(value))
            layer = np.flatnonzero(empty.any(axis=(1, 2)) & (value[rows, expert] >= 0))
            if not len(layer):
                return
            chosen = expert[layer]
            holds = (self.grid[layer] == chosen[:, None, None]).any(axis=2)
            fits = (empty[layer].any(axis=2) & ~holds).any(axis=1)
            full[layer[~fits], chosen[~fits]] = True
            layer, chosen = layer[fits], chosen[fits]
            # What fills an empty slot takes none from others: all that is there is needed.
            self.needed[layer] = np.maximum(self.needed[layer], self.copies[layer])
            self.price[layer, :-2] = np.inf
            self._place(layer, chosen)


def _needed(loads: FloatArray, layout: Layout, before: IntArray) -> IntArray:
    """[layers, experts] the fewest copies with which no copy is heavier than it must be.

    With one slot a die the heaviest copy is the slowest die. With more slots a copy may be as
    heavy as the heaviest one was before, if that is less than a die carries anyway.
    """
    if layout.host_slots < loads.shape[1]:
        return np.ones(loads.shape, dtype=np.int64)
    heaviest = heaviest_copy(loads, layout.host_slots, layout.dies)
    if layout.width > 1:
        was = copy_loads(loads, count_copies(before, loads.shape[1])).max(axis=1)
        heaviest = np.maximum(heaviest, np.minimum(was, loads.sum(axis=1) / layout.dies))
    heaviest = heaviest[:, None] * _ROUNDING
    needed = np.divide(loads, heaviest, out=np.ones(loads.shape), where=heaviest > 0)
    return np.maximum(np.ceil(needed), 1).astype(np.int64)


def _improve(
    grid: IntArray,
    old: IntArray,
    loads: FloatArray,
    layout: Layout,
    swaps: int | None,
    rows: IntArray,
    slots: int,
) -> None:
    """Exchanges in these layers; `grid` is changed in place. `slots` are those of all layers."""
    copies = count_copies(grid, loads.shape[1])
    weight = loads_of_slots(grid, copy_loads(loads, copies))
    work = Working.of(grid, weight, copies, layout)
    bound = least_times(loads, layout) * _ROUNDING
    allowed = int(LOADS_SHARE_MAX * slots)
    # Each exchange loads two experts at most. Copies that came to share an NPU are parted first.
    rounds = (allowed - _count_loads(old, grid)) // (2 * len(rows)) if swaps is None else swaps
    left = rows.astype(np.int64)
    turn = part_copies(work, left, LEVELS_ALWAYS_APART, min(rounds, ROUNDS_MAX))
    while len(left) and (swaps is None or turn < swaps):
        left = left[(work.carried[left] / layout.speeds).max(axis=1) > bound[left]]
        chosen = left
        if swaps is None:
            exchanges = (allowed - _count_loads(old, grid)) // 2
            chosen = _worst_layers(balance_of_layers(work.carried, layout), left, exchanges)
            if not len(chosen):
                break
        done = exchange_best(work, chosen, old)
        left = np.setdiff1d(left, chosen[~done])
        turn += 1
    if swaps is None:
        _part_for_free(work, rows, (allowed - _count_loads(old, grid)) // 2)


def _part_for_free(work: Working, rows: IntArray, exchanges: int) -> None:
    """Bring copies on different nodes and racks too, where that costs no balance."""
    some = rows[: max(exchanges, 0)]
    if not len(some):
        return
    kept, before = work.grid.copy(), balance_of_layers(work.carried, work.layout)
    part_copies(work, some, len(work.layout.domains), min(exchanges // len(some), ROUNDS_MAX))
    worse = balance_of_layers(work.carried, work.layout) * _ROUNDING < before
    work.grid[worse] = kept[worse]


def _worst_layers(balance: FloatArray, left: IntArray, most: int) -> IntArray:
    """Layers to improve next: the worst of those below the goal, else of all; none if it is met."""
    if balance.mean() >= BALANCE_GOAL:
        return left[:0]
    behind = left[balance[left] < BALANCE_GOAL]
    chosen = behind if len(behind) else left
    order = np.argsort(balance[chosen], kind="stable")[: max(most, 0)]
    return np.sort(chosen[order])


def _count_loads(old: IntArray, grid: IntArray) -> int:
    """Experts on dies that did not have them; where on the die does not matter."""
    layer, die, place = np.nonzero((grid != old) & (grid >= 0))
    had = (old[layer, die] == grid[layer, die, place][:, None]).any(axis=1)
    return int(np.count_nonzero(~had))
