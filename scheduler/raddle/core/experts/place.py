"""The expert map of a new instance, from its loads: as even as can be, and safe.

Copies are counted for the heaviest copy (`copies`), laid out row by row (a row is one slot of each
die), evened out by exchanges, and kept apart: never two copies of an expert on a die, and in
different NPUs, nodes and racks while the counts allow. Equal choices go to the lowest index.

With many slots a die, experts with copies come first, in an order of dies whose runs differ in all
domains; the others fill each row, the heaviest to the least loaded die. Layers that do not come
close to their bound are tried with other counts. With few slots a die the rows are folded, heaviest
copy with lightest (best possible for two), back and forth in that order of dies; there the counts
decide, so several ways to count are compared first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from raddle.core.experts.balance import copy_loads, loads_of_slots
from raddle.core.experts.copies import by_load, copies_of_sorted, count_copies
from raddle.core.experts.exchange import Working, even_out, exchange_best
from raddle.core.experts.layout import EMPTY, NO_SLOT, FloatArray, IntArray, Layout, numbers
from raddle.core.experts.part import LEVELS_ALWAYS_APART, part_copies
from raddle.model.errors import PermanentError, Reason

# Good enough: within this of the best possible time of the slowest die.
_GOAL = 0.996
# A layer that is this close to what it could be is not tried with other counts; one that is not
# gives up spread over racks and nodes for balance.
_GOOD_ENOUGH = 0.992
# From here on packing is easy whatever the weights of the copies.
FEW_SLOTS_MAX = 4
# Exchanges a layer for the sake of slow dies.
_SINGLE_EXCHANGES_MAX = 48
# Powers of the counts that are tried (see `copies_of_sorted`), with few slots a die and with many.
_POWERS_FEW = (1.05, 1.1, 1.2, 1.35)
_POWERS_MANY = (1.1, 1.2, 1.3, 1.4, 1.5, 1.6)


def place_experts(loads: FloatArray, layout: Layout) -> IntArray:
    """A map [layers, slots] for loads [layers, experts] (any unit).

    Raises:
        PermanentError: DOES_NOT_FIT if the hosts have fewer slots than there are experts.
    """
    hosts = layout.host_order()
    inner = layout.only(hosts)
    if layout.host_slots < loads.shape[1]:
        raise PermanentError(
            Reason.DOES_NOT_FIT,
            f"{loads.shape[1]} experts do not fit into {layout.host_slots} slots of"
            f" {inner.dies} dies: give each die more slots, or take more dies.",
        )
    # More slots than experts are of no use to a die.
    inner = replace(inner, slots=np.minimum(inner.slots, loads.shape[1]))
    grid = layout.to_grid(np.full((len(loads), int(layout.slots.sum())), EMPTY, dtype=np.int64))
    placed = _place(loads, inner)
    grid[:, hosts, : inner.width] = np.where(
        placed == NO_SLOT, grid[:, hosts, : inner.width], placed
    )
    return layout.to_table(grid)


def place_unknown_loads(layers: int, experts: int, layout: Layout) -> IntArray:
    """A map [layers, slots] for loads that nobody has measured yet: all equal, all layers alike.

    Raises:
        PermanentError: as `place_experts`.
    """
    # Dies share a domain or they don't: its number has no say. So many instances, one map.
    same = np.stack([np.unique(row, return_inverse=True)[1].reshape(-1) for row in layout.domains])
    key = (experts, same.shape, same.astype(np.int64).tobytes(), layout.slots.tobytes())
    row = _row_of_equal_loads(*key, layout.hosts.tobytes(), layout.speeds.tobytes())
    return np.tile(row, (layers, 1))


@lru_cache(maxsize=256)
def _row_of_equal_loads(
    experts: int, shape: tuple[int, ...], domains: bytes, slots: bytes, hosts: bytes, speeds: bytes
) -> IntArray:
    layout = Layout.of(
        np.frombuffer(domains, dtype=np.int64).reshape(shape),
        np.frombuffer(slots, dtype=np.int64),
        hosts=np.frombuffer(hosts, dtype=bool),
        speeds=np.frombuffer(speeds, dtype=np.float64),
    )
    return place_experts(np.ones((1, experts)), layout)


@dataclass(frozen=True, slots=True)
class _Queue:
    """Copies in the order of placing."""

    #: [layers, copies] -1 where no further copy can be told apart.
    expert: IntArray
    weight: FloatArray
    #: [layers] copies at the front whose expert has several.
    shared: IntArray


def _place(loads: FloatArray, layout: Layout) -> IntArray:
    """[layers, dies, width]; all dies are hosts."""
    order = by_load(loads)
    heavy = np.take_along_axis(loads, order, 1)
    few = 1 < layout.width <= FEW_SLOTS_MAX
    if few:
        return _laid_out(order, heavy, _best_counts(heavy, layout), layout)[0]
    counts = copies_of_sorted(heavy, layout.host_slots, layout.dies)
    grid, times = _laid_out(order, heavy, counts, layout)
    if layout.width == 1:
        return grid
    # A few copies, each a good part of what a die carries, may not pack well: other counts may.
    bound = _least(heavy, counts, layout) / _GOOD_ENOUGH
    for power in _POWERS_MANY:
        behind = np.flatnonzero(times > bound)
        if not len(behind):
            break
        some = heavy[behind]
        counts = copies_of_sorted(some, layout.host_slots, layout.dies, power)
        other, reached = _laid_out(order[behind], some, counts, layout)
        better = reached < times[behind]
        grid[behind[better]] = other[better]
        times[behind[better]] = reached[better]
    return grid


def _least(heavy: FloatArray, counts: IntArray, layout: Layout) -> FloatArray:
    """[layers] no map with these counts makes the slowest die faster."""
    even = heavy.sum(axis=1) / layout.speeds.sum()
    heaviest = (heavy / counts).max(axis=1) / layout.speeds.max()
    return np.asarray(np.maximum(even, heaviest))


def _laid_out(
    order: IntArray, heavy: FloatArray, counts: IntArray, layout: Layout
) -> tuple[IntArray, FloatArray]:
    """Grid [layers, dies, width] with these counts, and the time of each layer's slowest die.

    Args:
        order: [layers, experts] experts, heaviest first.
        heavy: [layers, experts] their loads.
        counts: [layers, experts] their copies.
    """
    few = 1 < layout.width <= FEW_SLOTS_MAX
    queue = _queue(order, heavy / counts, counts, layout.host_slots, layout.dies, sort=few)
    grid, weight = _rows(queue, layout, fold=few)
    if layout.width == 1 and _same_speed(layout):
        return grid, weight.max(axis=(1, 2))
    copies, loads = np.empty_like(counts), np.empty_like(heavy)
    np.put_along_axis(copies, order, counts, 1)
    np.put_along_axis(loads, order, heavy, 1)
    goal = folded = _least(heavy, counts, layout) / _GOAL
    work = Working.of(grid, weight, copies, layout)
    if few and _same_speed(layout):
        # Folding is the best that can be done with these counts and two slots a die.
        folded = np.maximum(goal, _slowest(work))
    elif few:
        # As good as dies of one speed that can do as much together.
        heaviest = _heaviest_die(heavy, counts, layout) * layout.dies / layout.speeds.sum()
        folded = np.maximum(goal, heaviest)
    if layout.width == 2 and _same_speed(layout):  # noqa: PLR2004 - two slots
        goal = folded
    if few or not _is_regular(layout):
        part_copies(work, numbers(len(grid)), len(layout.domains))
        work = _without_doubles(work, loads)
    even_out(work, goal)
    # Above all where nodes or racks are of different sizes, keeping copies apart in them may cost
    # more balance than it is worth: first racks don't count any more, then nodes.
    enough = folded / _GOOD_ENOUGH
    for kept in range(len(layout.domains) - 1, LEVELS_ALWAYS_APART - 1, -1):
        if (_slowest(work) <= enough).all():
            break
        del work.places.levels[kept:]
        even_out(work, enough)
    if not _same_speed(layout):
        _serve_slow_dies(work, enough)
    return work.grid, _slowest(work)


def _serve_slow_dies(work: Working, goal: FloatArray) -> None:
    """Exchange between the slowest die and any other until layers meet their goal.

    Exchanges in pairs don't get there: a slow die needs the copies of one certain other die.
    """
    in_memory = np.full_like(work.grid, NO_SLOT)
    left = numbers(len(work.grid))
    for _ in range(_SINGLE_EXCHANGES_MAX):
        left = left[_slowest(work)[left] > goal[left]]
        if not len(left):
            return
        left = left[exchange_best(work, left, in_memory)]


def _slowest(work: Working) -> FloatArray:
    """[layers] time of the slowest die."""
    return np.asarray((work.carried / work.layout.speeds).max(axis=1))


def _is_regular(layout: Layout) -> bool:
    """Are all dies, and all members of each level, of one size? Then runs of dies suffice."""
    sizes = [np.unique(level, return_counts=True)[1] for level in layout.domains]
    return layout.is_even and all((size == size[0]).all() for size in sizes)


def _without_doubles(work: Working, loads: FloatArray) -> Working:
    """Uneven slots may leave no room for so many copies: a second one on a die is left out."""
    order = np.argsort(work.grid, axis=2, kind="stable")
    ordered = np.take_along_axis(work.grid, order, 2)
    double = np.zeros(work.grid.shape, dtype=bool)
    again = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
    if not again.any():
        return work
    np.put_along_axis(double, order[:, :, 1:], again, 2)
    grid = np.where(double, EMPTY, work.grid)
    copies = count_copies(grid, loads.shape[1])
    weight = loads_of_slots(grid, copy_loads(loads, copies))
    return Working.of(grid, weight, copies, work.layout)


def _same_speed(layout: Layout) -> bool:
    return bool((layout.speeds == layout.speeds[0]).all())


def _queue(
    order: IntArray, share: FloatArray, counts: IntArray, slots: int, dies: int, *, sort: bool
) -> _Queue:
    """Copies of the same expert stay side by side."""
    layers = len(order)
    expert = np.repeat(order.ravel(), counts.ravel()).reshape(layers, -1)
    weight = np.repeat(share.ravel(), counts.ravel()).reshape(layers, -1)
    if sort:
        by_weight = np.argsort(-weight, axis=1, kind="stable")
        expert = np.take_along_axis(expert, by_weight, 1)
        weight = np.take_along_axis(weight, by_weight, 1)
        if dies < expert.shape[1]:
            turned = _second_row_first(expert, dies)
            expert = np.take_along_axis(expert, turned, 1)
            weight = np.take_along_axis(weight, turned, 1)
    missing = slots - expert.shape[1]
    if missing:
        expert = np.pad(expert, ((0, 0), (0, missing)), constant_values=EMPTY)
        weight = np.pad(weight, ((0, 0), (0, missing)))
    return _Queue(expert, weight, np.where(counts > 1, counts, 0).sum(axis=1))


def _second_row_first(expert: IntArray, dies: int) -> IntArray:
    """[layers, copies] an order in which the second row does not begin on its own dies.

    It is folded back over the end of the first row: copies of an expert that fills this end and
    goes on would come to the same dies, so as many others go before them.
    """
    place = numbers(expert.shape[1])
    split = expert == expert[:, dies - 1, None]
    before = np.count_nonzero(split[:, :dies], axis=1)[:, None]
    after = np.count_nonzero(split[:, dies:], axis=1)[:, None]
    room = np.minimum(before, expert.shape[1] - dies - after)
    found: IntArray = np.broadcast_to(place, expert.shape).copy()
    found += after * ((place >= dies) & (place < dies + room))
    found -= room * ((place >= dies + room) & (place < dies + room + after))
    return found


def _rows(queue: _Queue, layout: Layout, *, fold: bool) -> tuple[IntArray, FloatArray]:
    """Grid and weights [layers, dies, width], filled row by row."""
    layers = len(queue.expert)
    shape = (layers, layout.dies, layout.width)
    grid = np.full(shape, NO_SLOT, dtype=np.int64)
    weight, carried = np.zeros(shape), np.zeros(shape[:2])
    at_layer = numbers(layers)[:, None]
    order = _orders(layout, layers)
    start = 0
    for row in range(layout.width):
        # Uneven dies have all layers in the same order, so this keeps the shape of a table.
        dies = order[layout.slots[order] > row].reshape(layers, -1)
        end = start + dies.shape[1]
        apart = dies.shape[1] if fold and row == 0 else 0 if fold else queue.shared - start
        if fold and row == 0:
            # Slow dies begin with the lightest copies of the row.
            by_speed = np.argsort(-layout.speeds[dies[0]], kind="stable")
            dies = dies[:, by_speed]
        # Folded back, equal dies come in the reverse order: copies stay side by side.
        target = dies = dies[:, ::-1] if fold and row % 2 else dies
        if row or not _same_speed(layout):
            busy = np.take_along_axis(carried, dies, 1)
            turns = _turns(busy, layout.speeds[dies], np.broadcast_to(apart, layers))
            target = np.take_along_axis(dies, turns, 1)
        grid[at_layer, target, row] = queue.expert[:, start:end]
        weight[at_layer, target, row] = queue.weight[:, start:end]
        carried[at_layer, target] += queue.weight[:, start:end]
        start = end
    return grid, weight


def _orders(layout: Layout, layers: int) -> IntArray:
    """[layers, dies] the spread order; with one slot a die begun at another die in each layer.

    Else the same dies would hold the copies of all layers, and give way for all of them. It is
    begun where it begins a round over all nodes, so that its runs stay as different.
    """
    order = layout.spread_order()
    if layout.width > 1:
        return np.broadcast_to(order, (layers, layout.dies))
    node = layout.domains[-2][order]
    begins = np.flatnonzero(node == node[0])
    start = begins[numbers(layers) * len(begins) // layers]
    turned: IntArray = order[(numbers(layout.dies) + start[:, None]) % layout.dies]
    return turned


def _turns(carried: FloatArray, speeds: FloatArray, apart: IntArray) -> IntArray:
    """Which die [layers, dies] takes the next copy of a row, the copies being in falling order.

    The first `apart` of a layer go by the order of the dies; then the least busy die comes first.
    """
    place = numbers(carried.shape[1])
    if int(apart.min()) >= len(place):
        return np.broadcast_to(place, carried.shape)
    busy = carried / speeds
    # Faster dies come first while all are idle.
    busy = busy - 1e-9 * (speeds - speeds.min()) * (float(busy.max()) + 1.0)
    busy = np.where(place < apart[:, None], -np.inf, busy)
    return np.argsort(busy, axis=1, kind="stable").astype(np.int64)


def _best_counts(heavy: FloatArray, layout: Layout) -> IntArray:
    """The counts whose folded rows have the lightest heaviest die; the plain ones among equals."""
    layers = len(heavy)
    best = copies_of_sorted(heavy, layout.host_slots, layout.dies)
    least = _heaviest_die(heavy, best, layout)
    for power in _POWERS_FEW:
        counts = copies_of_sorted(heavy, layout.host_slots, layout.dies, power)
        heaviest = _heaviest_die(heavy, counts, layout)
        better = heaviest < least * (1 - 1e-9)
        best = np.where(better[:, None], counts, best)
        least = np.where(better, heaviest, least)
    assert len(best) == layers
    return best


def _heaviest_die(heavy: FloatArray, counts: IntArray, layout: Layout) -> FloatArray:
    """[layers] load of the heaviest die after folding, duplicates and speeds left aside."""
    share = np.repeat((heavy / counts).ravel(), counts.ravel()).reshape(len(heavy), -1)
    share = -np.sort(-share, axis=1)
    carried = np.zeros((len(heavy), layout.dies))
    start = 0
    for row in range(layout.width):
        dies = int(np.count_nonzero(layout.slots > row))
        part = share[:, start : start + dies]
        carried.sort(axis=1)
        carried[:, : part.shape[1]] += part
        start += dies
    return np.asarray(carried.max(axis=1))
