"""What happens when an operator, the API server or the scheduler is away."""

from __future__ import annotations

import json

import pytest

from raddle.v1 import job_pb2, scheduler_pb2
from tests.operator.conftest import Stage, simulated
from tests.support import stopped

pytestmark = pytest.mark.asyncio(loop_scope="module")
READY = job_pb2.JOB_STATE_READY


async def holder(stage: Stage) -> str:
    lease = await stage.resource("raddle-operator", "Lease", stage.space)
    return str((lease.get("spec") or {}).get("holderIdentity", ""))


async def until_holder(stage: Stage, identity: str) -> None:
    async def holds() -> bool:
        return await holder(stage) == identity

    await stage.until(holds, f"the Lease is held by {identity or 'nobody'}")


async def test_a_killed_operator_goes_on_where_it_was(stage: Stage) -> None:
    """The same job, whatever happened meanwhile; nothing is submitted twice."""
    await stage.apply_job("kept")
    await stage.until_condition("kept", "Ready", "True")
    before = await stage.job("kept")
    assert before is not None
    stage.kill_operator()
    await stage.apply_job("kept", simulated(), priority=7)
    stage.start_operator("two")
    await stage.until_job("kept", lambda j: j.spec.priority == 7, "has the priority of meanwhile")
    after = await stage.job("kept")
    assert after is not None
    assert after.job.uid == before.job.uid
    assert stage.log("two").count('"event": "submitted"') == 0


async def test_a_job_that_is_deleted_while_the_scheduler_is_away_waits_for_it(
    stage: Stage,
) -> None:
    """The finalizer holds the resource; it goes when the job could be ended."""
    await stage.apply_job("waits")
    await stage.until_condition("waits", "Ready", "True")
    child = stage.raddle.children.pop("scheduler-0")
    child.process.kill()
    child.process.wait()
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "waits", "--wait=false")
    await stage.apply_job("early")
    await stage.until_condition("early", "Queued", "Unknown")
    assert (await stage.resource("waits"))["metadata"]["deletionTimestamp"]
    stage.raddle.start_scheduler(0)
    await stage.until_no_job("waits")

    async def gone() -> bool:
        return await stage.resource("waits") == {}

    await stage.until(gone, "the resource is gone")
    await stage.until_condition("early", "Ready", "True")
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "early")


async def test_the_api_server_may_be_killed(stage: Stage) -> None:
    """Jobs run on; afterwards the same operator carries changes out, without a second job."""
    before = await stage.job("kept")
    assert before is not None
    stage.api.kill("api")
    assert (await stage.job("kept")) is not None
    stage.api.start()
    await stage.apply_job("kept", simulated(), priority=8)
    await stage.until_job("kept", lambda j: j.spec.priority == 8, "has its new priority")
    after = await stage.job("kept")
    assert after is not None
    assert after.job.uid == before.job.uid
    assert stage.operators["two"].poll() is None


async def test_changes_that_fell_out_of_the_history_are_seen(stage: Stage) -> None:
    """A watch that is too old (410) is begun anew with a list; nothing of meanwhile is missed."""
    await stage.apply_job("stale")
    await stage.until_condition("stale", "Ready", "True")
    seen = (await stage.resource("stale"))["metadata"]["resourceVersion"]
    with stopped(stage.operators["two"].pid):
        await stage.apply_job("stale", simulated(), priority=11)
        await stage.apply_job("meanwhile")
        stage.api.forget()
        path = "/apis/raddle.dev/v1alpha1/inferencejobs?watch=1&timeoutSeconds=1&resourceVersion="
        assert '"code":410' in await stage.kubectl("get", "--raw", path + seen)
    await stage.until_job("stale", lambda j: j.spec.priority == 11, "has its new priority")
    await stage.until_condition("meanwhile", "Ready", "True")
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "stale", "meanwhile")


async def test_of_two_operators_one_acts_and_hands_over(stage: Stage) -> None:
    """One that is asked to end lets go at once; one that is killed is followed in time."""
    await until_holder(stage, "two")
    stage.start_operator("three")
    assert await stage.end_operator("two") == 0
    await until_holder(stage, "three")
    await stage.apply_job("kept", simulated(), priority=9)
    await stage.until_job("kept", lambda j: j.spec.priority == 9, "is changed by the next")
    stage.start_operator("four")
    stage.kill_operator("three")
    await until_holder(stage, "four")
    await stage.apply_job("kept", simulated(), priority=10)
    await stage.until_job("kept", lambda j: j.spec.priority == 10, "is changed by the last")
    await stage.until_job("kept", lambda j: j.state == READY, "was never disturbed")
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "kept")


async def test_on_a_real_machine_pods_of_others_hold_their_dies(stage: Stage) -> None:
    """The device plugin's word counts as taken, with a reason of its own, until the Pod is gone."""
    await stage.end_operator("four")
    await stage.kubectl("label", "node", "worker-1", "raddle.dev/node=sn0.n00")
    machine = {"simulated": False}
    await stage.grant({"operator": {"namespaces": [stage.jobs]}, "machine": machine})
    stage.start_operator("real", "--no-simulated", "--foreign-pods")
    metadata = {
        "name": "training",
        "namespace": stage.space,
        "annotations": {"huawei.com/AscendReal": "Ascend910-1"},
    }
    spec = {"nodeName": "worker-1", "containers": [{"name": "c", "image": "training"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    await stage.kubectl("create", "-f", "-", stdin=json.dumps(pod))

    async def held() -> dict[str, tuple[str, str]]:
        request = scheduler_pb2.ListDiesRequest(node="sn0/n00")
        answer = await stage.call("ListDies", request)
        return {die.die: (die.why.reason, die.why.message) for die in answer.dies if die.hold}

    async def is_held() -> bool:
        said = f"Pod {stage.space}/training holds it"
        return await held() == {"sn0/n00/npu0/die1": ("HELD_BY_OTHER", said)}

    await stage.until(is_held, "the die is held")
    assert await stage.data("raddle-nodes") == {"worker-1": "sn0/n00"}
    flags = ("--force", "--grace-period=0")
    await stage.kubectl("delete", "pod", "-n", stage.space, "training", *flags)

    async def is_free() -> bool:
        return not await held()

    await stage.until(is_free, "the die is free")
