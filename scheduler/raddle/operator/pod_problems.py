"""Why a Pod does not come up or has ended, for the status of a job and for the scheduler. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raddle.model.reasons import Code
from raddle.operator.names import GROUP
from raddle.operator.reasons import PodReason, named
from raddle.v1 import scheduler_pb2

RANK_CONTAINER = "rank"
_BEGINS = (None, "ContainerCreating", "PodInitializing")
#: Exit codes by SIGKILL and SIGTERM: so containers of a deleted Pod end.
_ASKED_TO_END = (137, 143)
_TOLD_CHARACTERS_MAX = 400


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps a job's objects from coming up: a Pod mostly, and what the API server says."""

    subject: str
    reason: Code
    message: str


def pod_problem(pod: Mapping[str, Any]) -> Problem | None:
    """Why a Pod does not come up; None for one that runs, ended well or only begins."""
    if (pod.get("status") or {}).get("reason"):
        # Evicted, say: how its containers ended then explains nothing.
        return _own_problem(pod)
    found = (_container_problem(pod, container) for container in _containers(pod))
    problem = next((problem for problem in found if problem is not None), None)
    return problem or _own_problem(pod)


def pod_report(pod: Mapping[str, Any], job_uid: str) -> scheduler_pb2.PodReport | None:
    """What the scheduler is told of a Pod of this job; None if nothing is wrong with its rank."""
    report = _of_rank(pod["metadata"].get("labels") or {}, job_uid)
    if report is None:
        return None
    rank = next((c for c in _containers(pod) if c.get("name") == RANK_CONTAINER), {})
    has_failed = (pod.get("status") or {}).get("phase") == "Failed"
    code = _exit_code(rank)
    if not has_failed and ("running" in (rank.get("state") or {}) or code == 0):
        return None
    problem, has_ended = pod_problem(pod), has_failed or code is not None
    if problem is None or (_is_deleted(pod) and not has_ended):
        return None
    if _is_deleted(pod) and problem.reason is PodReason.ERROR and code in _ASKED_TO_END:
        return None
    report.has_ended, report.reason = has_ended, str(problem.reason)
    report.message = " ".join(problem.message.split())[:_TOLD_CHARACTERS_MAX]
    return report


def _of_rank(labels: Mapping[str, str], job_uid: str) -> scheduler_pb2.PodReport | None:
    """Which start of which rank of the job a Pod is for; None for any other Pod."""
    if labels.get(f"{GROUP}/job-uid") != job_uid:
        return None
    try:
        report = scheduler_pb2.PodReport(start_count=int(labels[f"{GROUP}/start-count"]))
        report.rank.role = labels[f"{GROUP}/role"]
        report.rank.instance = int(labels[f"{GROUP}/instance"])
        report.rank.rank = int(labels[f"{GROUP}/rank"])
    except (KeyError, ValueError):
        # The front door's, or one that somebody labelled by hand.
        return None
    return report


def _is_deleted(pod: Mapping[str, Any]) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def _containers(pod: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """What is said of its containers; those that prepare it first."""
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _exit_code(container: Mapping[str, Any]) -> int | None:
    ended = (container.get("state") or {}).get("terminated")
    return None if ended is None else int(ended.get("exitCode") or 0)


def _container_problem(pod: Mapping[str, Any], container: Mapping[str, Any]) -> Problem | None:
    name, state = f"Pod {pod['metadata']['name']}", container.get("state") or {}
    waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
    if waiting.get("reason") not in _BEGINS:
        said = waiting.get("message") or "it waits"
        return Problem(name, *named(waiting["reason"], said, PodReason.POD_WAITS))
    if not ended.get("exitCode"):
        return None
    word, said = ended.get("reason") or str(PodReason.ERROR), (ended.get("message") or "").strip()
    reason, said = named(word, said, PodReason.POD_FAILED)
    return Problem(name, reason, f"{said or reason.meaning} (exit code {ended['exitCode']})")


def _own_problem(pod: Mapping[str, Any]) -> Problem | None:
    """Of the Pod, whatever its containers say."""
    name, status = f"Pod {pod['metadata']['name']}", pod.get("status") or {}
    if status.get("phase") == "Failed":
        word, said = status.get("reason") or "", status.get("message") or "it failed"
        return Problem(name, *named(word, said, PodReason.POD_FAILED))
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            word = condition.get("reason") or str(PodReason.UNSCHEDULABLE)
            return Problem(name, *named(word, condition["message"], PodReason.POD_WAITS))
    return None
