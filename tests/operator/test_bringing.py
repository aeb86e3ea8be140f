"""What is done about an InferenceJob, where the API server and the scheduler are dictionaries."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.operator.cluster import Cluster
from raddle.operator.hosts import Host, WrongDevice, host_of
from raddle.operator.jobs import Jobs
from raddle.operator.machine import Machine
from raddle.operator.names import FINALIZER, MANAGER
from raddle.operator.scheduler_link import Picture, SchedulerLink
from raddle.operator.spec import job_message
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from raddle.wire.rank_tables import TableRank
from tests.operator.resources import SITE, Object, answer, inference_job, role, seat, stored
from tests.wire.test_rank_tables import make_table_rank

#: Kinds of what stands for ranks.
KEPT = ("InferenceRole", "Pod", "ConfigMap")


class ApiServer:
    """Objects by kind and name."""

    def __init__(self, *items: Object) -> None:
        self.items = {(item["kind"], item["metadata"]["name"]): item for item in items}

    async def get(self, kind: str, _namespace: str, name: str) -> Object | None:
        return self.items.get((kind, name))

    async def find(self, kind: str, _namespace: str = "", _selector: str = "") -> list[Object]:
        return [item for (known, _), item in self.items.items() if known == kind]

    async def patch(self, item: Object, change: Object, *, part: str = "") -> Object | None:
        found = self.items.get((item["kind"], item["metadata"]["name"]))
        if found is None:
            return None
        for name, value in change.items():
            found[name] = (found.get(name) or {}) | value
        return found

    async def apply(self, item: Object) -> Object:
        return await self.create(item)

    async def create(self, item: Object) -> Object:
        item["metadata"] = {"uid": f"uid-{len(self.items)}", "generation": 1, **item["metadata"]}
        return self.items.setdefault((item["kind"], item["metadata"]["name"]), item)

    async def delete(self, item: Object) -> None:
        del self.items[item["kind"], item["metadata"]["name"]]


class Scheduler:
    """One job, and the calls that came."""

    def __init__(self, state: str) -> None:
        self.incidents = Picture("incident", "id")
        self.answer = answer(seat(0), state=state)
        self.answer.job.managed_by = MANAGER
        self.calls: list[str] = []
        #: Ranks of the Pods that were reported, with the reasons.
        self.reported: list[tuple[int, str]] = []
        self.away = False
        #: Raised by calls that change the job.
        self.refuses: RaddleError | None = None

    async def call(self, method: str, request: Any) -> Any:
        self.calls.append(method)
        if self.away:
            raise TemporaryError(Reason.NO_LEADER, "away")
        if method == "ReportPods":
            if self.refuses is None:
                self.reported += [(pod.rank.rank, pod.reason) for pod in request.pods]
                return scheduler_pb2.ReportPodsResponse()
            raise self.refuses
        if method == "GetJob":
            return self.answer
        if self.refuses is not None:
            raise self.refuses
        return scheduler_pb2.CancelJobResponse(job=self.answer.job)


class Nodes:
    """One Kubernetes node plays all nodes of the machine."""

    def __init__(self, *wrong: WrongDevice) -> None:
        self.wrong = list(wrong)

    def require_known(self) -> None:
        pass

    def host_of(self, _node: str) -> Host:
        return host_of({"metadata": {"name": "worker-1"}}, ())

    def device_of(self, _die: str) -> None:
        return None

    def wrong_devices(self, _pods: Collection[Object]) -> list[WrongDevice]:
        return self.wrong

    def table_rank(self, rank: job_pb2.RankPlacement, pod_ip: str) -> TableRank:
        return make_table_rank(rank.rank, pod_ip=pod_ip)


def jobs_of(api: ApiServer, scheduler: Scheduler, nodes: Nodes | None = None) -> Jobs:
    link, machine = cast("SchedulerLink", scheduler), cast("Machine", nodes or Nodes())
    return Jobs(cast("Cluster", api), link, machine, SITE, ranks_in_pods=True)


def scheduler_of(resource: Object, state: str = "READY") -> Scheduler:
    """It has the job of a resource, as that asks for it."""
    scheduler = Scheduler(state)
    scheduler.answer.job.spec.CopyFrom(stored(job_message(resource, {})))
    scheduler.answer.job.idempotency_key = resource["metadata"]["uid"]
    return scheduler


def running_job() -> tuple[ApiServer, Scheduler, Object]:
    """A job of one rank that serves; its Pods are still to be made."""
    resource = inference_job("demo", role("decode", ranks=1))
    resource["metadata"] |= {"finalizers": [FINALIZER], "resourceVersion": "1"}
    scheduler = scheduler_of(resource)
    del scheduler.answer.ranks[:]
    return ApiServer(resource), scheduler, resource


async def test_rank_tables_come_before_their_pods_and_go_with_them() -> None:
    """No rank reads an older table; those of an instance that went or of a job that ends go."""
    api, scheduler, resource = running_job()
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    table, pod = ("ConfigMap", "demo-decode-{}-ranktable"), ("Pod", "demo-decode-{}-0-1")

    def made(instance: int) -> list[tuple[str, str]]:
        wanted = [(kind, name.format(instance)) for kind, name in (table, pod)]
        return [key for key in api.items if key in wanted]

    assert [kind for kind, _ in made(0)] == ["ConfigMap", "Pod"]
    scheduler.answer.placement.instances[0].instance = 1
    await jobs.bring("default", "demo")
    assert made(0) == []
    assert [kind for kind, _ in made(1)] == ["ConfigMap", "Pod"]
    resource["spec"]["suspend"] = True
    await jobs.bring("default", "demo")
    assert made(1) == []


async def test_what_goes_does_not_wait_for_what_cannot_be_made() -> None:
    """A stranger's object in the way of the next ranks keeps no Pod that nobody asks for."""
    api, scheduler, _ = running_job()
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    scheduler.answer.placement.instances[0].instance = 1
    stranger = {"name": "demo-decode-1-ranktable", "namespace": "default"}
    api.items["ConfigMap", stranger["name"]] = {"kind": "ConfigMap", "metadata": stranger}
    with pytest.raises(PermanentError, match="is not of InferenceJob demo"):
        await jobs.bring("default", "demo")
    assert await api.find("Pod") == []


