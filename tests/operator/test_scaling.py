"""A role is scaled by others: its scale subresource, and a real HorizontalPodAutoscaler.

The autoscaler's controller and the API server are Kubernetes' own; what Pods use comes from a
simulated metrics.k8s.io, and that they run is said here, for there is no kubelet.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from raddle.v1 import health_pb2, scheduler_pb2
from tests.operator.conftest import Stage, simulated
from tests.operator.resources import role
from tests.operator.simulated_metrics import SimulatedMetrics

pytestmark = pytest.mark.asyncio(loop_scope="module")
CONTROLLER = "horizontal-pod-autoscaler-controller"
LONG_AGO = "2026-01-01T00:00:00Z"
#: What one replica can do, in milliseconds of CPU a second.
TARGET_MILLIS = 100


def decode(**more: Any) -> dict[str, Any]:
    """A role whose ranks have Pods."""
    return role("decode", ranks=4, slotsPerRank=10, **more)


class Load:
    """Work that the Pods of a role share equally."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.millis = 0

    def usage(self, namespace: str, selector: str) -> dict[str, int]:
        pods = json.loads(
            self._stage.api.kubectl("get", "pods", "-n", namespace, "-l", selector, "-o", "json")
        )["items"]
        return {pod["metadata"]["name"]: self.millis // len(pods) for pod in pods}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def load(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Load]:
    """Autoscalers act, by what this says that Pods use."""
    found = Load(stage)
    metrics = SimulatedMetrics(tmp_path_factory.mktemp("metrics"), found.usage)
    for item in metrics.objects(stage.space):
        await stage.apply(item)
    await stage.kubectl(
        "wait", "--for=condition=Available", "apiservice/v1beta1.metrics.k8s.io", "--timeout=60s"
    )
    stage.api.start_controller(CONTROLLER, "--horizontal-pod-autoscaler-sync-period=1s")
    yield found
    stage.api.kill(CONTROLLER)
    await stage.kubectl("delete", "apiservice", "v1beta1.metrics.k8s.io")
    metrics.stop()


async def scale_of(stage: Stage, name: str) -> dict[str, Any]:
    """What an autoscaler sees of a role; nothing before the role is there."""
    if not await stage.resource(name, "InferenceRole"):
        return {"status": {}}
    path = f"/apis/raddle.dev/v1alpha1/namespaces/{stage.jobs}/inferenceroles/{name}/scale"
    found: dict[str, Any] = json.loads(await stage.kubectl("get", "--raw", path))
    return found


async def selected(stage: Stage, name: str) -> list[dict[str, Any]]:
    """Pods that the scale subresource selects, but for those on their way out."""
    selector = (await scale_of(stage, name))["status"].get("selector", "")
    pods = await stage.cluster.find("Pod", stage.jobs, selector) if selector else []
    return [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]


async def until_placed(stage: Stage, name: str, replicas: int) -> None:
    """As many replicas are placed, and one Pod of each instance is selected."""

    async def placed() -> bool:
        said = await scale_of(stage, name)
        found = await selected(stage, name)
        instances = {pod["metadata"]["labels"]["raddle.dev/instance"] for pod in found}
        return bool(said["status"].get("replicas") == replicas == len(instances) == len(found))

    await stage.until(placed, f"{name} has {replicas} replicas, each with a Pod that is selected")


async def play_kubelet(stage: Stage, pods: list[dict[str, Any]]) -> None:
    """Say of these Pods that they run since long ago."""
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": LONG_AGO}
    status = {"phase": "Running", "startTime": LONG_AGO, "conditions": [ready]}
    for pod in pods:
        if pod["status"]["phase"] == "Pending":
            await stage.cluster.patch(pod, {"status": status}, part="status")


async def test_an_instance_that_lost_its_first_rank_is_still_counted(stage: Stage) -> None:
    """The scale subresource tells the sizes, and selects another rank of that instance instead."""
    await stage.apply_job("counted", simulated(ranks=6, instances=2))
    await stage.until_condition("counted", "Ready", "True")

    async def counts(*seats: str) -> bool:
        status = (await scale_of(stage, "counted-decode"))["status"]
        of_role = "raddle.dev/job=counted,raddle.dev/role=decode"
        selector = f"{of_role},raddle.dev/seat in ({','.join(seats)})"
        return bool(status == {"replicas": 2, "selector": selector})

    await stage.until(lambda: counts("0-0", "1-0"), "the first ranks are counted")
    found = await stage.job("counted")
    assert found is not None
    request = scheduler_pb2.InjectFaultRequest(
        subject=found.placement.instances[0].ranks[0].die,
        code="80E18005",
        level=health_pb2.FAULT_LEVEL_SEPARATE_NPU,
    )
    await stage.call("InjectFault", request)
    await stage.until(lambda: counts("0-1", "1-0"), "the next rank is counted")
    request.clear = True
    await stage.call("InjectFault", request)
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "counted")


async def test_nothing_is_selected_of_a_role_that_waits(stage: Stage) -> None:
    """The selector of a job without a place is one that the API server takes, of no Pod."""
    await stage.apply_job("waiting", decode(), suspend=True)
    await stage.until_condition("waiting", "Ready", "False", reason="Suspended")
    scale = await scale_of(stage, "waiting-decode")
    assert scale["spec"]["replicas"] == 1
    assert scale["status"]["selector"].endswith("raddle.dev/seat in ()")
    assert await selected(stage, "waiting-decode") == []
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "waiting")


async def test_an_autoscaler_follows_the_load(stage: Stage, load: Load) -> None:
    """Up as far as its bound, and down again; the scheduler's job has each size."""
    await stage.apply_job("auto", decode())
    await until_placed(stage, "auto-decode", 1)
    target = {"apiVersion": "raddle.dev/v1alpha1", "kind": "InferenceRole", "name": "auto-decode"}
    wanted = {"type": "AverageValue", "averageValue": f"{TARGET_MILLIS}m"}
    autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "auto", "namespace": stage.jobs},
        "spec": {
            "scaleTargetRef": target,
            "minReplicas": 1,
            "maxReplicas": 3,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": wanted}}],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}},
        },
    }
    load.millis = 9 * TARGET_MILLIS
    await stage.apply(autoscaler)

    async def has(replicas: int) -> bool:
        await play_kubelet(stage, await selected(stage, "auto-decode"))
        found = await stage.job("auto")
        return found is not None and found.job.spec.roles[0].instances == replicas

    await stage.until(lambda: has(3), "the job has three instances")
    await until_placed(stage, "auto-decode", 3)
    load.millis = TARGET_MILLIS
    await stage.until(lambda: has(1), "the job has one instance")
    await until_placed(stage, "auto-decode", 1)
    await stage.kubectl("delete", "-n", stage.jobs, "hpa", "auto")
    await stage.kubectl("delete", "-n", stage.jobs, "ij", "auto")
