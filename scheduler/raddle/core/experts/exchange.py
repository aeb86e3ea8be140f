"""Exchanges of two experts between two dies that make the slowest die faster.

Loads of copies do not change when two experts swap places, so an exchange is judged by two dies
alone. `even_out` changes many pairs of dies at once and is for new maps, where moves cost nothing;
`exchange_best` takes the best single exchange a layer and is for maps in service. `part_copies`
exchanges until no copies share a domain that they could avoid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.layout import NO_SLOT, BoolArray, FloatArray, IntArray, Layout, numbers

_TINY = 1e-12
# Rounds of pairs: loads halve their distance to the mean in each, so 12 are plenty.
_ROUNDS_MAX = 12
# The best exchanges of a layer that are looked at until one keeps copies apart.
_TRIES = 16
# The slowest die may exchange with so many of the fastest, more if dies have few slots: about
# so many exchanges a layer are compared.
_PARTNERS_MIN = 12
_CANDIDATES = 1_000
# A smaller share of the slowest die's time is noise.
_LEAST_GAIN = 1e-9
# An exchange of two experts that are loaded anyway costs nothing, but is not endlessly good.
_OVERHEAD = 0.5
# A layer whose slowest die got no faster in so many rounds is left alone.
_PATIENCE = 4


@dataclass(slots=True)
class Working:
    """Maps under change: all arrays are changed in place and agree with each other."""

    #: [layers, dies, width]
    grid: IntArray
    #: The load of each slot, in the shape of the grid.
    weight: FloatArray
    #: [layers, dies]
    carried: FloatArray
    #: [layers, experts + 2] expert (or no expert) without a second copy: it may go anywhere.
    single: BoolArray
    layout: Layout
    closeness: FloatArray

    @staticmethod
    def of(grid: IntArray, weight: FloatArray, copies: IntArray, layout: Layout) -> Working:
        single = np.ones((copies.shape[0], copies.shape[1] + 2), dtype=bool)
        single[:, :-2] = copies <= 1
        single[:, NO_SLOT] = False
        return Working(grid, weight, weight.sum(axis=2), single, layout, layout.closeness())

    def swap(
        self, layer: IntArray, a: tuple[IntArray, IntArray], b: tuple[IntArray, IntArray]
    ) -> None:
        """Exchange slots a and b, each (dies, places), one exchange a row; no die twice a layer."""
        here, there = (layer, *a), (layer, *b)
        for array in (self.grid, self.weight):
            kept = array[here]
            array[here] = array[there]
            array[there] = kept
        gained = self.weight[here] - self.weight[there]
        self.carried[layer, a[0]] += gained
        self.carried[layer, b[0]] -= gained

    def parts_worse(
        self, layer: IntArray, expert: IntArray, origin: IntArray, target: IntArray
    ) -> FloatArray:
        """How much closer to its other copies each expert comes by going from die to die."""
        rows = numbers(len(layer))
        holds = (self.grid[layer] == expert[:, None, None]).any(axis=2).astype(np.float64)
        holds[rows, origin] = 0.0
        closer = self.closeness[target] - self.closeness[origin]
        found = np.einsum("ij,ij->i", holds, closer)
        # No expert is never close to anything.
        return np.where(expert >= 0, found, 0.0)


def even_out(work: Working, goal: FloatArray) -> None:
    """Exchange between the slowest and the fastest dies, pairwise, until layers meet their goal.

    Args:
        goal: [layers] times of the slowest die that are good enough.
    """
    active = numbers(len(work.grid))
    best = np.full(len(active), np.inf)
    stalled = np.zeros(len(active), dtype=np.int64)
    pairs = work.layout.dies // 2
    if not pairs:
        return
    for turn in range(_ROUNDS_MAX):
        times = work.carried[active] / work.layout.speeds
        slowest = times.max(axis=1)
        stalled[active] = np.where(slowest < best[active] * (1 - 1e-4), 0, stalled[active] + 1)
        best[active] = np.minimum(best[active], slowest)
        keep = (slowest > goal[active]) & (stalled[active] < _PATIENCE)
        active = active[keep]
        if not len(active):
            return
        order = np.argsort(times[keep], axis=1, kind="stable").astype(np.int64)
        slow, fast = order[:, ::-1][:, :pairs], order[:, :pairs]
        # The same pairs again would find the same exchanges, so every round pairs differently.
        _exchange_pairs(work, active, slow, np.roll(fast, turn if turn % 3 else 0, axis=1))


def _exchange_pairs(work: Working, layers: IntArray, slow: IntArray, fast: IntArray) -> None:
    """One exchange in each pair of dies [layers, pairs] that brings both closest to each other.

    Copies of one expert keep away from each other: only the slowest die's pair may exchange an
    expert with copies, and only if these come no closer.
    """
    row, width = layers[:, None], work.grid.shape[2]
    speeds = work.layout.speeds
    slow_load, fast_load = work.carried[row, slow], work.carried[row, fast]
    wanted = (slow_load * speeds[fast] - fast_load * speeds[slow]) / (speeds[fast] + speeds[slow])
    slow_weight, fast_weight = work.weight[row, slow], work.weight[row, fast]
    slow_expert, fast_expert = work.grid[row, slow], work.grid[row, fast]
    # What must not move is infinitely far from any wish.
    if not work.layout.is_even:
        slow_weight[slow_expert == NO_SLOT] = np.inf
        fast_weight[fast_expert == NO_SLOT] = -np.inf
    first, first_miss = _closest(slow_weight[:, :1], fast_weight[:, :1], wanted[:, :1])
    first = first[:, 0]
    taken = _may_part(work, layers, (slow[:, 0], fast[:, 0]), _divided(first, width))
    taken &= first_miss[:, 0] < wanted[:, 0] - _TINY
    free_slow = np.where(work.single[row[..., None], slow_expert], slow_weight, np.inf)
    free_fast = np.where(work.single[row[..., None], fast_expert], fast_weight, -np.inf)
    best, miss = _closest(free_slow, free_fast, wanted)
    better = miss < wanted - _TINY
    best[:, 0] = np.where(taken, first, best[:, 0])
    better[:, 0] |= taken
    layer, pair = np.nonzero(better)
    at_slow, at_fast = _divided(best[layer, pair], width)
    work.swap(layers[layer], (slow[layer, pair], at_slow), (fast[layer, pair], at_fast))


def _closest(one: FloatArray, other: FloatArray, wanted: FloatArray) -> tuple[IntArray, FloatArray]:
    """Flat index [layers, pairs] of the places whose difference is closest to what is wanted."""
    miss = one[..., :, None] - (other + wanted[..., None])[..., None, :]
    np.abs(miss, out=miss)
    flat = miss.reshape(*wanted.shape, -1)
    best = flat.argmin(axis=2)
    return best, np.take_along_axis(flat, best[..., None], 2)[..., 0]


def _divided(flat: IntArray, width: int) -> tuple[IntArray, IntArray]:
    one, other = np.divmod(flat, width)
    return one, other


def _may_part(
    work: Working,
    layers: IntArray,
    dies: tuple[IntArray, IntArray],
    places: tuple[IntArray, IntArray],
) -> BoolArray:
    """Do the copies of the two experts of each exchange come no closer to each other?"""
    one = work.grid[layers, dies[0], places[0]]
    other = work.grid[layers, dies[1], places[1]]
    fine = work.single[layers, one] & work.single[layers, other]
    rest = np.flatnonzero(~fine)
    if len(rest):
        at, (here, there) = layers[rest], (dies[0][rest], dies[1][rest])
        closer = np.maximum(
            work.parts_worse(at, one[rest], here, there),
            work.parts_worse(at, other[rest], there, here),
        )
        fine[rest] = (closer <= 0) & (one[rest] != other[rest])
    return fine


def exchange_best(work: Working, layers: IntArray, old: IntArray) -> BoolArray:
    """The best exchange of each layer's slowest die with any other; tells where there was one.

    The best is the one that gains most time for each expert that it has loaded anew.

    Args:
        layers: which layers.
        old: [layers, dies, width] what is in memory now.
    """
    if not len(layers):
        return np.zeros(0, dtype=bool)
    rows = numbers(len(layers))
    order = np.argsort(work.carried[layers] / work.layout.speeds, axis=1, kind="stable")
    partners = max(_PARTNERS_MIN, _CANDIDATES // work.layout.width**2)
    slow, fast = order[:, -1], order[:, : min(partners, order.shape[1] - 1)]
    worth = _worth(work, layers, slow, fast, old)
    flat = worth.reshape(len(layers), -1)
    done = np.zeros(len(layers), dtype=bool)
    left = rows
    # An exchange that would bring copies together is passed over for the next best one.
    for _ in range(_TRIES):
        best = flat[left].argmax(axis=1)
        better = flat[left, best] > 0
        left, best = left[better], best[better]
        place, rest = _divided(best, worth[0, 0].size)
        partner, other = _divided(rest, work.layout.width)
        at, here, die = layers[left], slow[left], fast[left, partner]
        fine = _may_part(work, at, (here, die), (place, other))
        work.swap(at[fine], (here[fine], place[fine]), (die[fine], other[fine]))
        done[left[fine]] = True
        flat[left, best] = 0.0
        left = left[~fine]
        if not len(left):
            break
    return done


def _worth(
    work: Working, layers: IntArray, slow: IntArray, fast: IntArray, old: IntArray
) -> FloatArray:
    """[layers, own places, fast dies, places] time gained a load; 0 is no improvement."""
    speeds, row = work.layout.speeds, layers[:, None]
    mine, theirs = work.grid[layers, slow], work.grid[row, fast]
    # What the slowest die gets rid of.
    gain = work.weight[layers, slow][:, :, None, None] - work.weight[row, fast][:, None]
    slowest = work.carried[layers, slow] / speeds[slow]
    room = slowest[:, None] - work.carried[row, fast] / speeds[fast]
    worth = room[:, None, :, None] - gain / speeds[fast][:, None, :, None]
    gain /= speeds[slow][:, None, None, None]
    np.minimum(worth, gain, out=worth)
    worth[worth < slowest[:, None, None, None] * _LEAST_GAIN] = 0.0
    loads = (mine == old[layers, slow])[:, :, None, None] + _OVERHEAD
    worth /= loads + (theirs == old[row, fast])[:, None]
    # No expert goes to a die that has it already; empty slots are nobody's double.
    there = theirs[:, None] == mine[:, :, None, None]
    there &= (mine >= 0)[:, :, None, None]
    layer, place, die, other = np.nonzero(there)
    worth[layer, place, die] = 0.0
    worth[layer, :, die, other] = 0.0
    if not work.layout.is_even:
        worth[(theirs == NO_SLOT)[:, None] | (mine == NO_SLOT)[:, :, None, None]] = 0.0
    return worth


def part_copies(work: Working, least: FloatArray, rounds: int) -> None:
    """Exchange until no copies share what they need not, or `rounds` exchanges a layer are done.

    Args:
        least: [layers, experts] what the copies of each expert have in common at best.
    """
    active = numbers(len(work.grid))
    for _ in range(rounds):
        if not len(active):
            return
        near = nearness(work.grid[active], work.closeness, least.shape[1])
        over = near.sum_of_expert - least[active]
        keep = over.max(axis=1) > 0
        if not keep.any():
            return
        moved = _part_one(work, active[keep], near.of_slot[keep], over[keep])
        active = active[keep][moved]


@dataclass(frozen=True, slots=True)
class Nearness:
    """What the copies of experts have in common, for some layers."""

    #: [layers, dies, width]: of each slot with the other copies of its expert.
    of_slot: FloatArray
    #: [layers, experts]: over all pairs of copies, both ways.
    sum_of_expert: FloatArray


def nearness(grid: IntArray, closeness: FloatArray, experts: int) -> Nearness:
    """Measure a grid: each copy against the following ones of the same expert."""
    layers, dies, width = grid.shape
    flat = grid.reshape(layers, -1)
    group = np.where(flat >= 0, flat + numbers(layers)[:, None] * experts, -1).ravel()
    slot = np.argsort(group, kind="stable")
    slot = slot[np.searchsorted(group[slot], 0) :]
    group = group[slot]
    die = slot % (dies * width) // width
    common = np.zeros(len(slot))
    pair = numbers(len(slot) - 1)
    distance = 1
    while len(pair):
        pair = pair[pair + distance < len(slot)]
        pair = pair[group[pair] == group[pair + distance]]
        shared = closeness[die[pair], die[pair + distance]]
        common[pair] += shared
        common[pair + distance] += shared
        distance += 1
    of_slot = np.zeros(layers * dies * width)
    of_slot[slot] = common
    sums: FloatArray = np.bincount(group, common, minlength=layers * experts).astype(np.float64)
    return Nearness(of_slot.reshape(grid.shape), sums.reshape(layers, experts))


def _part_one(work: Working, layers: IntArray, of_slot: FloatArray, over: FloatArray) -> BoolArray:
    """Move the copy that is closest to its siblings; tells in which layers that was possible."""
    rows = numbers(len(layers))
    grid = work.grid[layers]
    width = grid.shape[2]
    flat = grid.reshape(len(rows), -1)
    some = np.maximum(flat, 0)
    closest = np.where(np.take_along_axis(over, some, 1) > 0, of_slot.reshape(flat.shape), -1.0)
    closest[flat < 0] = -1.0
    here, place = _divided(closest.argmax(axis=1), width)
    expert = grid[rows, here, place]
    near_here = work.closeness[here]
    # What the expert would share at each die, and each other expert here, without the own copy.
    holds = (grid == expert[:, None, None]).any(axis=2)
    away = holds.astype(np.float64) @ work.closeness - near_here
    here_of_slot = np.repeat(near_here, width, axis=1)
    index = (some + rows[:, None] * over.shape[1]).ravel()
    sums = np.bincount(index, np.where(flat >= 0, here_of_slot, 0.0).ravel(), minlength=over.size)
    back = np.where(flat >= 0, sums[index].reshape(flat.shape) - here_of_slot, 0.0)
    mine = of_slot[rows, here, place][:, None]
    change = np.repeat(away, width, axis=1) - mine + back - of_slot.reshape(flat.shape)
    change[(flat == NO_SLOT) | (flat == expert[:, None])] = np.inf
    change.reshape(grid.shape)[rows, here] = np.inf
    most = change.min(axis=1)
    # Of those that part as far as it matters, the one that shifts the least load.
    shift = np.abs(
        work.weight[layers, here, place][:, None] - work.weight[layers].reshape(flat.shape)
    )
    shift[change > most[:, None] / 2] = np.inf
    there, place_there = _divided(shift.argmin(axis=1), width)
    good: BoolArray = most < 0
    work.swap(layers[good], (here[good], place[good]), (there[good], place_there[good]))
    return good
