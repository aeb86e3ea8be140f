"""Why a rank's Pod does not come up or ended, as people and the scheduler are told."""

from __future__ import annotations

from typing import Any

import pytest

from raddle.operator.pod_problems import pod_problem, pod_report
from raddle.operator.reasons import PodReason
from tests.operator.test_pods import pod as made_pod

Object = dict[str, Any]
UID = "j-000000000001"


def pod(rank: Object | None = None, *, deleted: bool = False, **status: Any) -> Object:
    """The Pod of start 7 of decode/0/3, with a state of its rank's container."""
    found = made_pod()
    if deleted:
        found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    containers = [{"name": "rank", "state": rank}] if rank is not None else []
    found["status"] = {"containerStatuses": containers, **status}
    return found


def ended(code: int, reason: str = "Error", message: str = "") -> Object:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message}}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


@pytest.mark.parametrize(
    ("given", "reason", "has_ended", "said"),
    [
        (pod(ended(137, "OOMKilled")), "OOMKilled", True, "memory than its limit"),
        (pod(ended(139, message="bad\n  address")), "Error", True, "bad address (exit code 139)"),
        (pod(waiting("ErrImagePull", "x: not found")), "ErrImagePull", False, "x: not found"),
        (pod(waiting("ImagePullBackOff")), "ImagePullBackOff", False, "it waits"),
        (
            pod(waiting("CreateContainerConfigError", 'secret "a" not found')),
            "CreateContainerConfigError",
            False,
            'secret "a"',
        ),
        (
            pod(ended(137), phase="Failed", reason="Evicted", message="The node was low on memory"),
            "Evicted",
            True,
            "low on memory",
        ),
        (
            pod(phase="Failed", reason="UnexpectedAdmissionError", message="no device"),
            "UnexpectedAdmissionError",
            True,
            "no device",
        ),
        (
            pod(phase="Failed", reason="OutOfhuawei.com/Ascend910", message="none left"),
            "PodFailed",
            True,
            "OutOfhuawei.com/Ascend910: none left",
        ),
        (pod(ended(137, "OOMKilled"), deleted=True), "OOMKilled", True, "exit code 137"),
    ],
)
def test_what_goes_wrong_with_a_rank_is_told(
    given: Object, reason: str, has_ended: bool, said: str
) -> None:
    """Which start of which rank it is, whether its container is over, and Kubernetes' words."""
    report = pod_report(given, UID)
    assert report is not None
    rank = report.rank
    assert (rank.role, rank.instance, rank.rank, report.start_count) == ("decode", 0, 3, 7)
    assert (report.reason, report.has_ended) == (reason, has_ended)
    assert said in report.message
    assert report.message.isprintable()
    problem = pod_problem(given)
    assert problem is not None
    assert problem.reason == reason


@pytest.mark.parametrize(
    "given",
    [
        pod({"running": {}}),
        pod(waiting("ContainerCreating")),
        pod(ended(0, "Completed")),
        pod(ended(143), deleted=True),
        pod(ended(137), deleted=True),
        pod(waiting("ImagePullBackOff"), deleted=True),
    ],
)
def test_a_rank_that_runs_begins_or_was_asked_to_end_is_not_told(given: Object) -> None:
    """Who deleted its Pod knows why it ended."""
    assert pod_report(given, UID) is None


def test_another_container_is_the_jobs_trouble_and_not_the_ranks() -> None:
    """The rank serves on beside a container that ended; what prepares it keeps it from starting."""
    beside = pod({"running": {}})
    beside["status"]["containerStatuses"].append({"name": "sidecar", "state": ended(1)})
    assert pod_report(beside, UID) is None
    problem = pod_problem(beside)
    assert problem is not None
    assert problem.reason is PodReason.ERROR
    before = pod(waiting("PodInitializing"))
    before["status"]["initContainerStatuses"] = [{"name": "i", "state": waiting("ErrImagePull")}]
    report = pod_report(before, UID)
    assert report is not None
    assert (report.reason, report.has_ended) == ("ErrImagePull", False)


@pytest.mark.parametrize(
    "labels",
    [
        {"raddle.dev/job-uid": "j-of-before"},
        {"raddle.dev/start-count": "many"},
        {"raddle.dev/job-uid": ""},
    ],
)
def test_a_pod_of_another_job_or_of_no_rank_tells_nothing(labels: dict[str, str]) -> None:
    """An older job had the same name, or somebody labelled a Pod by hand."""
    given = pod(ended(1))
    given["metadata"]["labels"] |= labels
    assert pod_report(given, UID) is None
    given["metadata"]["labels"] = {"raddle.dev/job-uid": UID}
    assert pod_report(given, UID) is None
