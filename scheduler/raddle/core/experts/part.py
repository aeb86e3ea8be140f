"""Exchanges that bring the copies of an expert into different failure domains.

In go maps whose copies may share a die, an NPU, a node or a rack although there are members enough
for all of them; out come maps in which as few as possible do, with little change of the dies'
loads. Sharing a narrow level outweighs any number of copies that share only wider ones.
"""

from __future__ import annotations

import numpy as np

from raddle.core.experts.exchange import Working, divided
from raddle.core.experts.layout import EMPTY, BoolArray, IntArray, numbers
from raddle.core.experts.places import LEVEL_BASE

# Exchanges a layer: more were not needed at 384 slots, and each costs some load.
ROUNDS_MAX = 64
# Dies and NPUs: an NPU fails often enough that its two dies never hold the same expert.
LEVELS_ALWAYS_APART = 2


def part_copies(work: Working, layers: IntArray, levels: int, rounds: int = ROUNDS_MAX) -> int:
    """Exchange until no copies share what they need not; gives the exchanges a layer, at most.

    Args:
        layers: which layers.
        levels: so many of the narrowest levels count.
        rounds: exchanges a layer that are allowed.
    """
    levels = min(levels, len(work.places.levels))
    least = LEVEL_BASE ** (len(work.places.levels) - levels)
    active = layers
    for done in range(rounds):
        shared = work.places.sharing(levels)[active]
        keep = shared.max(axis=1) > 0
        active, expert = active[keep], shared[keep].argmax(axis=1)
        if not len(active):
            return done
        active = active[_part_one(work, active, expert, least)]
    return max(rounds, 0)


def _part_one(work: Working, layers: IntArray, expert: IntArray, least: int) -> BoolArray:
    """Move the copy of each layer's expert that shares most; tells where `least` was gained."""
    rows = numbers(len(layers))
    grid = work.grid[layers]
    width = grid.shape[2]
    flat = grid.reshape(len(rows), -1)
    die = np.repeat(numbers(work.layout.dies), width)
    crowded = work.places.crowded(work.pairs(layers, expert))
    closest = np.where(flat == expert[:, None], np.repeat(crowded, width, axis=1), -1)
    here, place = divided(closest.argmax(axis=1), width)
    row = layers[:, None]
    mine = work.apart(row, expert[:, None], here[:, None], numbers(work.layout.dies)[None, :])
    gained = work.apart(row, flat, die[None, :], here[:, None])
    gained += np.repeat(mine, width, axis=1)
    gained[(flat < EMPTY) | (flat == expert[:, None])] = 0
    most = gained.max(axis=1)
    # Of those that part as far as it matters, the one that shifts the least load.
    own = work.weight[layers, here, place][:, None]
    shift = np.abs(own - work.weight[layers].reshape(flat.shape))
    shift[gained * 2 < most[:, None]] = np.inf
    there, place_there = divided(shift.argmin(axis=1), width)
    good: BoolArray = most * 2 > least
    work.swap(layers[good], (here[good], place[good]), (there[good], place_there[good]))
    return good
