"""How many copies each expert gets, so that the heaviest copy is as light as it can be.

The next copy always goes to the expert whose load a copy is highest (optimal for the heaviest
copy: it is the highest-averages method). An expert's k-th extra copy has the priority load / k,
so the extra copies are the highest of these numbers and no loop is needed. Only the R heaviest
experts can get any of R extra copies, and the i-th heaviest at most R / i: R ln R numbers a layer.
"""

from __future__ import annotations

import numpy as np

from raddle.core.experts.layout import FloatArray, IntArray, numbers


def by_load(loads: FloatArray) -> IntArray:
    """Experts [layers, experts], heaviest first, equal ones by index."""
    return np.argsort(-loads, axis=1, kind="stable").astype(np.int64)


def copies_of_sorted(heavy: FloatArray, slots: int, dies: int, power: float = 1.0) -> IntArray:
    """Copies [layers, experts] of experts in descending order of load.

    Args:
        heavy: loads [layers, experts], each layer descending.
        slots: copies to hand out, at least one an expert; at most `dies` an expert are.
        power: above 1, experts with many copies get fewer of the next ones: the copies are then
            of more different weights, which pack better where dies have few slots.
    """
    layers, experts = heavy.shape
    copies: IntArray = np.ones((layers, experts), dtype=np.int64)
    extra = min(slots, experts * dies) - experts
    if extra <= 0:
        return copies
    expert, number = _candidates(min(extra, experts), extra, dies - 1)
    value = heavy[:, expert] / (number if power == 1.0 else number**power)
    least = np.partition(value, -extra, axis=1)[:, -extra, None]
    above = value > least
    tied = value == least
    room = extra - np.count_nonzero(above, axis=1)[:, None]
    chosen = above | (tied & (np.cumsum(tied, axis=1) <= room))
    layer, place = np.nonzero(chosen)
    flat = layer * experts + expert[place]
    copies += np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    return copies


def _candidates(experts: int, extra: int, copies_max: int) -> tuple[IntArray, IntArray]:
    """(expert, number of the extra copy) that may be among the highest; low numbers first."""
    most = np.minimum(extra // np.arange(1, experts + 1), copies_max)
    number, expert = np.nonzero(np.arange(1, int(most.max()) + 1)[:, None] <= most)
    return expert.astype(np.int64), number.astype(np.int64) + 1


def heaviest_copy(loads: FloatArray, slots: int, dies: int) -> FloatArray:
    """[layers] load of the heaviest copy with the best counts for so many slots."""
    heavy = -np.sort(-loads, axis=1)
    return np.asarray((heavy / copies_of_sorted(heavy, slots, dies)).max(axis=1))


def count_copies(grid: IntArray, experts: int) -> IntArray:
    """Copies [layers, experts] of a grid or table whose first axis is the layer."""
    layers = len(grid)
    flat = grid.reshape(layers, -1)
    held = flat >= 0
    index = (flat + numbers(layers)[:, None] * experts)[held]
    return np.bincount(index, minlength=layers * experts).reshape(layers, experts)