@pytest.mark.parametrize(
    "error",
    [
        PermanentError(Reason.DOES_NOT_FIT, "1000 dies are too many"),
        TemporaryError(Reason.STORE_UNAVAILABLE, "not just now"),
    ],
)
async def test_a_job_whose_change_is_refused_goes_on(error: RaddleError) -> None:
    """Its status stays true and says why it is not as asked, and its Pods are made as ever."""
    api, scheduler, resource = running_job()
    resource["spec"]["roles"][0]["instances"] = 2
    scheduler.refuses = error
    with pytest.raises(type(error), match=error.message):
        await jobs_of(api, scheduler).bring("default", "demo")
    assert [pod["metadata"]["name"] for pod in await api.find("Pod")] == ["demo-decode-0-0-1"]
    status = resource["status"]
    assert (status["jobUid"], status["state"]) == (scheduler.answer.job.uid, "READY")
    said = {condition["type"]: condition for condition in status["conditions"]}
    assert said["Placed"]["status"] == "True"
    assert f"not changed as asked: {error.message}" in said["Ready"]["message"]
    told = "ChangeRefused" in {event["reason"] for event in await api.find("Event")}
    assert told == isinstance(error, PermanentError)


async def test_an_incident_is_shown_before_anything_is_done_about_it() -> None:
    """Its row and its Event come once, and need neither the scheduler nor the job's Pods."""
    resource, scheduler = inference_job(), Scheduler("RECOVERING")
    resource["metadata"]["finalizers"] = [FINALIZER]
    resource["status"] = {"jobUid": scheduler.answer.job.uid, "incident": "i-000001"}
    told = scheduler_pb2.WatchIncidentsResponse(kind=scheduler_pb2.WATCH_KIND_CHANGED)
    told.incident.id = "i-000002"
    told.incident.plans.add(job_uid=scheduler.answer.job.uid)
    scheduler.incidents.take(told)
    scheduler.away = True
    api = ApiServer(resource)
    for _ in range(2):
        await jobs_of(api, scheduler).announce("default", "demo")
        assert resource["status"]["incident"] == "i-000002"
        (event,) = await api.find("Event")
        assert event["reason"] == "IncidentOpened"
    assert scheduler.calls == []


