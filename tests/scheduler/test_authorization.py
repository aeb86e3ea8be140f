"""Who may do what where: a namespace is a wall in calls, lists, watches and stories."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.incident import Event, Incident, IncidentFault, JobPlan
from raddle.model.job import Job, JobSpec
from raddle.model.kinds import FaultKind
from raddle.scheduler.authorization import DEFAULT, VERBS, Policy, Rule, load_policy
from raddle.scheduler.leader import Leader
from raddle.scheduler.view import View
from raddle.v1 import job_pb2, router_pb2, router_pb2_grpc, scheduler_pb2
from raddle.wire.status import error_from
from tests.scheduler.conftest import Served, job_spec, refusal

TEAM = "client/a"
DOOR = "frontdoor/a"
POLICY = Policy(
    [
        Rule(["client/admin"], ["read", "write", "admin", "report", "route"]),
        Rule([TEAM], ["read", "write"], ["team-a"]),
        Rule([DOOR], ["route"], ["team-a"]),
    ]
)
DENIED = Reason.PERMISSION_DENIED


class Teams:
    """A job of each team, and a caller who is of team a."""

    def __init__(self, served: Served, own: job_pb2.Job, foreign: job_pb2.Job) -> None:
        self.served = served
        self.stub = served.stub(TEAM)
        self.own = own
        self.foreign = foreign


@pytest.fixture
async def teams(served: Served) -> Teams:
    own = await served.submit("one", "team-a")
    foreign = await served.submit("two", "team-b")
    served.set_policy(POLICY)
    return Teams(served, own, foreign)


async def reports(front_door_id: str, uid: str) -> AsyncIterator[Any]:
    yield router_pb2.ReportSequencesRequest(front_door_id=front_door_id, job_uid=uid, snapshot=True)


def update(uid: str, namespace: str = "") -> scheduler_pb2.UpdateJobRequest:
    request = scheduler_pb2.UpdateJobRequest(job_uid=uid)
    request.spec.namespace, request.spec.priority = namespace, 3
    request.update_mask.paths.append("priority")
    return request


async def test_the_jobs_own_namespace_counts(teams: Teams) -> None:
    """Another namespace in the request opens no door, and none in it closes no own one."""
    stub = teams.stub
    own, foreign = teams.own.uid, teams.foreign.uid
    assert (await stub.UpdateJob(update(own))).job.spec.priority == 3
    for namespace in ("team-a", "", "team-b"):
        assert (await refusal(stub.UpdateJob(update(foreign, namespace)))).reason is DENIED
    calls: list[Any] = [
        stub.GetJob(scheduler_pb2.GetJobRequest(job_uid=foreign, namespace="team-a")),
        stub.GetJob(scheduler_pb2.GetJobRequest(namespace="team-b", name="two")),
        stub.GetJob(scheduler_pb2.GetJobRequest(name="anything")),
        stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=foreign)),
        stub.DeleteJob(scheduler_pb2.DeleteJobRequest(job_uid="j-unknown")),
        stub.SubmitJob(scheduler_pb2.SubmitJobRequest(spec=job_spec("three", ""))),
        stub.SubmitJob(scheduler_pb2.SubmitJobRequest(spec=job_spec("three", "team-b"))),
        stub.ListJobs(scheduler_pb2.ListJobsRequest(namespace="team-b")),
        stub.Explain(scheduler_pb2.ExplainRequest(subject=f"job/{foreign}")),
        stub.Explain(scheduler_pb2.ExplainRequest(subject="job/team-b/two")),
        stub.ListEvents(scheduler_pb2.ListEventsRequest(subject=foreign)),
        stub.ListIncidents(scheduler_pb2.ListIncidentsRequest(job_uid=foreign)),
        stub.Cordon(scheduler_pb2.CordonRequest(subject="sn0/n00")),
        stub.ReportPods(scheduler_pb2.ReportPodsRequest(job_uid=foreign)),
        # Of its own jobs too: a pod's end is the operator's word.
        stub.ReportPods(scheduler_pb2.ReportPodsRequest(job_uid=own)),
    ]
    for call in calls:
        assert (await refusal(call)).reason is DENIED
    job = await stub.GetJob(scheduler_pb2.GetJobRequest(namespace="team-a", name="one"))
    assert job.job.uid == own
    await stub.Explain(scheduler_pb2.ExplainRequest(subject=f"job/{own}"))
    await stub.ListNodes(scheduler_pb2.ListNodesRequest())
    await stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=own))


async def test_lists_and_watches_show_the_callers_part(teams: Teams) -> None:
    """Without a namespace each caller gets the jobs and events that it may see."""
    for identity, expected in ((TEAM, {"one"}), ("client/admin", {"one", "two"})):
        stub = teams.served.stub(identity)
        listed = await stub.ListJobs(scheduler_pb2.ListJobsRequest())
        assert {job.spec.name for job in listed.jobs} == expected
        stream = stub.WatchJobs(scheduler_pb2.WatchJobsRequest())
        seen = set()
        while (message := await stream.read()).kind == scheduler_pb2.WATCH_KIND_SNAPSHOT:
            seen.add(message.job.spec.name)
        assert seen == expected
        stream.cancel()
        events = await stub.ListEvents(scheduler_pb2.ListEventsRequest())
        accepted = [e.message for e in events.events if e.kind == "JOB_ACCEPTED"]
        assert {text.rpartition("/")[2] for text in accepted} == expected


async def test_routes_are_a_namespaces_own(teams: Teams) -> None:
    """A front door hears only of jobs in its namespaces, and tells only of those."""
    router: Any = router_pb2_grpc.RouterStub(teams.served.channel(DOOR))
    foreign = teams.foreign.uid
    ack = router_pb2.AckRoutesRequest(front_door_id=f"{DOOR}/1", job_uid=foreign)
    assert (await refusal(router.AckRoutes(ack))).reason is DENIED
    for request in (
        router_pb2.WatchRoutesRequest(job_uid=foreign),
        router_pb2.WatchRoutesRequest(namespace="team-b", name="two"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.WatchRoutes(request).read()
        assert error_from(caught.value).reason is DENIED
    await router.ReportSequences(reports(f"{DOOR}/1", teams.own.uid))
    assert (await refusal(router.ReportSequences(reports(f"{DOOR}/1", foreign)))).reason is DENIED


async def test_reports_that_find_no_room_end_their_stream(
    teams: Teams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a leader cannot take is not dropped in silence: the next stream tells everything."""
    monkeypatch.setattr(Leader, "tell", lambda _leader, _event: False)
    router: Any = router_pb2_grpc.RouterStub(teams.served.channel(DOOR))
    error = await refusal(router.ReportSequences(reports(f"{DOOR}/1", teams.own.uid)))
    assert error.reason is Reason.LIMIT_EXCEEDED


