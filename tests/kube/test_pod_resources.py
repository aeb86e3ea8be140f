"""Dies that pods of others hold, as an agent hears it from a real kubelet."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tools.kubernetes.cluster import Cluster

from raddle.agent.health.pod_resources import PodResources
from raddle.model.health import DieHolder, PartIdentity
from tests.kube.device_plugin import DevicePlugin
from tests.kube.test_cluster import pod
from tests.support import eventually

NODE = "n3"
RESOURCE = "huawei.com/Ascend910"
PARTS = tuple(PartIdentity(position=f"sn0/n00/npu0/die{n}", logic_id=n) for n in range(2))


async def test_a_kubelet_tells_which_pod_holds_which_die(cluster: Cluster, namespace: str) -> None:
    """From the moment at which the device plugin's device was given until the pod is gone."""
    root = Path(f"/proc/{cluster.box(NODE).pid}/root")
    socket = root / "var/lib/kubelet/pod-resources/kubelet.sock"
    where = ("--namespace", namespace)

    def offered() -> bool:
        return bool(cluster.get("node", NODE)["status"]["allocatable"].get(RESOURCE) == "1")

    async with DevicePlugin(root, RESOURCE, ["Ascend910-1"]):
        told = PodResources(str(socket), RESOURCE).follow(PARTS)
        await eventually(lambda: asyncio.to_thread(offered), "the device is offered", 60.0)
        text = pod("training", NODE, {RESOURCE: 1})
        await asyncio.to_thread(cluster.kubectl, "apply", *where, "-f", "-", stdin=text)
        holder = DieHolder(die="sn0/n00/npu0/die1", pod=f"{namespace}/training")
        assert await asyncio.wait_for(anext(told), 60.0) == (holder,)
        await asyncio.to_thread(cluster.kubectl, "delete", *where, "pod", "training")
        assert await asyncio.wait_for(anext(told), 60.0) == ()
        await told.aclose()
