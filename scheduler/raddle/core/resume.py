"""What the leader before left half done, or what of its records cannot be read: made whole again.

In go the records at the beginning of a term; out come writes that make them agree. A decision too
large for one transaction is committed in parts, so a leader may have gone between two of them;
and a record that was set aside as corrupted is missing here.
"""

from __future__ import annotations

from raddle.core import lifecycle, timeline
from raddle.core.admission import model_shape
from raddle.core.context import (
    Context,
    active_seats,
    clear_assignments,
    drop_assignment,
    put_assignments,
    put_routes,
    role_of,
)
from raddle.model import keys
from raddle.model.errors import Reason
from raddle.model.job import (
    Assignment,
    AssignmentStage,
    Job,
    JobAssignment,
    JobState,
    NameRecord,
    Placement,
)
from raddle.model.kinds import RoleKind
from raddle.model.routes import RouteState
from raddle.model.types import RankKey, Why

_RUNNING = (JobState.STARTING, JobState.READY, JobState.RECOVERING)
_STAGES = [AssignmentStage.START, AssignmentStage.PREPARE, AssignmentStage.LIVE]


def resume(context: Context) -> None:
    """Make the records of every job agree with each other."""
    for job in list(context.state.jobs()):
        name_key = keys.name(job.spec.namespace, job.spec.name)
        if context.state.records.get(name_key) is None:
            context.state.put(name_key, NameRecord(job_uid=job.uid))
        placement = context.state.placement(job.uid)
        if job.state not in _RUNNING:
            _end_ranks(context, job, placement)
        elif placement is None or not _is_whole(context, job, placement):
            message = "its placement or its expert maps cannot be read: it is placed anew"
            why = Why(reason=Reason.CORRUPT_RECORD, message=message)
            lifecycle.requeue(context, job, why)
        else:
            _resume_job(context, job, placement)
    _drop_strangers(context)


def _end_ranks(context: Context, job: Job, placement: Placement | None) -> None:
    """A job that waits, stops or has ended asks no node for ranks."""
    clear_assignments(context, job.uid, placement or Placement(job_uid=job.uid))
    if job.state is JobState.STOPPING and placement is None:
        lifecycle.stop(context, job, job.why)


def _is_whole(context: Context, job: Job, placement: Placement) -> bool:
    """Is the placement of the job's epoch, and are the maps of all instances with experts there?"""
    if placement.epoch != job.epoch:
        return False
    if model_shape(job.spec.model).experts == 0:
        return True
    maps = context.state.expert_maps(job.uid, placement.epoch)
    known = {(m.role, m.instance) for m in (maps.instances if maps else ())}
    return all(
        (part.role, part.instance) in known
        for part in placement.instances
        if role_of(job, part.role).kind is not RoleKind.CACHE
        and role_of(job, part.role).slots_per_rank
    )


def _resume_job(context: Context, job: Job, placement: Placement) -> None:
    live = job.live_epoch == job.epoch
    if context.state.routes(job.uid) is None:
        put_routes(context, job, placement, RouteState.LIVE if live else RouteState.FENCED)
    stage = _common_stage(context, job, placement)
    if stage is None:
        stage = AssignmentStage.LIVE if live else AssignmentStage.START
        # Moves are lost with the assignments that named them: ranks load what their map asks for.
        ids = [incident.id for incident in timeline.incidents_of(context, job)]
        put_assignments(context, job, placement, stage, incident_id="".join(ids[:1]))
    context.state.stages[job.uid] = (job.epoch, stage)


def _common_stage(context: Context, job: Job, placement: Placement) -> AssignmentStage | None:
    """The stage that all nodes were told to reach, or None if any was told something else.

    The earliest one, if a change of stage was told to some of them alone.
    """
    wanted: dict[str, dict[RankKey, int]] = {}
    for seat in active_seats(context, job, placement):
        here = wanted.setdefault(seat.placement.node, {})
        here[seat.key] = seat.placement.start_count
    if set(context.state.nodes_assigned(job.uid)) != set(wanted):
        return None
    stages: list[AssignmentStage] = []
    for node, ranks in wanted.items():
        item = _item(context.state.assignment(node), job.uid)
        if item is None or item.epoch != job.epoch or item.stage not in _STAGES:
            return None
        if {rank.rank: rank.start_count for rank in item.ranks} != ranks:
            return None
        stages.append(item.stage)
    return min(stages, key=_STAGES.index)


def _item(assignment: Assignment, job_uid: str) -> JobAssignment | None:
    return next((item for item in assignment.jobs if item.job_uid == job_uid), None)


def _drop_strangers(context: Context) -> None:
    """Ranks of jobs that were deleted end; those of a job whose record is unreadable go on."""
    state = context.state
    for key in [key for key in state.records if key.startswith(keys.ASSIGNMENTS)]:
        assignment: Assignment = state.records[key]
        for item in assignment.jobs:
            if state.job(item.job_uid) is None and state.placement(item.job_uid) is None:
                drop_assignment(context, assignment.node, item.job_uid)
