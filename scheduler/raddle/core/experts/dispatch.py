"""How to split each expert's load over its copies, for a map that is given.

`dispatch_weights` minimises the time of the slowest die. Proportional steps: a copy on a busy die
gives share to its siblings on idle ones; the split with the fastest slowest die so far is kept. A
step that makes the slowest die slower went too far: the next ones of that layer are weaker.
`replica_order` serves engines that take only an order of copies.
"""

from __future__ import annotations

import numpy as np

from raddle.core.experts.balance import copy_loads, loads_of_slots
from raddle.core.experts.copies import count_copies
from raddle.core.experts.layout import FloatArray, IntArray, Layout, numbers

# Steps of this strength at first; where they swing they get weaker, else stronger again.
_STEPS = 120
_EXPONENT = 2.0
_WEAKER, _STRONGER = 0.7, 1.05
# The pull of an idle die to this power is still a number.
_EXPONENT_MAX = 200.0
# A die that is idle pulls no more than one with this share of the slowest die's time.
_IDLE = 0.05
_LEAST = 1e-12
_GOOD_ENOUGH = 1.002


def dispatch_weights(
    table: IntArray, loads: FloatArray, layout: Layout, *, steps: int = _STEPS
) -> FloatArray:
    """Share of its expert's load that each slot takes [layers, slots]; 0 for an empty one."""
    layers, experts = loads.shape
    rows = numbers(layers)[:, None]
    held = (table >= 0).ravel()
    die_at = (layout.slot_die + rows * layout.dies).ravel()
    expert_at = (np.maximum(table, 0) + rows * experts).ravel()
    load = np.where(held, loads.ravel()[expert_at], 0.0)
    equal = copy_loads(np.ones(loads.shape), count_copies(table, experts))
    share = loads_of_slots(table, equal).ravel()
    best, least = share, np.full(layers, np.inf)
    # Slots of dies that host nothing carry nothing: their speed does not matter.
    speeds = np.tile(layout.speeds, layers)
    goal = loads.sum(axis=1) / layout.speeds[layout.hosts].sum() * _GOOD_ENOUGH
    exponent, last = np.full(layers, _EXPONENT), np.full(layers, np.inf)
    for _ in range(steps + 1):
        time = np.bincount(die_at, share * load, minlength=layers * layout.dies) / speeds
        slowest = time.reshape(layers, -1).max(axis=1)
        better = slowest < least
        least = np.where(better, slowest, least)
        best = np.where(np.repeat(better, table.shape[1]), share, best)
        if (least <= goal).all():
            break
        exponent *= np.where(slowest < last, _STRONGER, _WEAKER)
        exponent = np.minimum(exponent, _EXPONENT_MAX)
        last = slowest
        scale = np.repeat(np.maximum(slowest, _LEAST), layout.dies)
        pull = np.maximum(time / scale, _IDLE) ** -np.repeat(exponent, layout.dies)
        share = np.where(held, share * pull[die_at], 0.0)
        total = np.bincount(expert_at, share, minlength=loads.size)
        share = share / np.maximum(total[expert_at], _LEAST)
    return best.reshape(table.shape)


def replica_order(table: IntArray, experts: int, layout: Layout) -> IntArray:
    """Slots of each expert's copies [layers, experts, most copies], -1 after the last.

    Engines that take an order let the c-th of n equal runs of ranks use the c-th copy. Ranks
    follow the machine, so copies in the order of racks, nodes, NPUs and dies serve the runs that
    are closest to them.
    """
    place = np.lexsort(layout.domains)
    rank_of_die = np.empty(layout.dies, dtype=np.int64)
    rank_of_die[place] = np.arange(layout.dies)
    layer, slot = np.nonzero(table >= 0)
    pair = layer * experts + table[layer, slot]
    order = np.lexsort((slot, rank_of_die[layout.slot_die[slot]], pair))
    pair, slot = pair[order], slot[order]
    number = np.arange(len(pair)) - np.searchsorted(pair, pair, side="left")
    most = int(number.max(initial=-1)) + 1
    found = np.full((len(table) * experts, most), -1, dtype=np.int64)
    found[pair, number] = slot
    return found.reshape(len(table), experts, most)
