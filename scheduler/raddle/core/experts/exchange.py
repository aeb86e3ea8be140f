"""Exchanges of two experts between two dies that make the slowest die faster.

Loads of copies do not change when two experts swap places, so an exchange is judged by two dies
alone. `even_out` changes many pairs of dies at once and is for new maps, where moves cost nothing;
`exchange_best` takes the best single exchange a layer and is for maps in service.
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
_OVERHEAD = 0.35
# So many pairs of dies a round may exchange experts with copies.
_SHARED_PAIRS = 4
# A layer whose slowest die got no faster in so many rounds is left alone.
_PATIENCE = 2


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

    Copies of one expert keep away from each other: only the pairs of the slowest dies may exchange
    experts with copies, each expert once, and only if these come no closer.
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
    few = min(_SHARED_PAIRS, slow.shape[1])
    first, first_miss = _closest(slow_weight[:, :few], fast_weight[:, :few], wanted[:, :few])
    taken = first_miss < wanted[:, :few] - _TINY
    taken &= _may_part_pairs(work, layers, slow[:, :few], fast[:, :few], first)
    free_slow = np.where(work.single[row[..., None], slow_expert], slow_weight, np.inf)
    free_fast = np.where(work.single[row[..., None], fast_expert], fast_weight, -np.inf)
    best, miss = _closest(free_slow, free_fast, wanted)
    better = miss < wanted - _TINY
    best[:, :few] = np.where(taken, first, best[:, :few])
    better[:, :few] |= taken
    layer, pair = np.nonzero(better)
    at_slow, at_fast = divided(best[layer, pair], width)
    work.swap(layers[layer], (slow[layer, pair], at_slow), (fast[layer, pair], at_fast))


def _closest(one: FloatArray, other: FloatArray, wanted: FloatArray) -> tuple[IntArray, FloatArray]:
    """Flat index [layers, pairs] of the places whose difference is closest to what is wanted."""
    miss = one[..., :, None] - (other + wanted[..., None])[..., None, :]
    np.abs(miss, out=miss)
    flat = miss.reshape(*wanted.shape, -1)
    best = flat.argmin(axis=2)
    return best, np.take_along_axis(flat, best[..., None], 2)[..., 0]


def divided(flat: IntArray, width: int) -> tuple[IntArray, IntArray]:
    one, other = np.divmod(flat, width)
    return one, other


def _may_part_pairs(
    work: Working, layers: IntArray, slow: IntArray, fast: IntArray, best: IntArray
) -> BoolArray:
    """`_may_part` for some pairs of each layer, no expert with copies in two of them."""
    pairs = slow.shape[1]
    row = np.repeat(layers, pairs)
    here, there = slow.ravel(), fast.ravel()
    places = divided(best.ravel(), work.grid.shape[2])
    fine = _may_part(work, row, (here, there), places).reshape(slow.shape)
    one = work.grid[row, here, places[0]].reshape(slow.shape)
    other = work.grid[row, there, places[1]].reshape(slow.shape)
    for pair in range(1, pairs):
        earlier = np.concatenate([one[:, :pair], other[:, :pair]], axis=1)
        again = (earlier == one[:, pair, None]) | (earlier == other[:, pair, None])
        fine[:, pair] &= ~again.any(axis=1)
    return fine


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
    done = _exchange_with(work, layers, old, max(_PARTNERS_MIN, _CANDIDATES // old.shape[2] ** 2))
    # The fastest dies are nearly always enough; before a layer is given up all are tried.
    done[~done] = _exchange_with(work, layers[~done], old, work.layout.dies)
    return done


def _exchange_with(work: Working, layers: IntArray, old: IntArray, partners: int) -> BoolArray:
    """The same with so many of the fastest dies."""
    if not len(layers):
        return np.zeros(0, dtype=bool)
    rows = numbers(len(layers))
    order = np.argsort(work.carried[layers] / work.layout.speeds, axis=1, kind="stable")
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
        place, rest = divided(best, worth[0, 0].size)
        partner, other = divided(rest, work.layout.width)
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
