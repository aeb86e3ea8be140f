"""The best way to recover one instance, and why not the others.

In goes one instance with its losses; out comes a decision: the option, the seats, the map, the
loads. Every candidate is built and priced; the cheapest feasible and allowed one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from raddle.core.experts.maps import to_expert_map
from raddle.core.recovery.cost import CONTROL_S, cost_s
from raddle.core.recovery.remap import RepairedMap, hosts_of, repair_instance
from raddle.core.recovery.request import InstanceRecovery
from raddle.model.incident import RecoveryOption
from raddle.model.job import RankPlacement
from raddle.model.kinds import FaultKind, RecoveryKind, RoleKind, SeatState
from raddle.model.reasons import Decision
from raddle.model.topology import node_of
from raddle.model.types import ExpertMap, ExpertMove, Why

# In the order of what they disturb: the first of equal cost is taken.
_ORDER = list(RecoveryKind)


@dataclass(frozen=True, slots=True)
class InstanceDecision:
    """What is done to one instance; `option` None means that nothing is feasible in place."""

    option: RecoveryKind | None
    why: Why
    considered: tuple[RecoveryOption, ...]
    seats: tuple[RankPlacement, ...] = ()
    #: Ranks that need a new process.
    starts: tuple[int, ...] = ()
    expert_map: ExpertMap | None = None
    moves: Mapping[int, tuple[ExpertMove, ...]] = field(
        default_factory=dict[int, tuple[ExpertMove, ...]]
    )


@dataclass(frozen=True, slots=True)
class _Candidate:
    kind: RecoveryKind
    seats: tuple[RankPlacement, ...] = ()
    starts: tuple[int, ...] = ()
    repaired: RepairedMap | None = None
    infeasible: str = ""
    message: str = ""
    pause_s: float = 0.0
    capacity_left: float = 0.0
    cost: float = 0.0


def plan_instance(request: InstanceRecovery) -> InstanceDecision:
    """Compare remap, donor slot, hot spare and restart, and take the cheapest.

    One that pauses longer than the job's `max_pause` is taken only if all others do too.
    """
    if not request.lost:
        return _reconnect(request)
    remapped = _shrunk(request)
    candidates = [remapped, _hot_spare(request), _restart(request)]
    missing = {RecoveryKind.REMAP, RecoveryKind.DONOR_SLOT} - {c.kind for c in candidates}
    candidates += [_other_remap(kind, remapped) for kind in sorted(missing)]
    candidates = [_priced(_if_allowed(c, request), request) for c in candidates]
    candidates.sort(key=lambda c: _ORDER.index(c.kind))
    feasible = [c for c in candidates if not c.infeasible]
    if not feasible:
        sentences = "; ".join(f"{c.kind}: {c.infeasible}" for c in candidates)
        why = Why(reason=Decision.NO_OPTION, message=f"nothing is feasible in place ({sentences})")
        return InstanceDecision(None, why, tuple(_option(c, request, None) for c in candidates))
    best = min(feasible, key=lambda c: (_is_too_slow(c, request), c.cost, _ORDER.index(c.kind)))
    considered = tuple(_option(c, request, best) for c in candidates)
    why = Why(reason=best.kind, message=best.message)
    width = request.role.slots_per_rank
    return InstanceDecision(
        option=best.kind,
        why=why,
        considered=considered,
        seats=best.seats,
        starts=best.starts,
        expert_map=(
            to_expert_map(best.repaired.table, width, request.experts) if best.repaired else None
        ),
        moves=best.repaired.moves if best.repaired else {},
    )


def _reconnect(request: InstanceRecovery) -> InstanceDecision:
    """Nobody is lost: the same members start a new epoch."""
    why = Why(reason=RecoveryKind.RECONNECT, message="no rank is lost, connections are made anew")
    option = RecoveryOption(
        option=RecoveryKind.RECONNECT,
        feasible=True,
        chosen=True,
        why=why,
        predicted_pause=CONTROL_S,
        capacity_left=_capacity(request, request.seats),
        cost=CONTROL_S,
    )
    table = request.table
    width = request.role.slots_per_rank
    return InstanceDecision(
        option=RecoveryKind.RECONNECT,
        why=why,
        considered=(option,),
        seats=request.seats,
        expert_map=None if table is None else to_expert_map(table, width, request.experts),
    )


def _is_too_slow(candidate: _Candidate, request: InstanceRecovery) -> bool:
    return 0 < request.max_pause_s < candidate.pause_s


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _priced(candidate: _Candidate, request: InstanceRecovery) -> _Candidate:
    if candidate.infeasible:
        return candidate
    cost = cost_s(candidate.pause_s, candidate.capacity_left, request.demand)
    return replace(candidate, cost=cost)


def _if_allowed(candidate: _Candidate, request: InstanceRecovery) -> _Candidate:
    if candidate.infeasible or candidate.kind in request.allowed:
        return candidate
    return replace(candidate, infeasible="the job does not allow it")


def _option(
    candidate: _Candidate, request: InstanceRecovery, best: _Candidate | None
) -> RecoveryOption:
    moved = candidate.repaired.experts_moved if candidate.repaired else 0
    if candidate.infeasible:
        why = Why(reason=Decision.INFEASIBLE, message=candidate.infeasible)
    elif candidate is best:
        why = Why(reason=Decision.CHEAPEST, message=candidate.message)
    else:
        dearer = candidate.cost - best.cost if best is not None else 0.0
        text = f"costs {dearer:.1f} s of work more"
        if _is_too_slow(candidate, request):
            text = f"pauses {candidate.pause_s:.1f} s, max_pause is {request.max_pause_s:.1f} s"
        why = Why(reason=Decision.DEARER, message=text)
    return RecoveryOption(
        option=candidate.kind,
        feasible=not candidate.infeasible,
        chosen=candidate is best,
        why=why,
        predicted_pause=candidate.pause_s,
        experts_moved=moved,
        bytes_moved=moved * request.rates.expert_bytes,
        capacity_left=candidate.capacity_left,
        cost=candidate.cost,
    )


def _leave(request: InstanceRecovery, ranks: Sequence[int]) -> tuple[RankPlacement, ...]:
    """The seats with these ranks gone."""
    return tuple(
        replace(
            seat,
            state=(
                SeatState.DRAINED if request.lost[seat.rank] is FaultKind.DRAIN else SeatState.LOST
            ),
            why=Why(reason=request.lost[seat.rank], message="left, the others go on without it"),
        )
        if seat.rank in ranks
        else seat
        for seat in request.seats
    )


def _active(seats: Sequence[RankPlacement]) -> list[int]:
    return [seat.rank for seat in seats if seat.state is SeatState.ACTIVE]


def _capacity(request: InstanceRecovery, seats: Sequence[RankPlacement]) -> float:
    return min(1.0, len(_active(seats)) / request.role.ranks)


def _pause_s(request: InstanceRecovery, repaired: RepairedMap | None, *, starts: bool) -> float:
    pause = CONTROL_S + (request.rates.start_s() if starts else 0.0)
    return pause + (repaired.predicted_s if repaired is not None else 0.0)


def _repair(
    request: InstanceRecovery, seats: Sequence[RankPlacement], joined: Sequence[int]
) -> RepairedMap | None:
    if request.table is None:
        return None
    return repair_instance(request, hosts_of(request, seats), joined)


def _shared_expert_ranks(request: InstanceRecovery) -> range:
    """The last ranks host the shared expert and nothing else."""
    return range(request.role.ranks - request.role.shared_expert_ranks, request.role.ranks)


def _unfit(
    request: InstanceRecovery, seats: Sequence[RankPlacement], repaired: RepairedMap | None
) -> str:
    """Why the instance can't go on with these seats; empty if it can."""
    active = _active(seats)
    # A pool without members is a miss for every block, and nothing worse.
    if not active and request.role.kind is not RoleKind.CACHE:
        return "no rank of the instance survives"
    shared = _shared_expert_ranks(request)
    if repaired is not None and shared and not any(rank in shared for rank in active):
        return "no rank with the shared expert survives"
    if repaired is not None and repaired.uncovered:
        experts = _counted(len(repaired.uncovered), "expert")
        return f"no slot for {experts} on the ranks that are left"
    return ""


