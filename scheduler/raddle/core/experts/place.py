"""The first expert map of an instance: every expert once, then replicas where they help.

In go counts, loads and failure domains; out comes a map [layers, slots]. The redundant slots go
to the most loaded experts (to the lowest index where loads are equal), and a replica goes to the
rank that shares the fewest failure domains with the copies that are there already.
"""

from __future__ import annotations

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
    ranks = domains.shape[1]
    routed = ranks - shared_expert_ranks
    assert routed * slots_per_rank >= experts, (routed, slots_per_rank, experts)
    if loads is None:
        row = _layer(np.ones(experts), slots_per_rank, domains[:, :routed])
        rows = np.tile(row, (layers, 1))
    else:
        parts = [_layer(load, slots_per_rank, domains[:, :routed]) for load in loads]
        rows = np.stack(parts)
    table: IntArray = np.full((layers, ranks * slots_per_rank), -1, dtype=np.int64)
    table[:, : routed * slots_per_rank] = rows
    return table


def _copies(load: FloatArray, slots: int, ranks: int) -> IntArray:
    """Copies of each expert: the next copy always goes where the load a copy is highest."""
    copies: IntArray = np.ones(len(load), dtype=np.int64)
    for _ in range(slots - len(load)):
        share = np.where(copies < ranks, load / copies, -1.0)
        best = int(np.argmax(share))
        if share[best] < 0:
            break
        copies[best] += 1
    return copies


def _layer(load: FloatArray, slots_per_rank: int, domains: IntArray) -> IntArray:
    """One layer's slots [ranks * slots_per_rank]."""
    ranks = domains.shape[1]
    copies = _copies(load, ranks * slots_per_rank, ranks)
    share = load / copies
    row: IntArray = np.full((ranks, slots_per_rank), -1, dtype=np.int64)
    used = np.zeros(ranks, dtype=np.int64)
    carried = np.zeros(ranks)
    holds = np.zeros((len(load), ranks), dtype=bool)
    # Experts with copies first, while there is a choice of domains; then the heavy ones.
    order = sorted(range(len(load)), key=lambda e: (-int(copies[e]), -float(share[e]), e))
    for expert in order:
        near = np.zeros(ranks)
        for _ in range(int(copies[expert])):
            rank = _best_rank(near, carried, used < slots_per_rank, holds[expert])
            if rank is None:
                break
            row[rank, used[rank]] = expert
            used[rank] += 1
            carried[rank] += share[expert]
            holds[expert, rank] = True
            for level in domains:
                near += level == level[rank]
    return row.reshape(-1)


def _best_rank(
    near: FloatArray,
    carried: FloatArray,
    has_room: npt.NDArray[np.bool_],
    holds: npt.NDArray[np.bool_],
) -> int | None:
    """The rank with room that shares the fewest domains, then the least load, then the lowest."""
    allowed = has_room & ~holds
    if not allowed.any():
        return None
    nearest = near[allowed].min()
    candidates = allowed & (near == nearest)
    lightest = carried[candidates].min()
    return int(np.flatnonzero(candidates & (carried <= lightest + 1e-12))[0])
