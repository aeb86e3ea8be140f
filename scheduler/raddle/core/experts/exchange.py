"""Exchanges of two experts between two dies that make the slowest die faster.

Loads of copies do not change when two experts swap places, so an exchange is judged by two dies
alone. `even_out` changes many pairs of dies at once and is for new maps, where moves cost nothing;
`exchange_best` takes the best single exchange a layer and is for maps in service.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.layout import NO_SLOT, BoolArray, FloatArray, IntArray, Layout, numbers
from raddle.core.experts.places import Places

_TINY = 1e-12
# Rounds of pairs: most layers need 3 to 6, those whose copies hinder each other up to 20.
_ROUNDS_MAX = 24
# The slowest die may exchange with so many of the fastest, more if dies have few slots: about
# so many exchanges a layer are compared.
_PARTNERS_MIN = 12
_CANDIDATES = 1_000
# A smaller share of the slowest die's time is noise.
_LEAST_GAIN = 1e-9
# An exchange of two experts that are loaded anyway costs nothing, but is not endlessly good.
_OVERHEAD = 0.35
# A layer whose slowest die got no faster in so many rounds is left alone.
_PATIENCE = 3


@dataclass(slots=True)
class Working:
    """Maps under change: all arrays are changed in place and agree with each other."""

    #: [layers, dies, width]
    grid: IntArray
    #: The load of each slot, in the shape of the grid.
    weight: FloatArray
    #: [layers, dies]
    carried: FloatArray
    #: [layers, experts + 2] has the expert a second copy? No expert (-1) has none.
    shared: BoolArray
    places: Places
    layout: Layout

    @staticmethod
    def of(grid: IntArray, weight: FloatArray, copies: IntArray, layout: Layout) -> Working:
        layers, experts = copies.shape
        shared = np.zeros((layers, experts + 2), dtype=bool)
        shared[:, :-2] = copies > 1
        layer, die, place = np.nonzero(shared[numbers(layers)[:, None, None], grid])
        pair = layer * experts + grid[layer, die, place]
        places = Places.of(pair, die, copies, layout.domains)
        return Working(grid, weight, weight.sum(axis=2), shared, places, layout)

    def swap(
        self, layer: IntArray, a: tuple[IntArray, IntArray], b: tuple[IntArray, IntArray]
    ) -> None:
        """Exchange slots a and b, each (dies, places), one exchange a row.

        No die of a layer and no expert with copies is in two of them.
        """
        here, there = (layer, *a), (layer, *b)
        for array in (self.grid, self.weight):
            kept = array[here]
            array[here] = array[there]
            array[there] = kept
        gained = self.weight[here] - self.weight[there]
        self.carried[layer, a[0]] += gained
        self.carried[layer, b[0]] -= gained
        for came, origin, target in ((self.grid[here], b[0], a[0]), (self.grid[there], a[0], b[0])):
            moved = self.shared[layer, came]
            pair = self.pairs(layer[moved], came[moved])
            self.places.move(pair, origin[moved], target[moved])

    def pairs(self, layer: IntArray, expert: IntArray) -> IntArray:
        experts = self.shared.shape[1] - 2
        return np.asarray(layer * experts + expert)

    def apart(
        self, layer: IntArray, expert: IntArray, origin: IntArray, target: IntArray
    ) -> IntArray:
        """How much farther from its other copies an expert comes by going from die to die.

        Negative: it would share what it does not share now. All arrays broadcast.
        """
        layer, expert, origin, target = np.broadcast_arrays(layer, expert, origin, target)
        found: IntArray = np.zeros(layer.shape, dtype=np.int64)
        at = self.shared[layer, expert]
        pair = self.pairs(layer[at], expert[at])
        found[at] = self.places.gain(pair, origin[at], target[at])
        return found

    def may_move(self, layer: IntArray, origin: IntArray, target: IntArray) -> BoolArray:
        """[..., width] may each slot's expert go from die to die, no closer to its copies?"""
        expert = self.grid[layer, origin]
        fine: BoolArray = (
            np.ones(expert.shape, dtype=bool) if self.layout.is_even else expert != NO_SLOT
        )
        at = np.nonzero(self.shared[layer[..., None], expert])
        row = at[:-1]
        pair = self.pairs(layer[row], expert[at])
        fine[at] = self.places.gain(pair, origin[row], target[row]) >= 0
        return fine


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

    Copies of one expert come no closer to each other, and none is in two exchanges of a round.
    """
    row, speeds = layers[:, None], work.layout.speeds
    slow_load, fast_load = work.carried[row, slow], work.carried[row, fast]
    wanted = (slow_load * speeds[fast] - fast_load * speeds[slow]) / (speeds[fast] + speeds[slow])
    row = np.broadcast_to(row, slow.shape)
    # What must not move is infinitely far from any wish.
    slow_weight = np.where(work.may_move(row, slow, fast), work.weight[row, slow], np.inf)
    fast_weight = np.where(work.may_move(row, fast, slow), work.weight[row, fast], -np.inf)
    best, miss = _closest(slow_weight, fast_weight, wanted)
    at, pair = np.nonzero(miss < wanted - _TINY)
    at_slow, at_fast = divided(best[at, pair], work.grid.shape[2])
    layer, here, there = layers[at], slow[at, pair], fast[at, pair]
    once = _once(work, layer, work.grid[layer, here, at_slow], work.grid[layer, there, at_fast])
    layer, here, there = layer[once], here[once], there[once]
    work.swap(layer, (here, at_slow[once]), (there, at_fast[once]))


def _once(work: Working, layer: IntArray, one: IntArray, other: IntArray) -> BoolArray:
    """[exchanges] is each the first of its layer with these experts? Those without copies are."""
    number = numbers(len(layer))
    first = np.full(work.shared.shape, len(layer))
    for expert in (one, other):
        np.minimum.at(first, (layer, expert), number)
    fine: BoolArray = np.ones(len(layer), dtype=bool)
    for expert in (one, other):
        fine &= (first[layer, expert] == number) | ~work.shared[layer, expert]
    return fine


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
    order = np.argsort(work.carried[layers] / work.layout.speeds, axis=1, kind="stable")
    slow, fast = order[:, -1], order[:, : min(partners, order.shape[1] - 1)]
    worth = _worth(work, layers, slow, fast, old)
    flat = worth.reshape(len(layers), -1)
    best = flat.argmax(axis=1)
    done: BoolArray = flat[numbers(len(layers)), best] > 0
    place, rest = divided(best[done], worth[0, 0].size)
    partner, other = divided(rest, work.layout.width)
    work.swap(layers[done], (slow[done], place), (fast[done, partner], other))
    return done


def _worth(
    work: Working, layers: IntArray, slow: IntArray, fast: IntArray, old: IntArray
) -> FloatArray:
    """[layers, own places, fast dies, places] time gained a load.

    0 is no improvement, or one that would bring copies of an expert closer to each other.
    """
    speeds, row = work.layout.speeds, np.broadcast_to(layers[:, None], fast.shape)
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
    away = work.may_move(row, np.broadcast_to(slow[:, None], fast.shape), fast)
    worth *= away.transpose(0, 2, 1)[..., None]
    worth *= work.may_move(row, fast, np.broadcast_to(slow[:, None], fast.shape))[:, None]
    return worth