def _shrunk(request: InstanceRecovery) -> _Candidate:
    """The survivors go on alone: remap if every expert has a copy, else donors give slots."""
    seats = _leave(request, list(request.lost))
    repaired = _repair(request, seats, ())
    moved = repaired.experts_moved if repaired else 0
    needs_slots = repaired is not None and (moved or repaired.uncovered)
    kind = RecoveryKind.DONOR_SLOT if needs_slots else RecoveryKind.REMAP
    infeasible = _unfit(request, seats, repaired)
    if infeasible:
        return _Candidate(kind, infeasible=infeasible, capacity_left=_capacity(request, seats))
    text = f"{_counted(len(_active(seats)), 'rank')} left to go on"
    if repaired is not None:
        loads = f"{_counted(moved, 'expert')} loaded anew"
        text += f", {loads if moved else 'every expert has a live copy'}"
    return _Candidate(
        kind,
        seats=seats,
        repaired=repaired,
        message=text,
        pause_s=_pause_s(request, repaired, starts=False),
        capacity_left=_capacity(request, seats),
    )


def _other_remap(kind: RecoveryKind, remapped: _Candidate) -> _Candidate:
    """Why the other way to shrink is not the one."""
    if kind is RecoveryKind.REMAP:
        return _Candidate(kind, infeasible="some expert has no live copy left")
    if remapped.infeasible:
        return _Candidate(kind, infeasible=remapped.infeasible)
    if remapped.repaired is None:
        return _Candidate(kind, infeasible="not needed: the instance holds no experts")
    return _Candidate(kind, infeasible="not needed: every expert has a live copy")