async def test_a_rank_that_hangs_ends_with_its_pod() -> None:
    """Nobody but a kubelet can end it: while the job is being ended its Pods are deleted."""
    resource = inference_job()
    resource["metadata"] |= {
        "deletionTimestamp": "2026-01-01T00:00:00Z",
        "finalizers": [FINALIZER],
        "resourceVersion": "1",
    }
    labels = {"raddle.dev/job": "demo", "app.kubernetes.io/component": "rank"}
    metadata = {"name": "demo-decode-0-0-1", "namespace": "default", "labels": labels}
    api = ApiServer(resource, {"kind": "Pod", "metadata": metadata})
    scheduler = Scheduler("STOPPING")
    jobs = jobs_of(api, scheduler)
    assert await jobs.bring("default", "demo")
    assert await api.find("Pod") == []
    assert resource["metadata"]["finalizers"] == [FINALIZER]
    scheduler.answer.CopyFrom(Scheduler("CANCELLED").answer)
    await jobs.bring("default", "demo")
    assert scheduler.calls[-1] == "DeleteJob"
    assert resource["metadata"]["finalizers"] == []


@pytest.mark.parametrize(
    "error",
    [
        PermanentError(Reason.MANAGED_BY_OTHER, "somebody else has it"),
        TemporaryError(Reason.NO_LEADER, "not just now"),
    ],
)
async def test_a_refused_change_deletes_nothing(error: RaddleError) -> None:
    """A role goes with its Pods only once the scheduler lets the job go that has it."""
    api, scheduler, resource = running_job()
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    before = [(*key, item["metadata"]["uid"]) for key, item in api.items.items() if key[0] in KEPT]
    assert {kind for kind, _, _ in before} == set(KEPT)
    resource["spec"]["roles"] = [role("other", ranks=1)]
    scheduler.refuses = error
    with pytest.raises(type(error), match=error.message):
        await jobs.bring("default", "demo")
    kept = {(*key, item["metadata"]["uid"]) for key, item in api.items.items() if key[0] in KEPT}
    assert set(before) <= kept
    scheduler.refuses = None
    scheduler.answer.job.state = job_pb2.JOB_STATE_STOPPING
    await jobs.bring("default", "demo")
    assert [item["spec"]["role"] for item in await api.find("InferenceRole")] == ["other"]
    assert await api.find("Pod") == []


async def test_the_scheduler_hears_why_a_pod_ended_though_the_pod_has_gone() -> None:
    """What the watch told last is kept until the scheduler has heard it, and told once."""
    api, scheduler, _ = running_job()
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    pod = api.items.pop(("Pod", "demo-decode-0-0-1"))
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod["status"] = {"containerStatuses": [{"name": "rank", "state": killed}]}
    jobs.pod_told(pod)
    scheduler.refuses = TemporaryError(Reason.NO_LEADER, "away")
    with pytest.raises(TemporaryError):
        await jobs.bring("default", "demo")
    scheduler.refuses = None
    await jobs.bring("default", "demo")
    await jobs.bring("default", "demo")
    assert scheduler.reported == [(0, "OOMKilled")]


async def test_pods_that_wait_are_told_as_long_as_they_are_there() -> None:
    """A new leader knows nothing of them."""
    api, scheduler, _ = running_job()
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    assert scheduler.reported == []
    waits = {"waiting": {"reason": "ErrImagePull", "message": "demo:1: not found"}}
    pod = api.items["Pod", "demo-decode-0-0-1"]
    pod["status"] = {"containerStatuses": [{"name": "rank", "state": waits}]}
    for _ in range(2):
        await jobs.bring("default", "demo")
    assert scheduler.reported == [(0, "ErrImagePull")] * 2


