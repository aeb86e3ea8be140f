"""From losses to a plan: one incident, one new epoch for each job that it touches.

In go losses that were gathered for a moment; out come the journal entry, the placement, the maps
and the assignments of the next epoch, staged as one commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from raddle.core import lifecycle, pools, restarts, sequences, timeline
from raddle.core.context import (
    Context,
    active_seats,
    at_next_epoch,
    instance_of,
    note,
    put_assignments,
    put_expert_maps,
    put_job,
    put_routes,
    role_of,
    status_of,
)
from raddle.core.detection import Loss
from raddle.core.kvcache.restore import RestorePlan
from raddle.core.recovery.planner import InstanceDecision, plan_instance
from raddle.core.recovery.request import recovery_request
from raddle.core.recovery.unfinished import carry_over, unfinished
from raddle.model import keys
from raddle.model.incident import (
    Incident,
    IncidentFault,
    IncidentPhase,
    InstancePlan,
    JobPlan,
    TimelineEntry,
)
from raddle.model.job import (
    AssignmentStage,
    InstanceExpertMap,
    Job,
    JobExpertMaps,
    JobState,
    Placement,
    RankPlacement,
    RoleSpec,
)
from raddle.model.kinds import FaultKind, RecoveryKind, RoleKind
from raddle.model.reasons import Decision
from raddle.model.routes import RouteState
from raddle.model.types import ExpertMove, RankKey, Why

# What arrives this shortly after the first sign belongs to the same decision.
GATHER_S = 0.005
# States in which a lost rank is a loss.
RECOVERABLE = (JobState.STARTING, JobState.READY, JobState.RECOVERING)
PLANS_AN_INCIDENT_MAX = 64
FAULTS_AN_INCIDENT_MAX = 400


@dataclass(slots=True)
class Draft:
    """The next epoch of one job while its instances are being decided."""

    job: Job
    placement: Placement
    maps: dict[tuple[str, int], InstanceExpertMap]
    plans: list[InstancePlan] = field(default_factory=list[InstancePlan])
    moves: dict[RankKey, tuple[ExpertMove, ...]] = field(
        default_factory=dict[RankKey, tuple[ExpertMove, ...]]
    )


def recover(context: Context, losses: list[Loss], first_seen_s: float) -> None:
    """Decide what becomes of every job that lost ranks, under one incident."""
    by_job: dict[str, list[Loss]] = {}
    for loss in losses:
        by_job.setdefault(loss.job_uid, []).append(loss)
    for job_uid in [uid for uid, lost in by_job.items() if _must_stay(context, uid, lost)]:
        context.drain_blocked[job_uid] = None
        context.drains_dirty = True
        losses = [loss for loss in losses if loss.job_uid != job_uid]
        del by_job[job_uid]
    if not losses:
        return
    incident = _incident(context, by_job, losses, first_seen_s)
    for job_uid, lost in by_job.items():
        job = context.state.require_job(job_uid)
        context.state.make_room(lifecycle.size_of(context, job))
        plan = _recover_job(context, job, lost, incident.id)
        incident = replace(incident, plans=(*incident.plans, plan)[-PLANS_AN_INCIDENT_MAX:])
        incident = replace(incident, why=summary(incident))
        # The journal and the epochs that it tells of are one commit, for as many as fit in one.
        context.state.put(keys.incident(incident.id), incident)
        context.state.stimulus(incident.id)
    note(
        context,
        "INCIDENT_DECIDED",
        incident.subject,
        incident.why.message,
        incident_id=incident.id,
        epoch=max(plan.epoch for plan in incident.plans),
    )


def _must_stay(context: Context, job_uid: str, lost: list[Loss]) -> bool:
    """Would a mere drain end the job? Then its ranks stay where they are."""
    if any(loss.kind is not FaultKind.DRAIN for loss in lost):
        return False
    job = context.state.require_job(job_uid)
    placement = context.state.placement(job_uid)
    assert placement is not None, job_uid
    maps = context.state.expert_maps(job_uid, placement.epoch)
    by_instance = {(m.role, m.instance): m for m in (maps.instances if maps else ())}
    instances = {(loss.key.role, loss.key.instance): None for loss in lost if loss.key.role}
    for name, instance in instances:
        request = recovery_request(
            job,
            role_of(job, name),
            instance_of(placement, name, instance),
            by_instance.get((name, instance)),
            {
                loss.key.rank: loss.kind
                for loss in lost
                if (loss.key.role, loss.key.instance) == (name, instance)
            },
            context.cluster,
            demand=0.0,
        )
        if plan_instance(request).option is None:
            return True
    return False


def reconnect(context: Context, job: Job, incarnation: str) -> None:
    """Peers lost a rank that answers: the same members start a new epoch together.

    Unless the job has ended or is placed anew since it was asked.
    """
    placement = context.state.placement(job.uid)
    if placement is None or job.state not in RECOVERABLE:
        return
    for seat in active_seats(context, job, placement):
        status = status_of(context, job, seat)
        if status is not None and status.incarnation == incarnation:
            position = seat.placement.die or seat.placement.node
            break
    else:
        return
    said = context.suspicions_of(job.uid).accusations.get(incarnation, "peers")
    message = f"{position}: {said}, but the rank answers"
    # No rank is named: nobody is lost.
    kind = FaultKind.PEER_REPORTS
    loss = Loss(job.uid, RankKey(), kind, position, "CONNECTION_BROKEN", message)
    recover(context, [loss], context.now)


def tell_drain(context: Context, job: Job) -> None:
    """Start a new epoch of the same members, who learn which pool members hand their blocks on."""
    placement = context.state.placement(job.uid)
    if placement is None or job.state is not JobState.READY or not pools.is_untold(context, job):
        return
    nodes = {
        seat.placement.node: None
        for seat in active_seats(context, job, placement)
        if seat.role.kind is RoleKind.CACHE and context.is_draining(seat.placement.node)
    }
    message = f"{', '.join(nodes)}: drained, its pool members hand their blocks on before they end"
    if not nodes:
        nodes = {
            seat.placement.node: None
            for seat in active_seats(context, job, placement)
            if seat.placement.kv_draining
        }
        message = f"{', '.join(nodes)}: drained no more, its pool members take blocks again"
    # No rank is named: nobody is lost.
    loss = Loss(job.uid, RankKey(), FaultKind.DRAIN, next(iter(nodes)), "DRAIN", message)
    recover(context, [loss], context.now)
    context.drains_dirty = True


def _incident(
    context: Context, by_job: dict[str, list[Loss]], losses: list[Loss], first_seen_s: float
) -> Incident:
    """The open incident of one of these jobs, or a new one, with the new faults."""
    faults = tuple(
        IncidentFault(
            kind=loss.kind,
            subject=loss.position,
            code=loss.code,
            message=loss.message,
            job_uid=loss.job_uid,
            rank=loss.key,
            start_count=loss.start_count,
        )
        for loss in losses
    )
    comparing = "candidates are compared"
    for open_one in context.state.open_incidents():
        if any(plan.job_uid in by_job for plan in open_one.plans):
            joined = (*open_one.faults, *faults)[-FAULTS_AN_INCIDENT_MAX:]
            entries = timeline.ended(context, open_one)
            decide = timeline.began(context, open_one.id, IncidentPhase.DECIDE, comparing)
            kind, subject = _subject([fault.subject for fault in joined], losses)
            return replace(
                open_one,
                subject_kind=kind,
                subject=subject,
                faults=joined,
                phase=IncidentPhase.DECIDE,
                timeline=(*entries, decide),
            )
    kind, subject = _subject([loss.position for loss in losses], losses)
    detect = TimelineEntry(
        phase=IncidentPhase.DETECT,
        start_time=first_seen_s,
        duration=max(context.now - first_seen_s, 1e-6),
        message=losses[0].message,
    )
    incident_id = context.state.new_incident_id()
    decide = timeline.began(context, incident_id, IncidentPhase.DECIDE, comparing)
    return Incident(
        id=incident_id,
        subject_kind=kind,
        subject=subject,
        phase=IncidentPhase.DECIDE,
        faults=faults,
        timeline=(detect, decide),
        create_time=first_seen_s,
    )


def _subject(positions: list[str], losses: list[Loss]) -> tuple[str, str]:
    """The smallest failure domain that explains all losses."""
    node_lost = any(loss.kind is FaultKind.NODE_LOST for loss in losses)
    parts = [position.split("/") for position in positions]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    depth = min(len(common), 2) if node_lost else len(common)
    kinds = ["ranks", "supernode", "node", "npu", "die"]
    if depth == 0:
        return "ranks", f"{len(set(positions))} ranks"
    return kinds[min(depth, 4)], "/".join(common[:depth])


def summary(incident: Incident) -> Why:
    """Why an incident is: what was lost first, and what is done about all that was lost."""
    parts = [
        f"{plan.role}/{plan.instance}: {plan.option}" if plan.role else str(plan.option)
        for job_plan in incident.plans
        for plan in job_plan.instances
    ]
    first = incident.faults[0]
    return Why(reason=first.kind, message=f"{first.message}; {', '.join(parts)}")


def _recover_job(context: Context, job: Job, losses: list[Loss], incident_id: str) -> JobPlan:
    placement = context.state.placement(job.uid)
    assert placement is not None, job.uid
    live = job.live_epoch > 0
    state = JobState.RECOVERING if live else JobState.STARTING
    job = replace(at_next_epoch(context, job), state=state)
    maps = context.state.expert_maps(job.uid, placement.epoch)
    left = unfinished(context, context.state.require_job(job.uid), placement)
    draft = Draft(
        job,
        replace(placement, epoch=job.epoch),
        {(m.role, m.instance): m for m in (maps.instances if maps else ())},
    )
    lost_by_instance: dict[tuple[str, int], list[Loss]] = {}
    for loss in losses:
        if loss.key.role:
            lost_by_instance.setdefault((loss.key.role, loss.key.instance), []).append(loss)
    for (role, instance), lost in lost_by_instance.items():
        if not _decide_instance(context, draft, role, instance, lost):
            return _start_over(context, draft, lost)
    draft.moves = carry_over(draft.moves, left, draft.maps)
    if not lost_by_instance:
        draft.plans.append(_reconnect_plan(losses))
    _commit(context, draft, losses, incident_id)
    return JobPlan(job_uid=job.uid, epoch=job.epoch, instances=tuple(draft.plans))


def _decide_instance(
    context: Context, draft: Draft, role_name: str, instance: int, lost: list[Loss]
) -> bool:
    """Plan one instance into the draft; False if nothing is feasible in place."""
    role = role_of(draft.job, role_name)
    part = instance_of(draft.placement, role_name, instance)
    request = recovery_request(
        draft.job,
        role,
        part,
        draft.maps.get((role_name, instance)),
        {loss.key.rank: loss.kind for loss in lost},
        context.cluster,
        demand=_demand(context, draft.job, role, instance),
        loads=context.expert_loads.of(draft.job.uid, role_name, instance),
    )
    decision = plan_instance(request)
    if decision.option is None:
        draft.plans.append(_instance_plan(role_name, instance, decision, lost))
        return False
    seats = _with_start_counts(decision, draft.job.epoch)
    placement = replace(
        draft.placement,
        instances=tuple(
            replace(p, ranks=seats) if (p.role, p.instance) == (role_name, instance) else p
            for p in draft.placement.instances
        ),
    )
    # At once: the next instance of this job must not choose the same free dies.
    context.reseat(draft.placement, placement)
    draft.placement = placement
    if decision.expert_map is not None:
        draft.maps[role_name, instance] = InstanceExpertMap(
            role=role_name, instance=instance, expert_map=decision.expert_map
        )
    for rank in decision.starts:
        restarts.started(context, draft.job, RankKey(role=role_name, instance=instance, rank=rank))
    for rank, moves in decision.moves.items():
        draft.moves[RankKey(role=role_name, instance=instance, rank=rank)] = moves
    draft.plans.append(_instance_plan(role_name, instance, decision, lost))
    return True


def _demand(context: Context, job: Job, role: RoleSpec, instance: int) -> float:
    """Running sequences as a share of what the whole instance may run; 0 where nobody says."""
    if role.kind is not RoleKind.DECODE or role.max_sequences_per_rank == 0:
        return 0.0
    running = sum(
        1
        for sequence in context.state.all_sequences(job.uid)
        if (sequence.rank.role, sequence.rank.instance) == (role.name, instance)
    )
    return min(1.0, running / (role.ranks * role.max_sequences_per_rank))


def _with_start_counts(decision: InstanceDecision, epoch: int) -> tuple[RankPlacement, ...]:
    return tuple(
        replace(seat, start_count=epoch) if seat.rank in decision.starts else seat
        for seat in decision.seats
    )


def _instance_plan(
    role: str, instance: int, decision: InstanceDecision, lost: list[Loss]
) -> InstancePlan:
    return InstancePlan(
        role=role,
        instance=instance,
        option=decision.option or RecoveryKind.RESTART,
        lost_ranks=tuple(loss.key.rank for loss in lost),
        considered=decision.considered,
        experts_moved=sum(len(moves) for moves in decision.moves.values()),
        why=decision.why,
    )


def _reconnect_plan(losses: list[Loss]) -> InstancePlan:
    why = Why(reason=RecoveryKind.RECONNECT, message=losses[0].message)
    return InstancePlan(role="", instance=0, option=RecoveryKind.RECONNECT, why=why)


def _start_over(context: Context, draft: Draft, lost: list[Loss]) -> JobPlan:
    """Nothing feasible in place: the whole job waits for a new placement."""
    why = Why(
        reason=RecoveryKind.RESTART,
        message=f"{lost[0].message}; {draft.plans[-1].why.message}: the job is placed anew",
    )
    before = context.state.placement(draft.job.uid)
    assert before is not None, draft.job.uid
    context.reseat(draft.placement, before)
    lifecycle.requeue(context, draft.job, why)
    return JobPlan(job_uid=draft.job.uid, epoch=draft.job.epoch + 1, instances=tuple(draft.plans))


def _commit(context: Context, draft: Draft, losses: list[Loss], incident_id: str) -> None:
    """Stage everything that the next epoch of the job consists of."""
    job, state = draft.job, context.state
    placement = pools.with_slots(context, job, draft.placement)
    lost = {loss.key for loss in losses}
    restored = sequences.plan_lost_sequences(context, job, placement, lost, incident_id)
    restores = restored.restores
    draft.plans = [_with_kv(plan, restored) for plan in draft.plans]
    put_job(context, replace(job, why=Why(reason=Decision.RECOVERING, message=losses[0].message)))
    state.put(keys.placement(job.uid), placement)
    maps = tuple(draft.maps[key] for key in sorted(draft.maps))
    put_expert_maps(context, JobExpertMaps(job_uid=job.uid, epoch=job.epoch, instances=maps))
    live = job.live_epoch > 0
    route_state = RouteState.FENCED if live else RouteState.STARTING
    put_routes(context, job, placement, route_state, restores=restores)
    put_assignments(
        context,
        job,
        placement,
        AssignmentStage.PREPARE if _all_are_up(context, job, placement) else AssignmentStage.START,
        incident_id=incident_id,
        moves=lambda key: draft.moves.get(key, ()),
        restores=restores,
    )


def _all_are_up(context: Context, job: Job, placement: Placement) -> bool:
    """Has every active rank told its address? One that an earlier plan starts may have not yet."""
    seats = active_seats(context, job, placement)
    return all(status_of(context, job, seat) is not None for seat in seats)


def _with_kv(plan: InstancePlan, restored: RestorePlan) -> InstancePlan:
    mine = [
        r
        for r in restored.restores
        if (r.source.role, r.source.instance) == (plan.role, plan.instance)
    ]
    given_up = sum(r.why.says(Decision.GIVE_UP) for r in mine)
    return replace(
        plan,
        sequences_restored=len(mine) - given_up,
        sequences_given_up=given_up,
        kv_tokens_restored=sum(r.tokens_restored for r in mine),
        kv_tokens_recomputed=sum(r.tokens_recomputed for r in mine),
        kv_median_predicted=restored.median_s if mine else 0.0,
        kv_last_predicted=restored.last_s if mine else 0.0,
    )
