"""What the status of an InferenceJob and of its roles says. Pure.

In go the scheduler's answer about the job, its newest incident and what the API server says of the
ranks' Pods; out come conditions and numbers. Reasons are the scheduler's codes in Kubernetes'
spelling, messages its sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from raddle.model.errors import RaddleError, TemporaryError
from raddle.model.kinds import RoleKind, SeatState
from raddle.model.reasons import Code, Decision
from raddle.operator.conditions import FALSE, TRUE, UNKNOWN, Condition
from raddle.operator.hosts import WrongDevice
from raddle.operator.pod_problems import Problem, pod_problem
from raddle.operator.reasons import OperatorReason, named
from raddle.v1 import health_pb2, incident_pb2, job_pb2, scheduler_pb2

_CLOSED = incident_pb2.INCIDENT_PHASE_CLOSED
_NAMED_RANKS_MAX = 5
_ENDED = (job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_FAILED)
_PLACED = (job_pb2.JOB_STATE_STARTING, job_pb2.JOB_STATE_READY, job_pb2.JOB_STATE_RECOVERING)
_TYPES = ("Queued", "Placed", "Ready", "Degraded", "Recovering")


def refused(error: RaddleError) -> list[Condition]:
    """The scheduler did not take the job, or could not be asked."""
    status = UNKNOWN if isinstance(error, TemporaryError) else FALSE
    said = [(name, status) for name in _TYPES]
    return [Condition(name, value, error.reason, error.message) for name, value in said]


def suspended() -> list[Condition]:
    """The job is not submitted, because its resource says so."""
    message = "spec.suspend is true: the job has no dies; set it to false to submit it again"
    return [Condition(name, FALSE, OperatorReason.SUSPENDED, message) for name in _TYPES]


def ending(message: str) -> list[Condition]:
    """An older job of this name has to end first."""
    return [Condition(name, FALSE, OperatorReason.REPLACED, message) for name in _TYPES]


def conditions(
    answer: scheduler_pb2.GetJobResponse,
    incident: incident_pb2.Incident | None,
    problems: Sequence[Problem],
    front_door: Problem | None = None,
    devices: Sequence[Problem] = (),
) -> list[Condition]:
    """All conditions of a job that the scheduler has.

    Args:
        problems: what keeps Pods of the job from coming up.
        front_door: why its Service leads nowhere, if it has one and that does not.
        devices: Pods that were given other devices than the placement says.
    """
    job = answer.job
    reason, message = named(job.why.reason, job.why.message or "no more is known")
    placed = job.state in _PLACED
    ready = job.state == job_pb2.JOB_STATE_READY
    recovering = job.state == job_pb2.JOB_STATE_RECOVERING
    why_placed = answer.placement.why.message if placed else message
    against = problems
    if ready:
        # What still comes up beside a job that serves does not concern its clients; the way does.
        against = [front_door] if front_door is not None else []
    return [
        _condition("Queued", job.state == job_pb2.JOB_STATE_PENDING, reason, message),
        _placed(placed, reason, why_placed or message, devices),
        _ready(ready, reason, message, against),
        _degraded(answer.placement, placed, reason, message),
        _condition("Recovering", recovering, *_recovery(recovering, incident, reason, message)),
    ]


def unchanged(found: Iterable[Condition], error: RaddleError) -> list[Condition]:
    """The conditions of a job that goes on, with why it is not as its resource asks."""
    said = f"not changed as asked: {error.message}"
    return [
        replace(condition, message=f"{condition.message}; {said}")
        if condition.type == "Ready"
        else condition
        for condition in found
    ]


def _condition(name: str, holds: bool, reason: Code, message: str) -> Condition:
    return Condition(name, TRUE if holds else FALSE, reason, message)


def _placed(placed: bool, reason: Code, message: str, devices: Sequence[Problem]) -> Condition:
    """A job stays placed though kubelet means other devices; who looks has to know it."""
    if not placed:
        return _condition("Placed", False, reason, message)
    if not devices:
        return _condition("Placed", True, Decision.PLACED, message)
    return _condition("Placed", True, *_first_of(devices))


def _first_of(problems: Sequence[Problem]) -> tuple[Code, str]:
    """The first problem, and how many more there are."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return first.reason, f"{first.subject}: {first.message}{more}"


def _ready(ready: bool, reason: Code, message: str, problems: Sequence[Problem]) -> Condition:
    """A Pod that cannot come up says more than that the job waits for it."""
    if not problems:
        return _condition("Ready", ready, reason, message)
    return _condition("Ready", False, *_first_of(problems))


def _degraded(placement: job_pb2.Placement, placed: bool, reason: Code, message: str) -> Condition:
    if not placed:
        return _condition("Degraded", False, reason, message)
    lost = [
        f"{part.role}/{part.instance}/{rank.rank}"
        for part in placement.instances
        for rank in part.ranks
        if rank.state in (SeatState.LOST, SeatState.DRAINED)
    ]
    if not lost:
        return _condition(
            "Degraded", False, OperatorReason.ALL_RANKS_ACTIVE, "every rank of the job is active"
        )
    total = sum(len(part.ranks) for part in placement.instances)
    shown = ", ".join(lost[:_NAMED_RANKS_MAX]) + (", ..." if len(lost) > _NAMED_RANKS_MAX else "")
    message = f"{len(lost)} of {total} ranks are not there: {shown}"
    return _condition("Degraded", True, OperatorReason.RANKS_LOST, message)


