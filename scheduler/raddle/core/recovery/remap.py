"""The repaired expert map of one instance, as commands to its ranks.

In goes the instance and who goes on; out come the new map and what each rank loads from where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raddle.core.experts.layout import IntArray, Layout
from raddle.core.experts.repair import MapChange, repair_map
from raddle.core.experts.sources import Bandwidths, choose_sources
from raddle.core.recovery.request import InstanceRecovery
from raddle.model.job import RankPlacement
from raddle.model.kinds import SeatState
from raddle.model.types import ExpertMove, WeightSource


@dataclass(frozen=True, slots=True)
class RepairedMap:
    """The new map [layers, slots], the loads by rank, and how long they take."""

    table: IntArray
    moves: dict[int, tuple[ExpertMove, ...]]
    #: (layer, expert) that no live rank can take.
    uncovered: tuple[tuple[int, int], ...]
    predicted_s: float

    @property
    def experts_moved(self) -> int:
        return sum(len(moves) for moves in self.moves.values())


def repair_instance(
    request: InstanceRecovery, hosts: Sequence[int], joined: Sequence[int]
) -> RepairedMap:
    """Repair the map of an instance that has one.

    Without measured loads all experts count the same, and nothing is exchanged for balance.

    Args:
        hosts: ranks that hold routed experts afterwards, those of `joined` included.
        joined: ranks whose seat has a new process, with nothing in memory.
    """
    assert request.table is not None
    layout = layout_of(request, hosts)
    fresh = np.zeros(layout.dies, dtype=bool)
    fresh[list(joined)] = True
    known = request.loads is not None
    loads = request.loads if known else np.ones((len(request.table), request.experts))
    assert loads is not None
    swaps = None if known else 0
    change = repair_map(request.table, loads, layout, joined=fresh, swaps=swaps)
    return moved(change, request.table, layout, layout.hosts & ~fresh, request.rates.bandwidths())


def hosts_of(request: InstanceRecovery, seats: Sequence[RankPlacement]) -> list[int]:
    """Active ranks that hold routed experts: the last ones may host the shared expert alone."""
    routed = request.role.ranks - request.role.shared_expert_ranks
    active = [seat.rank for seat in seats if seat.state is SeatState.ACTIVE]
    return [rank for rank in active if rank < routed]


def layout_of(request: InstanceRecovery, hosts: Sequence[int]) -> Layout:
    """The instance's ranks, these of them able to hold experts."""
    ranks = request.role.ranks
    domains = request.domains
    if domains is None:
        domains = np.arange(ranks, dtype=np.int64)[None, :]
    able = np.zeros(domains.shape[1], dtype=bool)
    able[list(hosts)] = True
    return Layout.of(domains, request.role.slots_per_rank, hosts=able)


def moved(
    change: MapChange,
    before: IntArray,
    layout: Layout,
    readable: np.ndarray[tuple[int], np.dtype[np.bool_]],
    rates: Bandwidths,
) -> RepairedMap:
    """A change as moves of each rank, with sources."""
    sources = choose_sources(change, before, layout, readable, rates)
    moves: dict[int, list[ExpertMove]] = {}
    rank = layout.slot_die[change.slot].tolist()
    rows = zip(
        rank,
        change.layer.tolist(),
        change.expert.tolist(),
        change.slot.tolist(),
        sources.source,
        sources.die.tolist(),
        strict=True,
    )
    for target, layer, expert, slot, source, die in rows:
        of_rank = die if source is WeightSource.PEER else 0
        move = ExpertMove(layer=layer, expert=expert, slot=slot, source=source, source_rank=of_rank)
        moves.setdefault(target, []).append(move)
    by_rank = {rank: tuple(found) for rank, found in sorted(moves.items())}
    return RepairedMap(change.table, by_rank, change.uncovered, sources.predicted_s)
