"""A machine of labelled nodes, as the chart installs it: kubelets say which dies are whose.

Its devices are simulated twice: for the agents as always, and for kubelets by a device plugin.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster

from tests.kube.device_plugin import DevicePlugin
from tests.kube.release import PATIENCE_S, Installation, Object
from tests.kube.test_cluster import pod
from tests.kubernetes import made_namespace
from tests.support import ROOT

pytestmark = pytest.mark.asyncio(loop_scope="module")
RESOURCE = "huawei.com/Ascend910"
#: Of the three nodes one has no position: it is not part of the machine.
POSITIONS = {"n1": "sn0.n00", "n2": "sn0.n01"}
DIES_PER_NODE = 16
RANKS = {"prefill": 2, "decode": 4}
VALUES: Object = {
    "machine": {"simulated": False},
    "devices": {"resourceName": RESOURCE, "podResources": True},
    "scheduler": {"replicas": 1},
    "operator": {"replicas": 1},
}


class RealMachine(Installation):
    """A release `real` in a namespace of the test's own."""

    def install(self) -> None:
        for node, position in POSITIONS.items():
            self.cluster.kubectl("label", "node", node, f"raddle.dev/node={position}")
        chart, where = str(ROOT / "charts" / "raddle"), ("--namespace", self.namespace)
        values = json.dumps(VALUES)
        self.cluster.helm(
            "install", "real", chart, *where, "-f", "-", "--wait", "--timeout=5m", stdin=values
        )

    def uninstall(self) -> None:
        """With the definitions: another release brings its own."""
        self.kubectl("delete", "inferencejobs", "--all", "--timeout=2m")
        self.cluster.helm("uninstall", "real", "--namespace", self.namespace, "--wait")
        ours = ("--selector", "app.kubernetes.io/instance=real", "--timeout=2m")
        self.cluster.kubectl("delete", "customresourcedefinitions", *ours)
        for node in POSITIONS:
            self.cluster.kubectl("label", "node", node, "raddle.dev/node-")

    def take_device(self, node: str) -> None:
        """A pod of somebody else asks for one device and gets one that kubelet chooses."""
        self.kubectl("apply", "-f", "-", stdin=pod("training", node, {RESOURCE: 1}))
        self.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "pod/training")

    def submit(self) -> None:
        """The example, on as many nodes as there are."""
        text = (ROOT / "examples" / "job.yaml").read_text()
        job = yaml.safe_load(text)
        roles = {role["name"]: role for role in job["spec"]["roles"]}
        job["spec"]["roles"] = [roles[name] | {"ranks": n} for name, n in RANKS.items()]
        job["spec"]["roles"][1]["spreadNodes"] = len(POSITIONS)
        self.kubectl("apply", "-f", "-", stdin=json.dumps(job))
        wait = ("wait", "--for=condition=Ready", "--timeout=3m")
        self.kubectl(*wait, f"inferencejob/{job['metadata']['name']}")

    def held(self) -> dict[str, str]:
        """Die -> reason, of those that take no work."""
        dies = self.raddle("dies")["dies"]
        return {die["die"]: die["why"]["reason"] for die in dies if die["hold"]}

    def shown(self) -> dict[str, str]:
        """The same by the ConfigMap that other tools read."""
        data = self.cluster.get("configmap", "real-dies-sn0", "--namespace", self.namespace)["data"]
        dies = [die for text in data.values() for die in json.loads(text)["dies"]]
        return {die["die"]: die["reason"] for die in dies if die["hold"]}

    def node_condition(self, node: str) -> tuple[str, str]:
        conditions = self.cluster.get("node", node)["status"]["conditions"]
        said = {row["type"]: (row["status"], row["reason"]) for row in conditions}
        return said.get("RaddleDiesHealthy", ("", ""))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def machine(cluster: Cluster) -> AsyncIterator[RealMachine]:
    """Each labelled node's device plugin offers a device for each die, and Raddle is installed."""
    devices = [f"Ascend910-{number}" for number in range(DIES_PER_NODE)]
    async with AsyncExitStack() as at_end:
        for node in POSITIONS:
            root = Path(f"/proc/{cluster.box(node).pid}/root")
            await at_end.enter_async_context(DevicePlugin(root, RESOURCE, devices))
        with made_namespace(cluster, "real-machine") as namespace:
            made = RealMachine(cluster, namespace)
            await asyncio.to_thread(made.install)
            yield made
            await asyncio.to_thread(made.uninstall)


async def test_agents_run_on_labelled_nodes_alone(machine: RealMachine) -> None:
    """One on each, and what it reports are the nodes that the labels name."""

    def look() -> None:
        agents = machine.pods("app.kubernetes.io/component=agent")
        assert {pod["spec"]["nodeName"] for pod in agents} == set(POSITIONS)
        nodes = machine.raddle("nodes")["nodes"]
        ready = {node["node"] for node in nodes if node["state"] == "READY"}
        assert ready == {position.replace(".", "/") for position in POSITIONS.values()}

    await asyncio.to_thread(look)


async def test_a_die_that_a_pod_of_others_holds_takes_no_rank(machine: RealMachine) -> None:
    """Kubelet's word goes from agent to scheduler to operator, and back to Kubernetes' tools."""

    def hold() -> None:
        machine.take_device("n2")
        wait_until(lambda: bool(machine.held()), "a die is held", PATIENCE_S)
        ((die, reason),) = machine.held().items()
        assert (die.rpartition("/npu")[0], reason) == ("sn0/n01", "HELD_BY_OTHER")
        wait_until(lambda: machine.shown() == {die: "HELD_BY_OTHER"}, "the ConfigMap shows it")
        held = ("True", "DiesHeld")
        wait_until(lambda: machine.node_condition("n2") == held, "the node's condition shows it")
        machine.submit()
        ranks = machine.pods("app.kubernetes.io/component=rank")
        placed = [rank["metadata"]["annotations"]["raddle.dev/die"] for rank in ranks]
        assert len(placed) == sum(RANKS.values())
        assert die not in placed
        limits = [rank["spec"]["containers"][0]["resources"]["limits"] for rank in ranks]
        assert all(limit[RESOURCE] == "1" for limit in limits)
        machine.kubectl("delete", "pod", "training")
        wait_until(lambda: machine.held() == {}, "the die is free", PATIENCE_S)
        wait_until(lambda: machine.shown() == {}, "the ConfigMap shows it")

    await asyncio.to_thread(hold)