async def test_a_pod_of_an_older_job_of_the_name_is_not_taken_for_a_ranks() -> None:
    """Its starts were counted from one as well: it is deleted, and told while it does not go."""
    api, scheduler, resource = running_job()
    labels = {"raddle.dev/job": "demo", "raddle.dev/job-uid": "j-0000000000ff"}
    labels |= {"app.kubernetes.io/component": "rank"}
    metadata = {"name": "demo-decode-0-0-1", "namespace": "default", "labels": labels}
    old = {"kind": "Pod", "metadata": {**metadata, "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    api.items["Pod", "demo-decode-0-0-1"] = old
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    assert await api.find("Pod") == [old]
    scheduler.answer.job.state = job_pb2.JOB_STATE_STARTING
    await jobs.bring("default", "demo")
    said = {c["type"]: c["message"] for c in resource["status"]["conditions"]}
    assert "the Pod of an older job demo is not gone yet" in said["Ready"]
    del old["metadata"]["deletionTimestamp"]  # type: ignore[attr-defined]
    for _ in range(2):
        await jobs.bring("default", "demo")
    (pod,) = await api.find("Pod")
    assert pod["metadata"]["labels"]["raddle.dev/job-uid"] == scheduler.answer.job.uid


async def test_what_a_job_waits_for_is_told_and_its_pods_are_still_reported() -> None:
    """The certificates of the release are not there: the status says so, and what ended is told."""
    api, scheduler, resource = running_job()
    jobs = jobs_of(api, scheduler)
    await jobs.bring("default", "demo")
    pod = api.items["Pod", "demo-decode-0-0-1"]
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    pod["status"] = {"containerStatuses": [{"name": "rank", "state": killed}]}
    resource["metadata"]["namespace"] = pod["metadata"]["namespace"] = "team-a"
    scheduler.answer.job.state = job_pb2.JOB_STATE_STARTING
    with pytest.raises(TemporaryError, match="raddle-tls-rank is not there yet"):
        await jobs.bring("team-a", "demo")
    said = {c["type"]: c["message"] for c in resource["status"]["conditions"]}
    assert "default/raddle-tls-rank is not there yet" in said["Ready"]
    assert scheduler.reported == [(0, "OOMKilled")]


async def test_a_resource_that_went_before_it_was_held_makes_no_job() -> None:
    """Nobody would end what it asked for."""
    resource = inference_job()
    resource["metadata"]["resourceVersion"] = "1"
    api, scheduler = ApiServer(resource), Scheduler("READY")

    async def read_and_gone(kind: str, _namespace: str, name: str) -> Object | None:
        return api.items.pop((kind, name), None)

    api.get = read_and_gone  # type: ignore[method-assign]
    assert not await jobs_of(api, scheduler).bring("default", "demo")
    assert scheduler.calls == []
    assert api.items == {}


@pytest.mark.parametrize(("hours", "events"), [(0, 2), (2, 0)])
async def test_an_incident_of_yesterday_is_no_news(hours: int, events: int) -> None:
    """A new leader tells what is newly over, and nothing that was told before Events expired."""
    api, scheduler, _ = running_job()
    told = scheduler_pb2.WatchIncidentsResponse(kind=scheduler_pb2.WATCH_KIND_CHANGED)
    told.incident.id, told.incident.phase = "i-000001", incident_pb2.INCIDENT_PHASE_CLOSED
    told.incident.end_time.FromDatetime(datetime.now(UTC) - timedelta(hours=hours))
    told.incident.plans.add(job_uid=scheduler.answer.job.uid)
    scheduler.incidents.take(told)
    await jobs_of(api, scheduler).bring("default", "demo")
    found = [event for event in await api.find("Event") if "i-000001" in event["message"]]
    assert len(found) == events
