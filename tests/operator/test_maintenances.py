"""Drains of every size under a job that runs; resources that go before their status was told."""

from __future__ import annotations

from typing import Any

import pytest

from raddle.operator.names import FINALIZER, MANAGER
from raddle.operator.scheduler_link import IDENTITY
from raddle.operator.spec import job_message
from raddle.telemetry.tls import IDENTITY_METADATA
from raddle.v1 import scheduler_pb2
from tests.operator.conftest import Stage, simulated
from tests.operator.resources import inference_job

pytestmark = pytest.mark.asyncio(loop_scope="module")
RANKS = 6
#: How many parts of a die's name a subject has, and how many ranks of the job below are on it.
SUBJECTS = {"die": (4, 1), "npu": (3, 2), "node": (2, 4)}


def maintenance(name: str, subject: str) -> dict[str, Any]:
    return {
        "apiVersion": "raddle.dev/v1alpha1",
        "kind": "Maintenance",
        "metadata": {"name": name},
        "spec": {"subject": subject, "timeout": "600s"},
    }


async def active_dies(stage: Stage, name: str) -> list[str]:
    """Where the job's ranks are, in the order of the machine."""
    found = await stage.job(name)
    assert found is not None
    ranks = [rank for part in found.placement.instances for rank in part.ranks]
    return sorted(rank.die for rank in ranks if rank.state == "ACTIVE")


async def held_dies(stage: Stage) -> set[str]:
    answer = await stage.call("ListDies", scheduler_pb2.ListDiesRequest())
    return {die.die for die in answer.dies if die.hold}


async def gone(stage: Stage, name: str, kind: str, space: str) -> bool:
    return await stage.resource(name, kind, space) == {}


@pytest.mark.parametrize("size", SUBJECTS)
async def test_ranks_leave_what_is_drained_and_the_job_serves(stage: Stage, size: str) -> None:
    """A die, an NPU or a node: drained when its ranks moved, free again without its resource."""
    parts, ranks = SUBJECTS[size]
    job = f"on-{size}"
    await stage.apply_job(job, simulated(ranks=RANKS))
    await stage.until_condition(job, "Ready", "True")
    subject = "/".join((await active_dies(stage, job))[0].split("/")[:parts])
    await stage.apply(maintenance(size, subject))
    await stage.until_condition(size, "Drained", "True", of="Maintenance")
    status = (await stage.resource(size, "Maintenance", ""))["status"]
    assert (status["state"], status["ranksTotal"], status["ranksMoved"]) == (
        "DRAINED",
        ranks,
        ranks,
    )
    held = await held_dies(stage)
    assert len(held) == ranks
    assert all(die == subject or die.startswith(f"{subject}/") for die in held)
    await stage.until_condition(job, "Ready", "True")
    left = await active_dies(stage, job)
    assert left
    assert not held & set(left)
    await stage.kubectl("delete", "mt", size)
    assert await held_dies(stage) == set()
    await stage.kubectl("delete", "-n", stage.jobs, "ij", job)


async def test_a_supernode_whose_ranks_have_nowhere_to_go_is_not_drained(stage: Stage) -> None:
    """Every die is held and the job serves on; both are as before when the resource is deleted."""
    await stage.apply_job("stays", simulated(ranks=RANKS))
    await stage.until_condition("stays", "Ready", "True")
    before = await stage.job("stays")
    await stage.apply(maintenance("all", "sn0"))
    await stage.until_condition("all", "Drained", "False", of="Maintenance")

    async def are_held() -> bool:
        return len(await held_dies(stage)) == 64

    await stage.until(are_held, "all dies are held")
    status = (await stage.resource("all", "Maintenance", ""))["status"]
    assert (status["state"], status["ranksTotal"], status["ranksMoved"]) == ("DRAINING", RANKS, 0)
    assert await stage.job("stays") == before
    await stage.kubectl("delete", "mt", "all")
    assert await held_dies(stage) == set()
    assert await stage.job("stays") == before
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "stays")


async def test_a_job_is_ended_with_a_resource_whose_status_never_told_of_it(stage: Stage) -> None:
    """An operator submitted it and died; the next one finds it by the resource's own name."""
    stage.kill_operator()
    item = inference_job("untold", simulated())
    item["metadata"] |= {"namespace": stage.jobs, "finalizers": [FINALIZER]}
    await stage.apply(item)
    resource = await stage.resource("untold")
    request = scheduler_pb2.SubmitJobRequest(
        spec=job_message(resource, {}),
        idempotency_key=resource["metadata"]["uid"],
        managed_by=MANAGER,
    )
    await stage.call("SubmitJob", request)
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "untold", "--wait=false")
    stage.start_operator()
    await stage.until_no_job("untold")
    await stage.until(lambda: gone(stage, "untold", "InferenceJob", stage.jobs), "it is gone")


async def test_a_drain_is_ended_with_a_resource_whose_status_never_told_of_it(
    stage: Stage,
) -> None:
    """The same of a Maintenance; nobody could end that drain otherwise."""
    stage.kill_operator()
    item = maintenance("untold", "sn0/n09")
    item["metadata"] |= {"finalizers": [FINALIZER]}
    await stage.apply(item)
    await stage.raddle.stub.CreateMaintenance(
        scheduler_pb2.CreateMaintenanceRequest(subject="sn0/n09"),
        timeout=10.0,
        metadata=((IDENTITY_METADATA, IDENTITY),),
    )
    assert len(await held_dies(stage)) == 4
    await stage.kubectl("delete", "mt", "untold", "--wait=false")
    stage.start_operator()
    await stage.until(lambda: gone(stage, "untold", "Maintenance", ""), "it is gone")
    assert await held_dies(stage) == set()
