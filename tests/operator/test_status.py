"""What the status says: conditions from job, placement, incidents and Pods."""

from __future__ import annotations

from typing import Any

from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.model.kinds import RecoveryKind
from raddle.model.reasons import Decision
from raddle.operator import job_status
from raddle.operator.conditions import Condition, event, merged, turned
from raddle.operator.hosts import WrongDevice
from raddle.operator.pod_problems import pod_problem
from raddle.operator.reasons import EventReason, OperatorReason, PodReason
from raddle.v1 import incident_pb2
from tests.operator.resources import answer, inference_job, seat


def by_type(conditions: list[Condition]) -> dict[str, Condition]:
    return {condition.type: condition for condition in conditions}


def statuses(conditions: list[Condition]) -> dict[str, str]:
    return {condition.type: condition.status for condition in conditions}


def incident(name: str = "i-000001") -> incident_pb2.Incident:
    found = incident_pb2.Incident(id=name, subject="sn0/n00/npu0/die1", subject_kind="die")
    found.plans.add(job_uid="j-000000000001", epoch=2)
    found.why.reason, found.why.message = "REMAP", "experts move to the survivors"
    return found


def test_a_ready_job() -> None:
    """Placed and ready, nothing else."""
    found = job_status.conditions(answer(seat(0), seat(1)), None, [])
    expected = {"Queued": "False", "Placed": "True", "Ready": "True"}
    assert statuses(found) == expected | {"Degraded": "False", "Recovering": "False"}


def test_a_waiting_job_says_what_it_waits_for() -> None:
    """The scheduler's reason in Kubernetes' spelling, and its sentence."""
    told = answer(state="PENDING")
    told.job.why.reason, told.job.why.message = "WAITS_FOR_TURN", "waits behind default/other"
    queued = by_type(job_status.conditions(told, None, []))["Queued"]
    assert queued == Condition(
        "Queued", "True", Decision.WAITS_FOR_TURN, "waits behind default/other"
    )


def test_a_wrong_device_is_told_and_the_job_goes_on() -> None:
    """It stays placed and ready; both devices are named, the worst first, with what to do."""
    placed, given = "sn0/n00/npu0/die0", ("sn0/n00/npu1/die1",)
    wrong = [
        WrongDevice("default/a", placed, given, is_taken=False),
        WrongDevice("default/b", placed, given, is_taken=True),
    ]
    for pods, reason, todo in (
        (wrong[:1], OperatorReason.DEVICE_DIFFERS, "leave devices.resourceName empty"),
        (wrong, OperatorReason.DEVICE_TAKEN, f"drain {placed} (and 1 more)"),
    ):
        problems = job_status.device_problems(pods)
        found = by_type(job_status.conditions(answer(seat(0)), None, [], None, problems))
        assert (found["Placed"].status, found["Placed"].reason) == ("True", reason)
        message = found["Placed"].message
        assert all(text in message for text in (placed, given[0], todo))
        assert found["Ready"].status == "True"
    problems = job_status.device_problems(wrong)
    waiting = job_status.conditions(answer(state="PENDING"), None, [], None, problems)
    assert by_type(waiting)["Placed"].status == "False"


def test_a_lost_rank_degrades_the_job() -> None:
    """It is named."""
    told = answer(seat(0), seat(1, state="LOST"))
    degraded = by_type(job_status.conditions(told, None, []))["Degraded"]
    assert (degraded.status, degraded.reason) == ("True", OperatorReason.RANKS_LOST)
    assert degraded.message == "1 of 2 ranks are not there: decode/0/1"


def test_a_recovery_names_its_incident() -> None:
    """Ready turns false while it lasts."""
    told = answer(seat(0), seat(1), state="RECOVERING")
    found = by_type(job_status.conditions(told, incident(), []))
    assert found["Ready"].status == "False"
    assert found["Recovering"].status == "True"
    assert found["Recovering"].reason is RecoveryKind.REMAP
    assert "i-000001 on sn0/n00/npu0/die1" in found["Recovering"].message


def test_a_pod_that_does_not_come_up_is_the_reason() -> None:
    """A missing image is named, not a time-out."""
    waiting = {"reason": "ErrImagePull", "message": "localhost/raddle:dev: not found"}
    pod = {
        "metadata": {"name": "demo-decode-0-0-1"},
        "status": {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]},
    }
    problem = pod_problem(pod)
    assert problem is not None
    told = answer(seat(0), state="STARTING", live=False)
    ready = by_type(job_status.conditions(told, None, [problem]))["Ready"]
    assert ready.reason is PodReason.ERR_IMAGE_PULL
    assert "localhost/raddle:dev: not found" in ready.message


