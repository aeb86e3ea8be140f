"""Builders of resources and answers for the operator's tests."""

from __future__ import annotations

import copy
from typing import Any

from raddle.model.job import JobSpec
from raddle.operator.pods import Site
from raddle.v1 import health_pb2, job_pb2, scheduler_pb2
from raddle.wire import parse
from raddle.wire.codec import to_message

Object = dict[str, Any]
SITE = Site(
    release="raddle",
    namespace="default",
    image="localhost/raddle:dev",
    pull_policy="IfNotPresent",
    pull_secrets=("pull",),
    host_path="/var/lib/raddle/default-raddle",
    schedulers=("scheduler:7400",),
    tls=True,
    device_resource="",
)


def role(name: str, kind: str = "decode", ranks: int = 4, **more: Any) -> Object:
    """One role of a resource, with the defaults that the API server fills in."""
    base: Object = {"name": name, "kind": kind, "ranks": ranks, "instances": 1}
    base |= {"engine": {"driver": "reference"}}
    if kind == "cache":
        base["dramBytes"] = 1_000_000
    else:
        base["slotsPerRank"] = 10
    return base | more


def inference_job(name: str = "demo", *roles: Object, **more: Any) -> Object:
    """An InferenceJob as the API server gives it."""
    model = {"config": "raddle-demo", "weightDtype": "int8", "kvDtype": "bf16"}
    spec: Object = {
        "suspend": False,
        "priority": 0,
        "model": model | {"kvBlockTokens": 16},
        "roles": list(roles) or [role("decode")],
    }
    return {
        "apiVersion": "raddle.dev/v1alpha1",
        "kind": "InferenceJob",
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", "generation": 3},
        "spec": copy.deepcopy(spec | more),
    }


def stored(message: job_pb2.JobSpec) -> job_pb2.JobSpec:
    """The spec as the scheduler stores and tells it."""
    spec: JobSpec = parse.job_spec(message)
    found: job_pb2.JobSpec = to_message(spec, job_pb2.JobSpec)
    return found


def answer(
    *ranks: job_pb2.RankPlacement,
    state: str = "READY",
    driver: str = "reference",
    live: bool = True,
) -> scheduler_pb2.GetJobResponse:
    """What the scheduler says of job `demo` with one decode instance of these ranks."""
    found = scheduler_pb2.GetJobResponse()
    found.job.uid, found.job.epoch, found.job.live_epoch = "j-000000000001", 2, 2
    found.job.state = job_pb2.JobState.Value(f"JOB_STATE_{state}")
    found.job.why.reason, found.job.why.message = state, f"it is {state.lower()}"
    found.job.spec.name, found.job.spec.namespace = "demo", "default"
    spec = found.job.spec.roles.add(name="decode", kind="decode", instances=1, ranks=len(ranks))
    spec.engine.driver = driver
    if ranks:
        found.placement.instances.add(role="decode").ranks.extend(ranks)
        found.placement.why.message = "placed on one node"
    for rank in ranks:
        if live and rank.state == "ACTIVE":
            found.ranks.add(
                role="decode",
                rank=rank.rank,
                epoch=2,
                start_count=rank.start_count,
                stage=health_pb2.RANK_STAGE_LIVE,
            )
    return found


def seat(rank: int, state: str = "ACTIVE", start_count: int = 1) -> job_pb2.RankPlacement:
    """A rank's seat on its own die of sn0/n00."""
    die = f"sn0/n00/npu{rank // 2}/die{rank % 2}"
    return job_pb2.RankPlacement(
        rank=rank, die=die, node="sn0/n00", state=state, start_count=start_count
    )
