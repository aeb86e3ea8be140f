"""InferenceJobs from apply to delete, on a real API server and a real scheduler."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, cast

import pytest
from tools.kubernetes.cluster import CommandError

from raddle.model.errors import PermanentError
from raddle.operator.hosts import WrongDevice
from raddle.operator.jobs import Jobs
from raddle.operator.machine import Machine
from raddle.operator.scheduler_link import SchedulerLink
from raddle.v1 import health_pb2, job_pb2, scheduler_pb2
from tests.operator.conftest import Stage, simulated
from tests.operator.resources import SITE, inference_job, role
from tests.operator.test_bringing import Nodes, Scheduler, scheduler_of

pytestmark = pytest.mark.asyncio(loop_scope="module")
READY = job_pb2.JOB_STATE_READY
LEVEL = health_pb2.FAULT_LEVEL_SEPARATE_NPU


async def ready(stage: Stage, name: str, *roles: dict[str, Any], **more: Any) -> None:
    await stage.apply_job(name, *roles, **more)
    await stage.until_condition(name, "Ready", "True")


async def deleted(stage: Stage, name: str) -> None:
    await stage.kubectl("delete", "-n", stage.jobs, "ij", name)
    assert await stage.job(name) is None


async def test_a_job_is_applied_watched_and_deleted(stage: Stage) -> None:
    """It runs, its status says so, and it is gone from the scheduler before its resource is."""
    await ready(stage, "first")
    resource, found = await stage.resource("first"), await stage.job("first")
    assert found is not None
    job = found.job
    assert (job.managed_by, job.idempotency_key) == (
        "raddle-operator",
        resource["metadata"]["uid"],
    )
    status = resource["status"]
    assert (status["jobUid"], status["state"], status["ranks"]) == (job.uid, "READY", "4/4")
    assert status["observedGeneration"] == resource["metadata"]["generation"]
    await stage.kubectl(
        "wait", "-n", stage.jobs, "--for=condition=Ready", "ij/first", "--timeout=5s"
    )
    assert {"Placed", "Ready"} <= {event["reason"] for event in await stage.events("first")}
    child = await stage.resource("first-decode", "InferenceRole")
    assert child["status"]["readyReplicas"] == 1
    assert child["metadata"]["ownerReferences"][0]["name"] == "first"
    await deleted(stage, "first")
    assert await stage.resource("first") == {}


async def test_a_role_is_scaled_and_the_last_word_counts(stage: Stage) -> None:
    """`kubectl scale` reaches the scheduler; another size in the job goes over it later."""
    await ready(stage, "scaled")
    await stage.kubectl("scale", "-n", stage.jobs, "ir/scaled-decode", "--replicas=2")
    await stage.until_job("scaled", lambda j: j.spec.roles[0].instances == 2, "has two instances")
    await stage.apply_job("scaled", simulated(), priority=3)
    await stage.until_job("scaled", lambda j: j.spec.priority == 3, "has its priority")
    found = await stage.job("scaled")
    assert found is not None
    assert found.job.spec.roles[0].instances == 2
    await stage.apply_job("scaled", simulated(instances=3), priority=3)
    await stage.until_job("scaled", lambda j: j.spec.roles[0].instances == 3, "has three")
    assert (await stage.resource("scaled-decode", "InferenceRole"))["spec"]["replicas"] == 3
    await stage.until_condition("scaled", "Ready", "True")
    await stage.until_condition("scaled-decode", "Ready", "True", of="InferenceRole")
    await deleted(stage, "scaled")


async def test_a_scale_that_does_not_fit_leaves_the_job_as_it_is(stage: Stage) -> None:
    """It stays Ready under its status, which says why it is not larger, until it is asked back."""
    await ready(stage, "grown")
    before = (await stage.resource("grown"))["status"]
    scale = ("scale", "-n", stage.jobs, "ir/grown-decode")

    async def is_told() -> bool:
        message = (await stage.condition("grown", "Ready"))["message"]
        return "not changed as asked: " in message

    await stage.kubectl(*scale, "--replicas=500")
    await stage.until(is_told, "the refusal is told")
    status = (await stage.resource("grown"))["status"]
    assert (status["jobUid"], status["state"]) == (before["jobUid"], "READY")
    assert (await stage.condition("grown", "Ready"))["status"] == "True"
    assert "ChangeRefused" in {event["reason"] for event in await stage.events("grown")}
    await stage.kubectl(*scale, "--replicas=1")

    async def is_over() -> bool:
        return not await is_told()

    await stage.until(is_over, "nothing is refused any more")
    await deleted(stage, "grown")


async def test_clients_that_race_end_with_one_of_their_words(stage: Stage) -> None:
    """Who writes over what others changed meanwhile is refused; the job has the last word told."""
    await ready(stage, "race")
    before, stale = await stage.job("race"), await stage.resource("race")
    assert before is not None
    changes = [json.dumps({"spec": {"priority": number}}) for number in range(11, 17)]
    patch = ("patch", "-n", stage.jobs, "ij", "race", "--type=merge", "-p")
    await asyncio.gather(*(stage.kubectl(*patch, change) for change in changes))
    stale["spec"]["priority"] = 99
    with pytest.raises(CommandError, match="the object has been modified"):
        await stage.kubectl("replace", "-f", "-", stdin=json.dumps(stale))
    last = (await stage.resource("race"))["spec"]["priority"]
    assert last in range(11, 17)
    await stage.until_job("race", lambda j: j.spec.priority == last, f"has priority {last}")
    after = await stage.job("race")
    assert after is not None
    assert after.job.uid == before.job.uid
    await deleted(stage, "race")


async def test_a_suspended_job_gives_its_dies_back_and_may_change(stage: Stage) -> None:
    """The resource stays; when it is resumed it is another job, with the new layout."""
    await ready(stage, "paused")
    first = (await stage.resource("paused"))["status"]["jobUid"]
    await stage.apply_job("paused", suspend=True)
    await stage.until_no_job("paused")
    await stage.until_condition("paused", "Ready", "False", reason="Suspended")
    assert "jobUid" not in (await stage.resource("paused"))["status"]
    await stage.apply_job("paused", simulated(slotsPerRank=12), suspend=True)
    await stage.apply_job("paused", simulated(slotsPerRank=12))
    await stage.until_condition("paused", "Ready", "True")
    found = await stage.job("paused")
    assert found is not None
    assert found.job.uid != first
    assert found.job.spec.roles[0].slots_per_rank == 12
    await deleted(stage, "paused")


async def test_a_job_that_cannot_fit_says_so(stage: Stage) -> None:
    """The scheduler's refusal is the condition's reason; a changed size is tried at once."""
    await stage.apply_job("large", simulated(ranks=1000))
    await stage.until_condition("large", "Ready", "False", reason="DoesNotFit")
    assert "dies" in (await stage.condition("large", "Ready"))["message"]
    assert await stage.job("large") is None
    await stage.apply_job("large", simulated())
    await stage.until_condition("large", "Ready", "True")
    await deleted(stage, "large")


async def test_a_job_of_somebody_else_is_left_alone(stage: Stage) -> None:
    """The resource says whose the name is, and its deletion does not touch that job."""
    spec = job_pb2.JobSpec(namespace=stage.jobs, name="taken")
    spec.model.config = (await stage_config()).config
    spec.model.kv_block_tokens = 16
    only = spec.roles.add(name="decode", kind="decode", ranks=4, slots_per_rank=10)
    only.engine.driver = "simulated"
    await stage.call("SubmitJob", scheduler_pb2.SubmitJobRequest(spec=spec))
    await stage.apply_job("taken")
    await stage.until_condition("taken", "Ready", "False", reason="AlreadyExists")
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "taken")
    found = await stage.job("taken")
    assert found is not None
    assert found.job.managed_by == ""
    assert found.job.state not in (job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_STOPPING)
    await stage.call("CancelJob", scheduler_pb2.CancelJobRequest(job_uid=found.job.uid))


async def stage_config() -> job_pb2.ModelSpec:
    from raddle.models import config_text

    return job_pb2.ModelSpec(config=config_text("raddle-demo"))


async def test_a_job_that_was_cancelled_behind_its_resource_comes_back(stage: Stage) -> None:
    """The resource says that it runs."""
    await ready(stage, "managed")
    found = await stage.job("managed")
    assert found is not None
    cancel = scheduler_pb2.CancelJobRequest(job_uid=found.job.uid, managed_by="raddle-operator")
    await stage.call("CancelJob", cancel)
    await stage.until_job(
        "managed", lambda j: j.uid != found.job.uid and j.state == READY, "is submitted again"
    )
    await deleted(stage, "managed")


async def test_a_fault_shows_as_conditions_and_events(stage: Stage) -> None:
    """The incident is named, the condition returns to Ready, and both are told as Events."""
    await ready(stage, "faulty", simulated(ranks=6))
    found = await stage.job("faulty")
    assert found is not None
    die = found.placement.instances[0].ranks[0].die
    request = scheduler_pb2.InjectFaultRequest(subject=die, code="80E18005", level=LEVEL)
    await stage.call("InjectFault", request)

    async def told() -> bool:
        return "IncidentOpened" in {event["reason"] for event in await stage.events("faulty")}

    await stage.until(told, "the incident is told")
    await stage.until_condition("faulty", "Ready", "True")
    status = (await stage.resource("faulty"))["status"]
    assert status["incident"].startswith("i-")

    async def closed() -> bool:
        return "IncidentClosed" in {event["reason"] for event in await stage.events("faulty")}

    await stage.until(closed, "its end is told")
    request.clear = True
    await stage.call("InjectFault", request)
    await deleted(stage, "faulty")


async def test_ranks_are_pods_on_the_kubernetes_node_that_plays_their_node(stage: Stage) -> None:
    """With rank tables, front door and Service; all of it goes with the job."""
    await stage.apply_job("served", role("decode", ranks=4, slotsPerRank=10))
    await stage.until_condition("served", "Placed", "True")

    async def has_pods() -> bool:
        return len(await stage.cluster.find("Pod", stage.jobs, "raddle.dev/job=served")) == 4

    await stage.until(has_pods, "four Pods")
    carriers = {
        node: host
        for host, text in (await stage.data("raddle-nodes")).items()
        for node in text.split(",")
        if node
    }
    for pod in await stage.cluster.find("Pod", stage.jobs, "raddle.dev/job=served"):
        node = pod["metadata"]["annotations"]["raddle.dev/node"]
        assert pod["spec"]["nodeName"] == carriers[node]
        assert pod["metadata"]["ownerReferences"][0]["kind"] == "InferenceRole"

    async def has_the_rest() -> bool:
        table = await stage.resource("served-decode-0-ranktable", "ConfigMap")
        door = await stage.resource("served-frontdoor", "Deployment")
        return bool(table and door and await stage.resource("served", "Service"))

    await stage.until(has_the_rest, "rank table, front door and Service")
    table = await stage.resource("served-decode-0-ranktable", "ConfigMap")
    assert json.loads(table["data"]["hccl-2.0.json"])["rank_count"] == 4
    await stage.apply_job("served", role("decode", ranks=4, slotsPerRank=10), suspend=True)
    await stage.until_no_job("served")

    async def is_withdrawn() -> bool:
        left = await stage.cluster.find("Pod", stage.jobs, "raddle.dev/job=served")
        running = [p for p in left if not p["metadata"].get("deletionTimestamp")]
        return not running and not await stage.resource("served", "Service")

    await stage.until(is_withdrawn, "Pods and Service are withdrawn")
    await deleted(stage, "served")


async def test_a_pod_that_fails_before_its_rank_is_up_is_replaced_at_once(stage: Stage) -> None:
    """Its agent would wait for the rank for a minute more; incident and story say why it ended."""
    await stage.apply_job("refused", role("decode", ranks=4, slotsPerRank=10))
    selector = "raddle.dev/job=refused,raddle.dev/rank=1"
    found: list[dict[str, Any]] = []

    async def has_pod() -> bool:
        found[:] = await stage.cluster.find("Pod", stage.jobs, selector)
        return len(found) == 1

    await stage.until(has_pod, "the rank's Pod")
    message = "Allocate failed due to no healthy devices present"
    status = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": message}
    name = found[0]["metadata"]["name"]
    patch = ("patch", "pod", "-n", stage.jobs, name, "--subresource=status", "--type=merge")
    await stage.kubectl(*patch, "-p", json.dumps({"status": status}))

    async def is_replaced() -> bool:
        pods = await stage.cluster.find("Pod", stage.jobs, selector)
        running = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
        return [pod["metadata"]["name"] for pod in running] not in ([], [name])

    await stage.until(is_replaced, "another start has a Pod")
    job = await stage.job("refused")
    assert job is not None
    listed = scheduler_pb2.ListIncidentsRequest(job_uid=job.job.uid)
    said = f"the rank's pod ended: UnexpectedAdmissionError: {message}"
    told = (await stage.call("ListIncidents", listed)).incidents
    (incident,) = (incident for incident in told if said in incident.why.message)
    explain = scheduler_pb2.ExplainRequest(subject=f"incident/{incident.id}")
    assert any(said in line for line in (await stage.call("Explain", explain)).story)
    story = await stage.call("Explain", scheduler_pb2.ExplainRequest(subject=f"job/{job.job.uid}"))
    assert any("the pod of decode/0/1: Unexpected" in line for line in story.story)
    await deleted(stage, "refused")


async def test_a_service_of_somebody_else_is_not_taken(stage: Stage) -> None:
    """The job says which object stands in its way."""
    await stage.kubectl("create", "service", "-n", stage.jobs, "clusterip", "mine", "--tcp=80")
    await stage.apply_job("mine", role("decode", ranks=4, slotsPerRank=10))
    await stage.until_condition("mine", "Ready", "False", reason="AlreadyExists")
    service = await stage.resource("mine", "Service")
    assert "ownerReferences" not in service["metadata"]
    await deleted(stage, "mine")


async def test_a_role_of_somebody_else_is_not_taken(stage: Stage) -> None:
    """The job is not submitted, and says which object stands in its way until it is gone."""
    spec = {"job": "foreign", "role": "decode", "kind": "decode", "replicas": 3}
    metadata = {"name": "foreign-decode", "namespace": stage.jobs}
    theirs = {"apiVersion": "raddle.dev/v1alpha1", "kind": "InferenceRole", "spec": spec}
    await stage.apply(theirs | {"metadata": metadata})
    await stage.apply_job("foreign")
    await stage.until_condition("foreign", "Ready", "False", reason="AlreadyExists")
    message = (await stage.condition("foreign", "Ready"))["message"]
    assert "InferenceRole foreign-decode is there and is not of InferenceJob foreign" in message
    assert await stage.job("foreign") is None
    await stage.kubectl("delete", "-n", stage.jobs, "ir", "foreign-decode")
    await stage.until_condition("foreign", "Ready", "True")
    await deleted(stage, "foreign")


async def test_a_bad_template_is_told(stage: Stage) -> None:
    """What the API server says of the Pod is the reason why the job is not ready."""
    bad = {"spec": {"containers": [{"name": "rank", "resources": {"limits": {"cpu": "lots"}}}]}}
    await stage.apply_job("template", role("decode", ranks=4, slotsPerRank=10, template=bad))

    async def is_told() -> bool:
        return "quantities must match" in (await stage.condition("template", "Ready"))["message"]

    await stage.until(is_told, "the quantity is refused in words")
    await deleted(stage, "template")


def jobs_beside(stage: Stage, scheduler: Scheduler, *wrong: WrongDevice, **site: Any) -> Jobs:
    """They bring jobs of namespaces that no operator serves, for a scheduler that is played."""
    link, machine = cast("SchedulerLink", scheduler), cast("Machine", Nodes(*wrong))
    chosen = replace(SITE, **{"namespace": stage.space, **site})
    return Jobs(stage.cluster, link, machine, chosen, ranks_in_pods=True)


async def unserved_job(stage: Stage, name: str, space: str) -> dict[str, Any]:
    item = inference_job(name, role("decode", ranks=1))
    item["metadata"]["namespace"] = space
    await stage.apply(item)
    return await stage.resource(name, space=space)


async def test_ready_means_that_the_service_leads_to_the_job(stage: Stage) -> None:
    """A Pod of the front door has to be ready; a Service of somebody else is named as a reason."""
    space, resource = stage.space, await unserved_job(stage, "door", stage.space)
    jobs = jobs_beside(stage, scheduler_of(resource), tls=False)

    async def ready() -> tuple[str, str]:
        found = await stage.condition("door", "Ready", space=space)
        return found["status"], found["reason"]

    await jobs.bring(space, "door")
    assert await ready() == ("False", "FrontDoorNotReady")
    labels = {"raddle.dev/job": "door", "app.kubernetes.io/component": "frontdoor"}
    metadata = {"name": "door-frontdoor-1", "namespace": space, "labels": labels}
    spec = {"containers": [{"name": "c", "image": "frontdoor"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    await stage.kubectl("create", "-f", "-", stdin=json.dumps(pod))
    await jobs.bring(space, "door")
    assert await ready() == ("False", "FrontDoorNotReady")
    change = json.dumps({"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    patch = ("patch", "pod", "-n", space, "door-frontdoor-1", "--subresource=status")
    await stage.kubectl(*patch, "--type=merge", "-p", change)
    await jobs.bring(space, "door")
    assert await ready() == ("True", "Ready")
    await stage.kubectl("delete", "service", "-n", space, "door")
    await stage.kubectl("create", "service", "-n", space, "clusterip", "door", "--tcp=80")
    with pytest.raises(PermanentError, match="Service door"):
        await jobs.bring(space, "door")
    assert await ready() == ("False", "AlreadyExists")
    assert "Service door" in (await stage.condition("door", "Ready", space=space))["message"]
    await stage.kubectl("delete", "service", "-n", space, "door")
    await jobs.bring(space, "door")
    assert await ready() == ("True", "Ready")


async def test_a_wrong_device_of_a_rank_is_told_loudly(stage: Stage) -> None:
    """As the reason of a condition and as a warning, with both devices."""
    space, resource = stage.space, await unserved_job(stage, "device", stage.space)
    wrong = WrongDevice(
        f"{space}/rank", "sn0/n00/npu0/die0", ("sn0/n00/npu1/die1",), is_taken=False
    )
    await jobs_beside(stage, scheduler_of(resource), wrong, tls=False).bring(space, "device")
    placed = await stage.condition("device", "Placed", space=space)
    assert (placed["status"], placed["reason"]) == ("True", "DeviceDiffers")
    events = await stage.cluster.find("Event", space)
    (told,) = (event for event in events if "DeviceDiffers" in event["message"])
    assert (told["type"], told["involvedObject"]["name"]) == ("Warning", "device")
    for die in (wrong.placed, *wrong.given):
        assert die in placed["message"]
        assert die in told["message"]


async def make_certificates(stage: Stage, space: str, text: str) -> None:
    for name in (SITE.rank_secret, SITE.front_door_secret):
        create = ("create", "secret", "generic", name, "-n", space)
        await stage.kubectl(*create, f"--from-literal=tls.crt={text}")


async def test_a_secret_of_somebody_else_is_not_taken(stage: Stage) -> None:
    """The job says what stands in its way; copies of the certificates are found by their labels."""
    space = f"{stage.space}-apart"
    await asyncio.to_thread(stage.api.make_namespace, space)
    await make_certificates(stage, stage.space, "ours")
    taken = f"{stage.space}.{SITE.rank_secret}"
    create = ("create", "secret", "generic", taken, "-n", space)
    await stage.kubectl(*create, "--from-literal=tls.crt=theirs")
    before = await stage.resource(taken, "Secret", space)
    resource = await unserved_job(stage, "secret", space)
    jobs = jobs_beside(stage, scheduler_of(resource, "STARTING"))
    with pytest.raises(PermanentError, match=f"Secret {space}/{taken}"):
        await jobs.bring(space, "secret")
    assert await stage.resource(taken, "Secret", space) == before
    ready = await stage.condition("secret", "Ready", space=space)
    assert (ready["status"], ready["reason"]) == ("False", "AlreadyExists")
    await stage.kubectl("delete", "secret", "-n", space, taken)
    await jobs.bring(space, "secret")
    labels = f"app.kubernetes.io/instance=raddle,raddle.dev/release-namespace={stage.space}"
    copies = await stage.cluster.find("Secret", space, labels)
    assert {item["metadata"]["name"] for item in copies} == {
        f"{stage.space}.{name}" for name in (SITE.rank_secret, SITE.front_door_secret)
    }
    assert copies[0]["data"] != before["data"]


async def test_releases_of_one_name_have_copies_of_their_own(stage: Stage) -> None:
    """In a namespace of jobs that one had before the other: neither touches the other's copies."""
    other, space = f"{stage.space}-other", f"{stage.space}-team"
    for name in (other, space):
        await asyncio.to_thread(stage.api.make_namespace, name)
    await make_certificates(stage, other, "of the other")
    resource = await unserved_job(stage, "shared", space)
    for release in (stage.space, other):
        scheduler = scheduler_of(resource, "STARTING")
        await jobs_beside(stage, scheduler, namespace=release).bring(space, "shared")
    copies = {
        release: (await stage.resource(f"{release}.{SITE.rank_secret}", "Secret", space))["data"]
        for release in (stage.space, other)
    }
    for release, data in copies.items():
        source = await stage.resource(SITE.rank_secret, "Secret", release)
        assert data == source["data"]
    assert copies[stage.space] != copies[other]