def front_door_pod(*, ready: bool, waits_for: str = "") -> dict[str, Any]:
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    state = {"waiting": {"reason": waits_for}} if waits_for else {"running": {}}
    status = {"conditions": [condition], "containerStatuses": [{"state": state}]}
    return {"metadata": {"name": "demo-frontdoor-1"}, "status": status}


def test_a_job_that_clients_cannot_reach_is_not_ready() -> None:
    """All ranks serve: the job is ready as soon as its Service leads to a ready front door."""
    told = answer(seat(0), seat(1))
    for pods, reason in (
        ([], OperatorReason.FRONT_DOOR_NOT_READY),
        ([front_door_pod(ready=False)], OperatorReason.FRONT_DOOR_NOT_READY),
        ([front_door_pod(ready=False, waits_for="ErrImagePull")], PodReason.ERR_IMAGE_PULL),
    ):
        problem = job_status.front_door_problem(pods)
        ready = by_type(job_status.conditions(told, None, [], problem))["Ready"]
        assert (ready.status, ready.reason) == ("False", reason)
    pods = [front_door_pod(ready=False), front_door_pod(ready=True)]
    assert job_status.front_door_problem(pods) is None
    assert by_type(job_status.conditions(told, None, [], None))["Ready"].status == "True"


def test_pods_that_begin_or_run_are_no_problem() -> None:
    """Only what stands in the way is told."""
    states: list[dict[str, Any]] = [
        {"waiting": {"reason": "ContainerCreating"}},
        {"running": {}},
        {"terminated": {"exitCode": 0}},
    ]
    for state in states:
        pod = {"metadata": {"name": "p"}, "status": {"containerStatuses": [{"state": state}]}}
        assert pod_problem(pod) is None
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod = {"metadata": {"name": "p"}, "status": {"containerStatuses": [{"state": killed}]}}
    problem = pod_problem(pod)
    assert problem is not None
    assert problem.reason is PodReason.OOM_KILLED


def test_a_refusal_is_false_and_an_absent_scheduler_unknown() -> None:
    """Who waits for the condition can tell the two apart."""
    unfit = PermanentError(Reason.DOES_NOT_FIT, "roles need 1000 dies together")
    away = TemporaryError(Reason.NO_LEADER, "no scheduler answers")
    assert {c.status for c in job_status.refused(unfit)} == {"False"}
    assert {c.reason for c in job_status.refused(unfit)} == {Reason.DOES_NOT_FIT}
    assert {c.status for c in job_status.refused(away)} == {"Unknown"}


def test_numbers_of_a_job_and_of_a_role() -> None:
    """Ranks that serve of those that are active; an instance is ready when all of it serves."""
    told = answer(seat(0), seat(1), seat(2, state="SPARE", start_count=0))
    assert job_status.status(told, None)["ranks"] == "2/2"
    assert job_status.role_status(told, "decode", "decode") == (1, 1)
    told.ranks[1].epoch = 1
    assert job_status.status(told, incident())["ranks"] == "1/2"
    assert job_status.role_status(told, "decode", "decode") == (1, 0)
    assert job_status.role_status(told, "decode", "cache") == (2, 1)


def test_the_newest_incident_of_the_job_counts() -> None:
    """Those of other jobs do not."""
    other = incident("i-000009")
    other.plans[0].job_uid = "j-other"
    told = {i.id: i for i in (incident("i-000002"), incident("i-000001"), other)}
    newest = job_status.newest(told, "j-000000000001")
    assert newest is not None
    assert newest.id == "i-000002"


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    """And turns with a new one; only that, or a new reason of a true one, is worth an Event."""
    first = merged([], [Condition("Ready", "False", Decision.ACCEPTED, "a")], 1, "t1")
    again = merged(first, [Condition("Ready", "False", Decision.PLACED, "b")], 2, "t2")
    assert (again[0]["lastTransitionTime"], again[0]["reason"]) == ("t1", "Placed")
    done = merged(again, [Condition("Ready", "True", Decision.READY, "c")], 2, "t3")
    assert done[0]["lastTransitionTime"] == "t3"
    assert turned(first, again) == []
    assert [c["status"] for c in turned(again, done)] == ["True"]
    other = merged(done, [Condition("Ready", "True", Decision.REBALANCING, "d")], 2, "t4")
    assert [c["reason"] for c in turned(done, other)] == ["Rebalancing"]


def test_an_event_is_told_once() -> None:
    """Its name is made of what it tells, so the server has it only once."""
    about = inference_job()

    def made(once: str) -> dict[str, Any]:
        return event(
            about, reason=EventReason.READY, message="m", warning=False, now="t", once=once
        )

    assert made("1")["metadata"]["name"] == made("1")["metadata"]["name"]
    assert made("1")["metadata"]["name"] != made("2")["metadata"]["name"]
    assert made("1")["involvedObject"]["uid"] == about["metadata"]["uid"]
