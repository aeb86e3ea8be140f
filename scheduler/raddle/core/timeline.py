"""The journal of recoveries: phases of incidents and how long each took.

In go the steps of jobs that an incident's plan is about; out come updated incident records. The
phases are detect (first sign to decision), decide (decision to commit), fence, repair, publish.
Durations are told only where one leader saw both ends: clocks of two hosts are never compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from raddle.core.context import Context, is_ended
from raddle.model import keys
from raddle.model.incident import Incident, IncidentPhase, TimelineEntry
from raddle.model.job import Job, JobState
from raddle.model.types import ExpertMove, RankKey, SequenceRestore

_ORDER = list(IncidentPhase)


def incidents_of(context: Context, job: Job) -> list[Incident]:
    """Open incidents whose newest plan for this job is the job's epoch."""
    return [
        incident
        for incident in context.state.open_incidents()
        if any(p.job_uid == job.uid and p.epoch == job.epoch for p in incident.plans)
    ]


def enter(context: Context, incident: Incident, phase: IncidentPhase, message: str) -> Incident:
    """End the running phase and begin the next; a phase that was reached is not entered again."""
    if _ORDER.index(phase) <= _ORDER.index(incident.phase):
        return incident
    entries = ended(context, incident)
    if phase is IncidentPhase.CLOSED:
        incident = replace(incident, phase=phase, timeline=entries, end_time=context.now)
    else:
        entry = began(context, incident.id, phase, message)
        incident = replace(incident, phase=phase, timeline=(*entries, entry))
    context.state.put(keys.incident(incident.id), incident)
    context.state.stimulus(incident.id)
    return incident


def began(context: Context, incident_id: str, phase: IncidentPhase, message: str) -> TimelineEntry:
    """A phase that begins now."""
    context.phase_began[incident_id] = context.now
    return TimelineEntry(phase=phase, start_time=context.now, message=message)


def ended(context: Context, incident: Incident) -> tuple[TimelineEntry, ...]:
    """The incident's entries, the last one ended now; without a duration if we did not begin it."""
    entries = incident.timeline
    start_s = context.phase_began.pop(incident.id, None)
    if not entries or entries[-1].duration:
        return entries
    last = entries[-1]
    if start_s is None:
        message = f"{last.message}; continued by the next leader"
        return (*entries[:-1], replace(last, message=message))
    return (*entries[:-1], replace(last, duration=max(context.now - start_s, 1e-6)))


def committed(context: Context, incident_id: str) -> None:
    """The decision is in the store: from now on ranks are being fenced."""
    incident = context.state.records.get(keys.incident(incident_id))
    if incident is not None and incident.phase is IncidentPhase.DECIDE:
        enter(context, incident, IncidentPhase.FENCE, "ranks quiesce, routers withdraw")
        # From now on it counts how long an agent says nothing, should none of them say a word.
        context.touched |= dict.fromkeys(plan.job_uid for plan in incident.plans)


def started(context: Context, job: Job) -> None:
    """New processes are up; the running ones were fenced while they started."""
    for incident in incidents_of(context, job):
        enter(context, incident, IncidentPhase.REPAIR, "new ranks are up, weights and KV load")


def fenced(context: Context, job: Job) -> None:
    for incident in incidents_of(context, job):
        enter(context, incident, IncidentPhase.REPAIR, "members, maps, weights and KV change")


def repaired(context: Context, job: Job) -> None:
    for incident in incidents_of(context, job):
        enter(context, incident, IncidentPhase.PUBLISH, f"epoch {job.epoch} goes live")


def published(context: Context, job: Job) -> None:
    """All ranks serve: close the incidents whose every job is live at its plan's epoch or later.

    Also those whose plan for this job gave way to a newer one, under another incident.
    """
    for incident in context.state.open_incidents():
        mine = any(p.job_uid == job.uid for p in incident.plans)
        if mine and all(_is_done(context, p.job_uid, p.epoch) for p in incident.plans):
            enter(context, incident, IncidentPhase.CLOSED, "")


def abandoned(context: Context, job: Job) -> None:
    """The job ends or starts over: its incidents have nothing left to repair for it."""
    for incident in context.state.open_incidents():
        if any(p.job_uid == job.uid for p in incident.plans):
            others = [p for p in incident.plans if p.job_uid != job.uid]
            if all(_is_done(context, p.job_uid, p.epoch) for p in others):
                enter(context, incident, IncidentPhase.CLOSED, "")


def _is_done(context: Context, job_uid: str, epoch: int) -> bool:
    job = context.state.job(job_uid)
    return job is None or is_ended(job) or job.state is JobState.STOPPING or job.live_epoch >= epoch


def journal_of(
    context: Context, job: Job
) -> tuple[Callable[[RankKey], tuple[ExpertMove, ...]], tuple[SequenceRestore, ...], str]:
    """Moves, restores and incident that the running assignments of this epoch carry."""
    moves: dict[RankKey, tuple[ExpertMove, ...]] = {}
    incident_id = ""
    for node in context.state.nodes_assigned(job.uid):
        for item in context.state.assignment(node).jobs:
            if item.job_uid == job.uid and item.epoch == job.epoch:
                incident_id = item.incident_id
                moves.update({rank.rank: rank.moves for rank in item.ranks})
    routes = context.state.routes(job.uid)
    restores = routes.restores if routes is not None and routes.epoch == job.epoch else ()
    return lambda key: moves.get(key, ()), restores, incident_id
