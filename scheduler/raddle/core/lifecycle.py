"""Life of a job without faults: wait, be placed, start, be ready, stop.

Each step is level-triggered: `advance` looks at what the assignments ask for and at what agents
acknowledged, and takes the next step if everything for it is there. So a new leader continues
from wherever the last one stopped, with no memory but the records.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from raddle.core import pools, timeline
from raddle.core.admission import model_shape
from raddle.core.context import (
    FENCED_OR_LATER,
    Context,
    active_seats,
    at_next_epoch,
    clear_assignments,
    has_done,
    has_reached,
    note,
    occupy,
    promote_assignments,
    put_assignments,
    put_expert_maps,
    put_job,
    put_routes,
    release,
    set_why,
    status_of,
)
from raddle.core.experts.layout import Layout
from raddle.core.experts.maps import to_expert_map
from raddle.core.experts.place import place_unknown_loads
from raddle.core.placement.gang import PlacedJob, place_job
from raddle.core.sizes import CommitSize, commit_size
from raddle.core.state import WRITES_A_COMMIT_MAX
from raddle.model import keys
from raddle.model.job import (
    AssignmentStage,
    InstanceExpertMap,
    Job,
    JobExpertMaps,
    JobState,
    Placement,
)
from raddle.model.kinds import NodeState, RoleKind, SeatState
from raddle.model.reasons import Decision
from raddle.model.routes import RouteState
from raddle.model.types import Why

# A job that waited this long is not overtaken any more by smaller or less important ones.
RESERVE_AFTER_S = 60.0
#: Of so many shapes the first waiting job's record keeps up with the numbers in its sentence.
HEADS_TOLD_MAX = 16
_RUNNING = (JobState.STARTING, JobState.READY, JobState.RECOVERING)


def schedule(context: Context) -> bool:
    """Place waiting jobs by priority, then age. True if the commit is full and more may fit."""
    waiting = context.state.waiting
    heads = waiting.heads()
    heapify(heads)
    unfit: dict[int, Why] = {}
    while heads:
        (_, _, job_uid), shape = heappop(heads)
        job = context.state.require_job(job_uid)
        size = size_of(context, job)
        if not context.state.has_room(size):
            return True
        placed = place_job(job.spec, context.cluster)
        if isinstance(placed, PlacedJob):
            context.state.make_room(size)
            start(context, job, placed)
            following = waiting.head(shape)
            if following is not None:
                heappush(heads, (following, shape))
            continue
        # Dies only get fewer in one pass: what does not fit now, fits for no job like it.
        unfit[shape] = placed
        if _is_next(context, job):
            behind = _turn(job)
            unfit |= {other: behind for _, other in heads}
            break
    return _tell(context, unfit)


def _is_next(context: Context, job: Job) -> bool:
    """Has it waited so long that room is kept for it? Only if room can come from jobs that end."""
    if context.seen_for_s(job.uid) <= RESERVE_AFTER_S:
        return False
    return isinstance(place_job(job.spec, context.cluster.idle()), PlacedJob)


def _turn(job: Job) -> Why:
    name = f"{job.spec.namespace}/{job.spec.name}"
    message = (
        f"waits behind {name} ({job.uid}), which has waited for over {RESERVE_AFTER_S:.0f} s: what"
        " becomes free is kept for it"
    )
    return Why(reason=Decision.WAITS_FOR_TURN, message=message)


def size_of(context: Context, job: Job) -> CommitSize:
    """What a new epoch of the job writes."""
    nodes = len(context.cluster.node_names)
    return commit_size(job.spec, model_shape(job.spec.model), nodes)


def _tell(context: Context, unfit: dict[int, Why]) -> bool:
    """Tell jobs what they wait for. True if the commit is full and more are to be told."""
    waiting = context.state.waiting
    for number, (shape, why_now) in enumerate(unfit.items()):
        waiting.waits_for(shape, why_now, tell_head=number < HEADS_TOLD_MAX)
    for job_uid in list(waiting.untold):
        why = unfit.get(waiting.shape_of(job_uid))
        if why is None:
            continue
        if context.state.staged >= WRITES_A_COMMIT_MAX:
            return True
        context.seen_for_s(job_uid)
        set_why(context, context.state.require_job(job_uid), why)
    return False


def start(context: Context, job: Job, placed: PlacedJob) -> None:
    """Commit a placement at the next epoch and have the ranks started."""
    context.seen_since.pop(job.uid, None)
    job = at_next_epoch(context, job)
    placement = _with_starts(placed.placement(job.uid, job.epoch), job.epoch)
    placement = pools.with_slots(context, job, placement)
    job = replace(
        job,
        observed_generation=job.generation,
        state=JobState.STARTING,
        why=Why(reason=Decision.PLACED, message=placement.why.message),
    )
    put_job(context, job)
    context.state.put(keys.placement(job.uid), placement)
    occupy(context, placement)
    put_expert_maps(context, _initial_maps(context, job, placement))
    put_routes(context, job, placement, RouteState.STARTING, restores=())
    put_assignments(context, job, placement, AssignmentStage.START)
    note(context, "JOB_PLACED", job.uid, placement.why.message, epoch=job.epoch)
    context.state.stimulus(job.uid)


def _with_starts(placement: Placement, epoch: int) -> Placement:
    instances = tuple(
        replace(
            part,
            ranks=tuple(
                replace(rank, start_count=epoch) if rank.state is SeatState.ACTIVE else rank
                for rank in part.ranks
            ),
        )
        for part in placement.instances
    )
    return replace(placement, instances=instances)


def _initial_maps(context: Context, job: Job, placement: Placement) -> JobExpertMaps:
    shape = model_shape(job.spec.model)
    roles = {role.name: role for role in job.spec.roles}
    maps: list[InstanceExpertMap] = []
    for part in placement.instances:
        role = roles[part.role]
        if role.kind is RoleKind.CACHE or role.slots_per_rank == 0:
            continue
        dies = [r.die for r in part.ranks if r.state is SeatState.ACTIVE]
        layout = Layout.of(
            context.cluster.domains(dies),
            role.slots_per_rank,
            hosts=np.arange(len(dies)) < len(dies) - role.shared_expert_ranks,
        )
        table = place_unknown_loads(shape.moe_layers, shape.experts, layout)
        expert_map = to_expert_map(table, role.slots_per_rank, shape.experts)
        maps.append(
            InstanceExpertMap(role=part.role, instance=part.instance, expert_map=expert_map)
        )
    return JobExpertMaps(job_uid=job.uid, epoch=job.epoch, instances=tuple(maps))


def advance(context: Context, job: Job) -> None:
    """Take the next steps of a job for as far as all its ranks are there already."""
    if job.state is JobState.STOPPING:
        finish_stopping(context, job)
        return
    while _step(context, job):
        job = context.state.require_job(job.uid)


def _step(context: Context, job: Job) -> bool:
    """One step further, if all its ranks reached what it needs."""
    placement = context.state.placement(job.uid)
    if job.state not in _RUNNING or placement is None:
        return False
    _, stage = context.state.stages.get(job.uid, (0, AssignmentStage.UNSPECIFIED))
    if stage is AssignmentStage.LIVE and job.state is JobState.READY:
        return False
    statuses = [status_of(context, job, seat) for seat in active_seats(context, job, placement)]
    if stage is AssignmentStage.PREPARE and all(
        has_reached(job, status, FENCED_OR_LATER) for status in statuses
    ):
        timeline.fenced(context, job)
    if not all(has_done(context, job, status) for status in statuses):
        return False
    if stage is AssignmentStage.START:
        _prepare(context, job, placement)
    elif stage is AssignmentStage.PREPARE:
        _publish(context, job, placement)
    elif stage is AssignmentStage.LIVE:
        _ready(context, job)
    return stage in (AssignmentStage.START, AssignmentStage.PREPARE)


def _prepare(context: Context, job: Job, placement: Placement) -> None:
    state = RouteState.STARTING if job.live_epoch == 0 else RouteState.FENCED
    put_routes(context, job, placement, state)
    moves, restores, incident_id = timeline.journal_of(context, job)
    put_assignments(
        context,
        job,
        placement,
        AssignmentStage.PREPARE,
        incident_id=incident_id,
        moves=moves,
        restores=restores,
    )
    timeline.started(context, job)


def _publish(context: Context, job: Job, placement: Placement) -> None:
    """The epoch is live: routers may send, ranks may answer."""
    job = replace(job, live_epoch=job.epoch)
    put_job(context, job)
    put_routes(context, job, placement, RouteState.LIVE)
    promote_assignments(context, job, placement)
    timeline.repaired(context, job)
    context.state.stimulus(job.uid)


def _ready(context: Context, job: Job) -> None:
    recovered = job.state is JobState.RECOVERING
    message = f"all ranks acknowledged epoch {job.epoch}"
    job = replace(
        job,
        state=JobState.READY,
        why=Why(reason=Decision.READY, message=message),
        ready_time=job.ready_time or context.now,
    )
    put_job(context, job)
    kind = "EPOCH_PUBLISHED" if recovered else "JOB_READY"
    note(context, kind, job.uid, message, epoch=job.epoch)
    timeline.published(context, job)


def stop(context: Context, job: Job, why: Why) -> Job:
    """End the ranks of a job; its dies stay its own until agents said that they ended."""
    placement = context.state.placement(job.uid)
    if placement is None:
        timeline.abandoned(context, job)
        return _ended(context, job, why)
    job = replace(job, state=JobState.STOPPING, why=why)
    put_job(context, job)
    put_routes(context, job, placement, RouteState.ENDED, restores=())
    clear_assignments(context, job.uid, placement)
    timeline.abandoned(context, job)
    finish_stopping(context, job)
    return context.state.require_job(job.uid)


def finish_stopping(context: Context, job: Job) -> None:
    """The job ended once no node that still speaks has a rank of it."""
    placement = context.state.placement(job.uid)
    if placement is None or not _all_ranks_ended(context, job.uid):
        return
    release(context, placement)
    context.state.delete(keys.placement(job.uid))
    _ended(context, job, job.why)


def _all_ranks_ended(context: Context, job_uid: str) -> bool:
    """An agent deletes its acknowledgements of a job once no process of it is left."""
    return all(
        context.nodes.node(node).state is NodeState.LOST
        for node in context.state.acks.get(job_uid, {})
    )


def _ended(context: Context, job: Job, why: Why) -> Job:
    """Cancelled if somebody wished it, failed for any other reason."""
    state = JobState.CANCELLED if why.says(Decision.CANCELLED) else JobState.FAILED
    job = replace(job, state=state, why=why, end_time=context.now)
    put_job(context, job)
    context.state.delete(keys.routes(job.uid))
    context.state.drop_maps(job.uid, but=0)
    context.forget(job.uid)
    note(context, "JOB_ENDED", job.uid, why.message, epoch=job.epoch)
    return job


def requeue(context: Context, job: Job, why: Why) -> Job:
    """Nothing feasible is left in place: give all dies back and wait for a whole new placement."""
    placement = context.state.placement(job.uid)
    if placement is not None:
        put_routes(context, job, placement, RouteState.FENCED, restores=())
        release(context, placement)
        context.state.delete(keys.placement(job.uid))
    clear_assignments(context, job.uid, placement or Placement(job_uid=job.uid))
    job = replace(job, state=JobState.PENDING, why=why, restarts=job.restarts + 1)
    put_job(context, job)
    note(context, "JOB_REQUEUED", job.uid, why.message, epoch=job.epoch)
    context.queue_dirty = True
    return job