@pytest.mark.parametrize("front_door_id", [f"{DOOR}/1", f"{DOOR}/2"])
async def test_a_front_door_reports_under_its_callers_name(
    teams: Teams, front_door_id: str
) -> None:
    """One identity may have several front doors, told apart after the last slash."""
    router: Any = router_pb2_grpc.RouterStub(teams.served.channel(DOOR))
    own = teams.own.uid
    await router.AckRoutes(router_pb2.AckRoutesRequest(front_door_id=front_door_id, job_uid=own))
    await router.ReportSequences(reports(front_door_id, own))


@pytest.mark.parametrize(
    "front_door_id", ["frontdoor/1", "frontdoor/b/1", "frontdoor/a", f"{DOOR}-b/1", f"{DOOR}/b/1"]
)
async def test_a_front_door_may_not_report_for_another(teams: Teams, front_door_id: str) -> None:
    """Not even for one of its own jobs, whose sequences it would take away; it is logged."""
    router: Any = router_pb2_grpc.RouterStub(teams.served.channel(DOOR))
    own = teams.own.uid
    ack = router_pb2.AckRoutesRequest(front_door_id=front_door_id, job_uid=own)
    with capture_logs() as logs:
        for call in (router.AckRoutes(ack), router.ReportSequences(reports(front_door_id, own))):
            error = await refusal(call)
            assert error.reason is DENIED
            assert f"{DOOR} may not report for front door {front_door_id}" in error.message
    told = [(line["identity"], line["front_door"]) for line in logs if line["event"] == "refused"]
    assert told == [(DOOR, front_door_id)] * 2


ROUTING = {"WatchRoutes", "AckRoutes", "ReportSequences"}


@pytest.mark.parametrize(
    ("identity", "calls"),
    [("frontdoor", ROUTING), ("frontdoor/a", set()), ("rank", set()), ("", set())],
)
def test_front_doors_route_and_ranks_have_no_business_here(identity: str, calls: set[str]) -> None:
    """By default a front door may follow routes and report its sequences, and nothing else."""
    services = [scheduler_pb2.DESCRIPTOR, router_pb2.DESCRIPTOR]
    every = {m.name for d in services for s in d.services_by_name.values() for m in s.methods}
    assert every >= ROUTING | {"SubmitJob", "ListJobs", "GetJob", "GetStatus", "ReportStats"}
    may = set()
    for call in every:
        for namespace in ("", "default"):
            with suppress(PermanentError):
                DEFAULT.authorize(identity, namespace, VERBS.get(call, "read"))
                may.add(call)
    assert may == calls