def _hot_spare(request: InstanceRecovery) -> _Candidate:
    """Spare dies take lost ranks' places under the same rank numbers, as many as there are."""
    lost = sorted(request.lost)
    if not request.spares:
        return _Candidate(RecoveryKind.HOT_SPARE, infeasible="no spare is usable")
    places = {rank: spare.die for rank, spare in zip(lost, request.spares, strict=False)}
    message = f"{_counted(len(places), 'rank')} moved to spare dies"
    return _replaced(request, RecoveryKind.HOT_SPARE, places, message)


def _restart(request: InstanceRecovery) -> _Candidate:
    """New processes: in their own seats where these are healthy, else on free dies."""
    fresh = list(request.fresh)
    places: dict[int, str] = {}
    for rank in sorted(request.lost):
        if rank in request.restartable:
            seat = next(s for s in request.seats if s.rank == rank)
            places[rank] = seat.die or seat.node
        elif fresh:
            places[rank] = fresh.pop(0)
    if not places:
        return _Candidate(
            RecoveryKind.RESTART,
            infeasible="no lost rank can restart in its seat, and nothing else is free",
        )
    message = f"{_counted(len(places), 'rank')} started anew"
    return _replaced(request, RecoveryKind.RESTART, places, message)


def _replaced(
    request: InstanceRecovery, kind: RecoveryKind, places: Mapping[int, str], message: str
) -> _Candidate:
    """Lost ranks continue at new (or the same) places under their own numbers; others leave."""
    used = set(places.values())
    leaving = [rank for rank in sorted(request.lost) if rank not in places]
    if leaving:
        message += f", {_counted(len(leaving), 'rank')} gone"
    seats: list[RankPlacement] = []
    for seat in _leave(request, leaving):
        if seat.rank in places:
            place = places[seat.rank]
            die = place if seat.die else ""
            node = node_of(place) if seat.die else place
            state = SeatState.ACTIVE
            seats.append(replace(seat, die=die, node=node, state=state, why=Why()))
        elif seat.state is SeatState.SPARE and seat.die in used:
            continue
        else:
            seats.append(seat)
    starts = tuple(sorted(places))
    repaired = _repair(request, seats, starts)
    infeasible = _unfit(request, seats, repaired)
    if infeasible:
        return _Candidate(kind, infeasible=infeasible, capacity_left=_capacity(request, seats))
    return _Candidate(
        kind,
        seats=tuple(seats),
        starts=starts,
        repaired=repaired,
        message=message,
        pause_s=_pause_s(request, repaired, starts=True),
        capacity_left=_capacity(request, seats),
    )
