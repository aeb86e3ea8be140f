"""The first expert map of an instance: every expert once, then replicas where they help.

In go counts, loads and failure domains; out comes a map [layers, slots]. The redundant slots go
to the most loaded experts (to the lowest index where loads are equal), and a replica goes to the
rank that shares the fewest failure domains with the copies that are there already.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from raddle.core.experts.maps import IntArray

FloatArray = npt.NDArray[np.float64]


def initial_map(
    layers: int,
    experts: int,
    slots_per_rank: int,
    domains: IntArray,
    *,
    loads: FloatArray | None = None,
    shared_expert_ranks: int = 0,
) -> IntArray:
    """Place `experts` in `layers` over the ranks of one instance.

    Args:
        domains: [levels, ranks], the failure domain of each rank from narrow to wide.
        loads: [layers, experts], any unit; None means equal.
        shared_expert_ranks: the last so many ranks hold shared experts only: their slots stay -1.
    """
    if loads is None:
        # Ranks share a domain or they don't: its number has no say. So many instances, one map.
        same = np.stack([np.unique(row, return_inverse=True)[1] for row in domains])
        shape = (layers, experts, slots_per_rank, shared_expert_ranks)
        return _map_of_equal_loads(*shape, same.shape, same.astype(np.int64).tobytes()).copy()
    return _initial_map(layers, experts, slots_per_rank, domains, loads, shared_expert_ranks)


@lru_cache(maxsize=256)
def _map_of_equal_loads(
    layers: int, experts: int, slots_per_rank: int, shared: int, shape: tuple[int, ...], data: bytes
) -> IntArray:
    domains: IntArray = np.frombuffer(data, dtype=np.int64).reshape(shape)
    return _initial_map(layers, experts, slots_per_rank, domains, None, shared)


def _initial_map(
    layers: int,
    experts: int,
    slots_per_rank: int,
    domains: IntArray,
    loads: FloatArray | None,
    shared_expert_ranks: int,
) -> IntArray:
    ranks = domains.shape[1]
    routed = ranks - shared_expert_ranks
    assert routed * slots_per_rank >= experts, (routed, slots_per_rank, experts)
    table: IntArray = np.full((layers, ranks * slots_per_rank), -1, dtype=np.int64)
    # Without loads all layers are equal: one is placed and repeated.
    wanted = np.ones((1, experts)) if loads is None else np.asarray(loads, dtype=np.float64)
    table[:, : routed * slots_per_rank] = _place(wanted, slots_per_rank, domains[:, :routed])
    return table


def _copies(loads: FloatArray, slots: int, ranks: int) -> IntArray:
    """Copies [layers, experts]: the next copy always goes where the load a copy is highest."""
    layers, experts = loads.shape
    copies: IntArray = np.ones((layers, experts), dtype=np.int64)
    rows: IntArray = np.arange(layers, dtype=np.int64)
    # More copies than ranks can't be told apart: those slots stay empty.
    for _ in range(min(slots, experts * ranks) - experts):
        share = np.where(copies < ranks, loads / copies, -1.0)
        copies[rows, np.argmax(share, axis=1)] += 1
    return copies


def _place(loads: FloatArray, slots_per_rank: int, domains: IntArray) -> IntArray:
    """Slots [layers, ranks * slots_per_rank], all layers in step."""
    layers, ranks = loads.shape[0], domains.shape[1]
    copies = _copies(loads, ranks * slots_per_rank, ranks)
    queue, shares, is_first = _queue(loads / copies, copies)
    table: IntArray = np.full((layers, ranks, slots_per_rank), -1, dtype=np.int64)
    used = np.zeros((layers, ranks), dtype=np.int64)
    carried = np.zeros((layers, ranks))
    near = np.zeros((layers, ranks))
    rows: IntArray = np.arange(layers, dtype=np.int64)
    # A rank never takes a second copy: it is farther than all domains together can be.
    same_rank = float((len(domains) + 1) * ranks)
    spread_until = int((copies * (copies > 1)).sum(axis=1).max())
    for step in range(queue.shape[1]):
        if step <= spread_until:
            near[is_first[:, step]] = 0.0
        # `carried` adds up to less than 1 a rank, so that the domains always decide first.
        score = np.where(used < slots_per_rank, near + carried, np.inf)
        rank = np.argmin(score, axis=1)
        # Where only holders have room left, the redundant copy is left out.
        ok = near[rows, rank] < same_rank
        row, col = rows[ok], rank[ok]
        table[row, col, used[row, col]] = queue[ok, step]
        used[row, col] += 1
        carried[row, col] += shares[ok, step]
        if step < spread_until:
            for level in domains:
                near += level == level[rank][:, None]
            near[row, col] += same_rank
    return table.reshape(layers, -1)


def _queue(
    share: FloatArray, copies: IntArray
) -> tuple[IntArray, FloatArray, npt.NDArray[np.bool_]]:
    """Copies in the order of placing [layers, copies]: expert, its load a copy, first of its kind.

    Experts with several copies come first, while there is a choice of domains; then heavy ones.
    """
    total = (share * copies).sum(axis=1, keepdims=True)
    share = share / np.where(total > 0, total, 1.0) * 0.5
    order = np.lexsort((-share, -copies), axis=1)
    queue = np.stack([np.repeat(row, n[row]) for row, n in zip(order, copies, strict=True)])
    is_first = np.ones(queue.shape, dtype=bool)
    is_first[:, 1:] = queue[:, 1:] != queue[:, :-1]
    return queue, np.take_along_axis(share, queue, axis=1), is_first
