"""Loads that were asked for and are not done: no plan may take them for done.

In go the moves of an epoch, those of the one before it that never went live, and the map that is
wanted now; out come the moves with what is still missing. A rank that has not loaded an expert is
no source of it either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from raddle.core.context import Context, active_seats, has_reached, status_of
from raddle.core.timeline import journal_of
from raddle.model.health import RankStage
from raddle.model.job import InstanceExpertMap, Job, Placement
from raddle.model.types import ExpertMap, ExpertMove, RankKey, WeightSource

_LOADED = (RankStage.REPAIRED, RankStage.LIVE)
Moves = Mapping[RankKey, tuple[ExpertMove, ...]]


def unfinished(
    context: Context, job: Job, placement: Placement
) -> dict[RankKey, tuple[ExpertMove, ...]]:
    """Moves of the job's present epoch that its running ranks did not acknowledge as done."""
    moves, _, _ = journal_of(context, job)
    found: dict[RankKey, tuple[ExpertMove, ...]] = {}
    for seat in active_seats(context, job, placement):
        done = has_reached(job, status_of(context, job, seat), _LOADED)
        if not done and moves(seat.key):
            found[seat.key] = moves(seat.key)
    return found


def carry_over(
    moves: Moves, left: Moves, maps: Mapping[tuple[str, int], InstanceExpertMap]
) -> dict[RankKey, tuple[ExpertMove, ...]]:
    """The new plan's moves, and those left of an older one that the new map still asks for."""
    found = dict(moves)
    for key, old in left.items():
        part = maps.get((key.role, key.instance))
        named = {(move.layer, move.expert) for move in found.get(key, ())}
        kept = tuple(
            replace(move, slot=slot)
            for move in old
            if part is not None
            and (move.layer, move.expert) not in named
            and (slot := _slot_of(part.expert_map, key.rank, move)) is not None
        )
        if kept:
            found[key] = (*found.get(key, ()), *kept)
    return {key: tuple(_sourced(key, move, left) for move in found[key]) for key in found}


def _slot_of(expert_map: ExpertMap, rank: int, move: ExpertMove) -> int | None:
    """Where the rank holds the expert in this map."""
    width = expert_map.slots_per_rank
    row = expert_map.layers[move.layer].physical_to_logical
    own = row[rank * width : (rank + 1) * width]
    return rank * width + own.index(move.expert) if move.expert in own else None


def _sourced(key: RankKey, move: ExpertMove, left: Moves) -> ExpertMove:
    """Read from the checkpoint what the peer that the plan names has not loaded itself."""
    if move.source is not WeightSource.PEER:
        return move
    source = replace(key, rank=move.source_rank)
    lacks = any((m.layer, m.expert) == (move.layer, move.expert) for m in left.get(source, ()))
    return replace(move, source=WeightSource.DISK, source_rank=0) if lacks else move
