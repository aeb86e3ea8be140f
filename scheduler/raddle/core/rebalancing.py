"""From streamed loads to a better expert map, as a new epoch of the same members.

In go jobs whose ranks reported loads; out come, for those whose balance is worth it, new maps,
routes and assignments with the loads that each rank makes. A job in recovery is left alone.
"""

from __future__ import annotations

from dataclasses import replace

from raddle.core.context import (
    Context,
    active_seats,
    at_next_epoch,
    note,
    put_assignments,
    put_expert_maps,
    put_job,
    put_routes,
    role_of,
)
from raddle.core.experts.maps import to_expert_map
from raddle.core.experts.rebalance import rebalance_map
from raddle.core.recovery.remap import hosts_of, layout_of, moved
from raddle.core.recovery.request import recovery_request
from raddle.model import keys
from raddle.model.job import (
    AssignmentStage,
    InstanceExpertMap,
    InstancePlacement,
    Job,
    JobExpertMaps,
    JobState,
    Placement,
)
from raddle.model.kinds import NodeState
from raddle.model.reasons import Decision
from raddle.model.routes import RouteState
from raddle.model.types import ExpertMove, RankKey, Why


def look_at(context: Context, job_uid: str) -> bool:
    """Rebalance a job that is due, ready and worth it; True if it starts a new epoch."""
    job = context.state.job(job_uid)
    placement = context.state.placement(job_uid)
    if job is None or placement is None or job.state is not JobState.READY:
        return False
    # The new epoch needs a word of every agent, and would leave a silent one's ranks behind.
    seats = active_seats(context, job, placement)
    nodes = {seat.placement.node for seat in seats}
    if any(context.nodes.node(name).state is not NodeState.READY for name in nodes):
        return False
    if not context.expert_loads.take_due(job_uid, job.epoch, context.now):
        return False
    maps = context.state.expert_maps(job_uid, job.epoch)
    if maps is None:
        return False
    moves: dict[RankKey, tuple[ExpertMove, ...]] = {}
    said: list[str] = []
    new: list[InstanceExpertMap] = []
    parts = {(part.role, part.instance): part for part in placement.instances}
    for known in maps.instances:
        better = _better(context, job, parts[known.role, known.instance], known, moves)
        new.append(better[0] if better else known)
        if better:
            said.append(f"{known.role}/{known.instance}: {better[1]}")
    if not said:
        return False
    _commit(context, job, placement, tuple(new), moves, "; ".join(said))
    return True


def _better(
    context: Context,
    job: Job,
    part: InstancePlacement,
    known: InstanceExpertMap,
    moves: dict[RankKey, tuple[ExpertMove, ...]],
) -> tuple[InstanceExpertMap, str] | None:
    """A map that pays, and the sentence why; its moves are added."""
    loads = context.expert_loads.of(job.uid, part.role, part.instance)
    if loads is None:
        return None
    role = role_of(job, part.role)
    request = recovery_request(job, role, part, known, {}, context.cluster, demand=0.0)
    assert request.table is not None
    layout = layout_of(request, hosts_of(request, request.seats))
    if loads.shape != (len(request.table), request.experts):
        return None
    rates = request.rates.bandwidths()
    found = rebalance_map(request.table, loads, layout, rates)
    if not found.change.loads:
        return None
    change = moved(found.change, request.table, layout, layout.hosts, rates)
    for rank, mine in change.moves.items():
        moves[RankKey(role=part.role, instance=part.instance, rank=rank)] = mine
    expert_map = to_expert_map(change.table, role.slots_per_rank, request.experts)
    return replace(known, expert_map=expert_map), found.why.message


def _commit(
    context: Context,
    job: Job,
    placement: Placement,
    maps: tuple[InstanceExpertMap, ...],
    moves: dict[RankKey, tuple[ExpertMove, ...]],
    message: str,
) -> None:
    """Stage the next epoch: the same members fence, load what is new, and go on."""
    why = Why(reason=Decision.REBALANCING, message=message)
    job = replace(at_next_epoch(context, job), state=JobState.RECOVERING, why=why)
    placement = replace(placement, epoch=job.epoch)
    put_job(context, job)
    context.state.put(keys.placement(job.uid), placement)
    put_expert_maps(context, JobExpertMaps(job_uid=job.uid, epoch=job.epoch, instances=maps))
    put_routes(context, job, placement, RouteState.FENCED, restores=())
    put_assignments(
        context,
        job,
        placement,
        AssignmentStage.PREPARE,
        moves=lambda key: moves.get(key, ()),
    )
    note(context, "REBALANCED", job.uid, message, epoch=job.epoch)