def _recovery(
    recovering: bool, incident: incident_pb2.Incident | None, reason: Code, message: str
) -> tuple[Code, str]:
    if not recovering or incident is None:
        return reason, message
    said = f"incident {incident.id} on {incident.subject}: {incident.why.message}"
    return named(incident.why.reason or str(reason), said)


def status(
    answer: scheduler_pb2.GetJobResponse, incident: incident_pb2.Incident | None
) -> dict[str, Any]:
    """The numbers of a job's status; conditions come beside them."""
    job = answer.job
    active, live = _counts(answer)
    return {
        "jobUid": job.uid,
        "state": job_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_"),
        "epoch": job.epoch,
        "liveEpoch": job.live_epoch,
        "restarts": job.restarts,
        "ranks": f"{live}/{active}",
        "incident": incident.id if incident is not None else None,
        "readyTime": _time(job.ready_time) if job.HasField("ready_time") else None,
    }


def _time(moment: Timestamp) -> str | None:
    return f"{moment.ToDatetime().isoformat(timespec='seconds')}Z" if moment.seconds else None


def _live(answer: scheduler_pb2.GetJobResponse) -> set[tuple[str, int, int]]:
    """Ranks that serve at the newest epoch."""
    return {
        (rank.role, rank.instance, rank.rank)
        for rank in answer.ranks
        if rank.stage == health_pb2.RANK_STAGE_LIVE and rank.epoch == answer.job.epoch
    }


def _counts(answer: scheduler_pb2.GetJobResponse) -> tuple[int, int]:
    """(active ranks of the placement, those of them that serve)."""
    live = _live(answer)
    active = [
        (part.role, part.instance, rank.rank)
        for part in answer.placement.instances
        for rank in part.ranks
        if rank.state == SeatState.ACTIVE
    ]
    return len(active), sum(key in live for key in active)


def role_status(answer: scheduler_pb2.GetJobResponse, role: str, kind: str) -> tuple[int, int]:
    """(replicas, ready replicas) of a role: instances, or ranks of a cache."""
    live = _live(answer)
    instances = [
        [
            (part.role, part.instance, rank.rank) in live
            for rank in part.ranks
            if rank.state == SeatState.ACTIVE
        ]
        for part in answer.placement.instances
        if part.role == role
    ]
    if kind == RoleKind.CACHE:
        ranks = [rank for instance in instances for rank in instance]
        return len(ranks), sum(ranks)
    return len(instances), sum(bool(instance) and all(instance) for instance in instances)


def role_conditions(replicas: int, ready: int, job: Iterable[Condition]) -> list[Condition]:
    """A role is ready when all its replicas serve."""
    if replicas and ready == replicas:
        return [Condition("Ready", TRUE, Decision.READY, f"all {replicas} replicas serve")]
    of_job = next(c for c in job if c.type == "Ready")
    message = f"{ready} of {replicas} replicas serve; the job: {of_job.message}"
    return [Condition("Ready", FALSE, of_job.reason, message)]


def newest(
    incidents: Mapping[str, incident_pb2.Incident], job_uid: str
) -> incident_pb2.Incident | None:
    """The newest incident with a plan for the job; their ids grow."""
    about = [
        incident
        for incident in incidents.values()
        if any(plan.job_uid == job_uid for plan in incident.plans)
    ]
    return max(about, key=lambda incident: incident.id, default=None)


def is_closed(incident: incident_pb2.Incident) -> bool:
    return incident.phase == _CLOSED


def is_over(job: job_pb2.Job) -> bool:
    """Nothing of the job shall run any more: it has ended or is being ended."""
    return is_ended(job) or job.state == job_pb2.JOB_STATE_STOPPING


def is_ended(job: job_pb2.Job) -> bool:
    return job.state in _ENDED


def device_problems(wrong: Iterable[WrongDevice]) -> list[Problem]:
    """What is to be done about devices that kubelet gave otherwise; the worst first."""
    found = []
    for pod in sorted(wrong, key=lambda pod: (not pod.is_taken, pod.pod)):
        message = f"kubelet gave it {', '.join(pod.given)}, and its rank is placed on {pod.placed}"
        if pod.is_taken:
            reason = OperatorReason.DEVICE_TAKEN
            todo = f"which a Pod of somebody else was given: delete that Pod, or drain {pod.placed}"
        else:
            reason = OperatorReason.DEVICE_DIFFERS
            todo = (
                "which kubelet may give to another Pod: keep Pods of others that ask for devices"
                " off this node, or leave devices.resourceName empty"
            )
        found.append(Problem(f"Pod {pod.pod}", reason, f"{message}, {todo}"))
    return found


def front_door_problem(pods: Iterable[Mapping[str, Any]]) -> Problem | None:
    """Why the job's Service leads nowhere; None if one of the front door's Pods is ready."""
    pods = list(pods)
    if any(_is_pod_ready(pod) for pod in pods):
        return None
    message = "no Pod of it is ready, and the job's Service leads nowhere"
    found = (problem for pod in pods if (problem := pod_problem(pod)) is not None)
    return next(found, Problem("front door", OperatorReason.FRONT_DOOR_NOT_READY, message))


def _is_pod_ready(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == TRUE for c in conditions)