async def test_a_client_is_no_front_door(teams: Teams) -> None:
    """Not even for a job of its own: it would take the sequences away."""
    router: Any = router_pb2_grpc.RouterStub(teams.served.channel(TEAM))
    own = teams.own.uid
    ack = router_pb2.AckRoutesRequest(front_door_id=f"{TEAM}/1", job_uid=own)
    assert (await refusal(router.AckRoutes(ack))).reason is DENIED
    assert (await refusal(router.ReportSequences(reports(f"{TEAM}/1", own)))).reason is DENIED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.WatchRoutes(router_pb2.WatchRoutesRequest(job_uid=own)).read()
    assert error_from(caught.value).reason is DENIED


class Records(dict[str, Any]):
    """Records by key, as the mirror has them."""

    def under(self, prefix: str) -> Any:
        return ((key, self[key]) for key in sorted(self) if key.startswith(prefix))


def test_an_incident_shows_the_part_of_the_callers_jobs() -> None:
    """Of an incident of two teams each sees its own plans; of another's, and of gone jobs, none."""
    gone = "j-0123456789ab"
    records = Records(
        {
            keys.job(f"j-{team}"): Job(uid=f"j-{team}", spec=JobSpec(namespace=f"team-{team}"))
            for team in "ab"
        }
    )

    def incident(*uids: str) -> Incident:
        plans = tuple(JobPlan(job_uid=uid) for uid in uids)
        faults = tuple(IncidentFault(kind=FaultKind.RANK_EXITED, job_uid=uid) for uid in uids)
        return Incident(id="i-1", plans=plans, faults=faults)

    view, all_of_it = View(records, POLICY, TEAM), View(records, POLICY, "client/admin")
    for uids, shown in (
        (("j-a", "j-b"), ["j-a"]),
        (("j-b",), None),
        ((gone,), None),
        ((gone, "j-a"), ["j-a"]),
    ):
        records["incidents/i-1"] = incident(*uids)
        found = view.get("incidents/i-1")
        assert (None if found is None else [p.job_uid for p in found.plans]) == shown
        assert (None if found is None else [f.job_uid for f in found.faults]) == shown
        assert all_of_it.get("incidents/i-1") == records["incidents/i-1"]
    for subject, is_shown in (("j-a", True), ("j-b", False), (gone, False), ("sn0/n00", True)):
        records["audit/e-1"] = Event(id="e-1", subject=subject)
        assert bool(list(view.under(keys.AUDIT))) is is_shown, subject


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("rules: [{identities: [a], verbs: [read], namespace: [x]}]", "namespace"),
        ("rules: [{identities: [a], verbs: [raed]}]", "raed"),
        ("rules: [{identities: [], verbs: [read]}]", "identities"),
        ("rules: [{verbs: [read]}]", "identities"),
        ("rule: []", "rule"),
        ("- a", "array"),
        ("rules: [", "policy"),
    ],
)
def test_a_policy_with_a_slip_is_refused(tmp_path: Path, text: str, word: str) -> None:
    """A misspelt key or verb would open or close doors unseen: the file is refused by name."""
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(PermanentError, match=word) as caught:
        load_policy(str(file))
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_a_rule_without_namespaces_is_for_all(tmp_path: Path) -> None:
    """What is about the whole cluster needs a rule for all namespaces."""
    file = tmp_path / "policy.yaml"
    file.write_text(
        "rules:\n- {identities: [client/*], verbs: [admin]}\n"
        "- {identities: [client/b], verbs: [write], namespaces: [team-*]}\n"
    )
    policy = load_policy(str(file))
    assert policy.allows("client/a", "", "admin")
    assert policy.allows("client/b", "team-x", "write")
    assert not policy.allows("client/b", "", "write")
    with pytest.raises(PermanentError, match="the cluster"):
        policy.authorize("client/a", "", "read")


def test_without_its_store_nobody_leads_and_says_so(served: Served) -> None:
    """A standby that could not ask the store names it; else it says that the lead changes."""
    served.replica.leader = None
    with pytest.raises(Exception, match="one is being elected") as caught:
        served.replica.require_leader()
    assert getattr(caught.value, "reason", None) is Reason.NO_LEADER
    served.replica.store_trouble = lambda: "no etcd member answers"
    with pytest.raises(Exception, match=r"no etcd member answers.*look after etcd") as caught:
        served.replica.require_leader()
    assert getattr(caught.value, "reason", None) is Reason.STORE_UNAVAILABLE
