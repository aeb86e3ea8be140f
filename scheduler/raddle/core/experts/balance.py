"""What a map asks of each die, how even that is, and how even it could be.

Copies of an expert share its load equally. Time of a die = its load / its speed; the layer takes
as long as its slowest die.
"""

from __future__ import annotations

import numpy as np

from raddle.core.experts.copies import count_copies, heaviest_copy
from raddle.core.experts.layout import FloatArray, IntArray, Layout, numbers


def copy_loads(loads: FloatArray, copies: IntArray) -> FloatArray:
    """Load of one copy [layers, experts + 2]; the last two columns answer -1 and -2 with 0."""
    shared = np.zeros((loads.shape[0], loads.shape[1] + 2))
    np.divide(loads, copies, out=shared[:, :-2], where=copies > 0)
    return shared


def slot_indices(grid: IntArray, columns: int) -> IntArray:
    """Where each slot's expert is in a flat [layers, columns], in the shape of the grid."""
    # -1 and -2 count from the end of their own layer.
    index: IntArray = np.where(grid < 0, grid + columns, grid)
    index += (numbers(len(grid)) * columns).reshape(-1, *[1] * (grid.ndim - 1))
    return index


def loads_of_slots(grid: IntArray, shared: FloatArray) -> FloatArray:
    """Load of each slot, in the shape of the grid."""
    return shared.ravel()[slot_indices(grid, shared.shape[1])]


def die_loads(table: IntArray, loads: FloatArray, layout: Layout) -> FloatArray:
    """[layers, dies] under equal split."""
    shared = copy_loads(loads, count_copies(table, loads.shape[1]))
    grid = layout.to_grid(table)
    return np.asarray(loads_of_slots(grid, shared).sum(axis=2))


def balance_of_layers(carried: FloatArray, layout: Layout) -> FloatArray:
    """[layers]: mean / max time over the hosts; 1 where nothing is carried."""
    speeds = layout.speeds[layout.hosts]
    times = carried[:, layout.hosts] / speeds
    slowest = times.max(axis=1, initial=0.0)
    even = carried[:, layout.hosts].sum(axis=1) / max(float(speeds.sum()), 1e-300)
    found = np.ones(len(even))
    np.divide(even, slowest, out=found, where=slowest > 0)
    return found


def balancedness(table: IntArray, loads: FloatArray, layout: Layout) -> float:
    """Mean over the layers of mean / max time of the hosts."""
    return float(balance_of_layers(die_loads(table, loads, layout), layout).mean())


def least_times(loads: FloatArray, layout: Layout) -> FloatArray:
    """[layers]: no map on the hosts' slots can make the slowest die faster than this.

    The mean over all hosts, and the heaviest copy with the best counts on the fastest die. Exact
    for one slot a die of one speed.
    """
    speeds = layout.speeds[layout.hosts]
    even: FloatArray = loads.sum(axis=1) / speeds.sum()
    slots, dies = layout.host_slots, len(speeds)
    if slots < loads.shape[1]:
        return even
    heaviest: FloatArray = heaviest_copy(loads, slots, dies) / speeds.max()
    return np.maximum(even, heaviest)


def best_balancedness(loads: FloatArray, layout: Layout) -> float:
    """No map on the hosts' slots is more balanced than this, averaged over the layers."""
    even = loads.sum(axis=1) / layout.speeds[layout.hosts].sum()
    least = least_times(loads, layout)
    return float(np.divide(even, least, out=np.ones(len(even)), where=least > 0).mean())
