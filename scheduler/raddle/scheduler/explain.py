"""Why is it so? The story of a job, an incident, a node or a die, from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.incident import Event, Incident, InstancePlan
from raddle.model.job import Job
from raddle.model.reasons import Decision
from raddle.model.topology import parse_position
from raddle.model.types import Why
from raddle.scheduler.inventory import holds_by_subject, holds_over
from raddle.scheduler.view import Records
from raddle.v1 import types_pb2

STORY_LINES_MAX = 500
SUBJECTS_A_LINE_MAX = 8


def why_message(why: Why) -> types_pb2.Why:
    return types_pb2.Why(reason=str(why.reason), message=why.message)


def explain(
    mirror: Records, subject: str, waits_for: Callable[[str], Why | None]
) -> tuple[Why, list[str]]:
    """The reason and the story of `job/<uid>`, `incident/<id>`, `die/<position>`, `node/<...>`.

    `waits_for` tells what a job waits for by the newest decision: records keep up with the reason,
    not with every number in its sentence.

    Raises:
        PermanentError: INVALID_ARGUMENT or NOT_FOUND.
    """
    kind, _, name = subject.partition("/")
    if kind == "job":
        job, story = _job(mirror, name)
        why = waits_for(job.uid) or job.why
    elif kind == "incident":
        why, story = _incident(mirror, name)
    elif kind in ("die", "node"):
        _require_part(mirror, name)
        why, story = _place(mirror, name)
    else:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            "say job/<uid>, incident/<id>, die/<position> or node/<position>.",
        )
    return why, story[-STORY_LINES_MAX:]


def _require_part(mirror: Records, name: str) -> None:
    if parse_position(name).level == "supernode":
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"{name} is a supernode: name a node, an NPU or a die."
        )
    if not any(machine.has_position(name) for _, machine in mirror.under(keys.TOPOLOGY)):
        raise PermanentError(
            Reason.NOT_FOUND, f"{name} is not part of the machine; `raddle dies` lists it."
        )


def _events(mirror: Records, *subjects: str) -> list[Event]:
    return [e for _, e in mirror.under(keys.AUDIT) if e.subject in subjects]


def _event_line(event: Event) -> str:
    epoch = f" (epoch {event.epoch})" if event.epoch else ""
    who = f" by {event.identity}" if event.identity else ""
    return f"{event.kind}: {event.message}{epoch}{who}"


def _job(mirror: Records, job_uid: str) -> tuple[Job, list[str]]:
    job: Job | None = mirror.get(keys.job(job_uid))
    if job is None:
        space, _, short = job_uid.rpartition("/")
        owner = mirror.get(keys.name(space or "default", short))
        if owner is not None:
            return _job(mirror, owner.job_uid)
        raise PermanentError(
            Reason.NOT_FOUND, f"There is no job {job_uid}; `raddle status` lists jobs."
        )
    story = [_event_line(event) for event in _events(mirror, job_uid)]
    for _, incident in mirror.under(keys.INCIDENTS):
        if any(plan.job_uid == job_uid for plan in incident.plans):
            story += [f"incident {incident.id} ({incident.phase}): {incident.why.message}"]
    return job, story


def _incident(mirror: Records, incident_id: str) -> tuple[Why, list[str]]:
    incident: Incident | None = mirror.get(keys.incident(incident_id))
    if incident is None:
        raise PermanentError(
            Reason.NOT_FOUND, f"There is no incident {incident_id}; `raddle incidents` lists them."
        )
    story = _folded((f"{f.kind}: {f.message}", f.subject) for f in incident.faults)
    for plan in incident.plans:
        story.append(f"job {plan.job_uid} moves to epoch {plan.epoch}")
        for instance in plan.instances:
            story += _instance_lines(instance)
    for entry in incident.timeline:
        took = f"{entry.duration * 1000:.1f} ms" if entry.duration else "not timed"
        story.append(f"{entry.phase.lower()}: {took}; {entry.message}")
    return incident.why, story


def _folded(told: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each text, with the subjects that it is told of, in the order of the first."""
    subjects: dict[str, dict[str, None]] = {}
    for text, subject in told:
        subjects.setdefault(text, {})[subject] = None
    return [f"{text} ({_few(list(names))})" for text, names in subjects.items()]


def _few(names: list[str]) -> str:
    """The first names and how many more there are."""
    more = len(names) - SUBJECTS_A_LINE_MAX
    text = ", ".join(names[:SUBJECTS_A_LINE_MAX])
    return f"{text} and {more} more" if more > 0 else text


def _instance_lines(plan: InstancePlan) -> list[str]:
    lost = _few([str(rank) for rank in plan.lost_ranks])
    lines = [
        (
            f"{plan.role}/{plan.instance}: {plan.option}, ranks {lost} are lost,"
            f" {plan.experts_moved} experts move, {plan.sequences_restored} sequences continue"
            f" ({plan.kv_tokens_restored} tokens restored, {plan.kv_tokens_recomputed} recomputed)"
        )
    ]
    if plan.sequences_given_up:
        lines.append(f"  {plan.sequences_given_up} sequences are given up: their time is over")
    if plan.kv_last_predicted:
        lines.append(
            f"  sequences make tokens again: half {_measured(plan.kv_median_actual)}"
            f" ({plan.kv_median_predicted:.3f} s predicted), all {_measured(plan.kv_last_actual)}"
            f" ({plan.kv_last_predicted:.3f} s predicted)"
        )
    for option in plan.considered:
        verdict = "chosen" if option.chosen else ("feasible" if option.feasible else "not feasible")
        numbers = (
            f"pause {option.predicted_pause:.2f} s, {option.experts_moved} experts,"
            f" {option.capacity_left:.0%} of the ranks, cost {option.cost:.2f} s"
        )
        lines.append(f"  {option.option}: {verdict}: {option.why.message} [{numbers}]")
    return lines


def _measured(seconds: float) -> str:
    return f"after {seconds:.3f} s" if seconds else "not yet, or nobody saw it"


def _overlap(one: str, other: str) -> bool:
    """Is one of two positions the other, or part of it?"""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def _place(mirror: Records, position: str) -> tuple[Why, list[str]]:
    story = [_event_line(event) for event in _events(mirror, position)]
    for _, incident in mirror.under(keys.INCIDENTS):
        story += _folded(
            (f"incident {incident.id}: {fault.kind} {fault.message}", fault.subject)
            for fault in incident.faults
            if _overlap(fault.subject, position)
        )
    holds = holds_over(holds_by_subject(mirror), position)
    story += [f"held: {h.kind} on {h.subject} by {h.created_by}: {h.message}" for h in holds]
    if holds:
        return Why(reason=holds[0].kind, message=holds[0].message), story
    node = "/".join(position.split("/")[:2])
    if mirror.get(keys.registration(node)) is None:
        return Why(reason=Decision.ABSENT, message=f"no agent ever registered for {node}"), story
    health = mirror.get(keys.health(node))
    if health is None:
        return Why(reason=Decision.SILENT, message=f"the agent of {node} has no lease"), story
    faults = [f for f in health.active_faults if _overlap(f.subject, position)]
    if faults:
        codes = ", ".join(f"{f.code} on {f.subject}" for f in faults)
        return Why(reason=Decision.FAULT, message=f"active faults: {codes}"), story
    return Why(reason=Decision.HEALTHY, message="no hold, no fault, the agent reports"), story
