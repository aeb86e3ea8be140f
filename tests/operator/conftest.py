"""A stage for the operator: a real API server, a real scheduler with simulated agents, operators.

No kubelet runs, so Kubernetes nodes are only objects and Pods never start: what the operator asks
for is what is looked at.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from raddle.cli.cluster import LocalCluster
from raddle.model.errors import Reason
from raddle.operator.cluster import Cluster
from raddle.operator.machine_view import CONDITION
from raddle.operator.names import KINDS, MANAGER
from raddle.operator.reasons import LISTED, EventReason, camel
from raddle.v1 import job_pb2, scheduler_pb2
from raddle.wire.status import error_from
from tests.chart.rendering import rights
from tests.kubernetes import ApiServer
from tests.operator.resources import inference_job, role
from tests.support import ROOT, eventually

MACHINE = ROOT / "tests" / "e2e" / "sixteen_nodes.yaml"
#: Under load everything takes longer; nothing is measured here.
TIMEOUT_S = 120.0
Object = dict[str, Any]


def simulated(name: str = "decode", **more: Any) -> Object:
    """A role whose ranks live in the agents."""
    return role(name, ranks=4, slotsPerRank=10) | {"engine": {"driver": "simulated"}} | more


@dataclass
class Stage:
    """Everything that a test touches."""

    folder: Path
    api: ApiServer
    raddle: LocalCluster
    cluster: Cluster
    #: Namespaces of the release and of the jobs. Nothing here deletes a namespace's objects, so
    #: each stage has its own.
    space: str
    jobs: str
    operators: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    async def set_up(self) -> None:
        """Two Kubernetes nodes, which the agents that run already are on, and an operator."""
        for space in (self.space, self.jobs):
            await asyncio.to_thread(self.api.make_namespace, space)
        nodes = list(self.raddle.supernode.node_names())
        half = len(nodes) // 2
        flags = []
        for number, share in ((1, nodes[:half]), (2, nodes[half:])):
            await self.add_node(f"worker-{number}", f"192.0.2.{number}", {})
            flags.append(f"--from-literal=worker-{number}={','.join(share)}")
        await self.kubectl("create", "configmap", "raddle-nodes", "-n", self.space, *flags)
        await self.grant({"operator": {"namespaces": [self.jobs]}})
        self.start_operator()

    # --- operators -------------------------------------------------------------------------------

    async def grant(self, values: Object) -> None:
        """Give the operators' account the rights that the chart gives it with these values."""
        items = await asyncio.to_thread(rights, values, self.space)
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        await self.kubectl("apply", "-f", "-", stdin=text)

    def start_operator(self, identity: str = "one", *flags: str) -> None:
        """One with the chart's own rights: what it may not do fails the tests."""
        kubeconfig = self.api.account_kubeconfig(self.space, "raddle-operator")
        command = [sys.executable, "-m", "raddle.operator.main"]
        command += ["--schedulers", ",".join(self.raddle.addresses)]
        command += ["--namespace", self.space, "--namespaces", self.jobs]
        command += ["--identity", identity]
        command += ["--image", "localhost/raddle:dev", "--kubeconfig", str(kubeconfig)]
        with (self.folder / f"operator-{identity}.log").open("ab") as log:
            self.operators[identity] = subprocess.Popen(
                [*command, "--no-tls", *flags], stdout=log, stderr=log, start_new_session=True
            )

    def kill_operator(self, identity: str = "one") -> None:
        process = self.operators.pop(identity)
        process.kill()
        process.wait()

    def kill_operators(self) -> None:
        for identity in tuple(self.operators):
            self.kill_operator(identity)

    async def end_operator(self, identity: str = "one") -> int:
        """Ask it to end; gives its exit code."""
        process = self.operators.pop(identity)
        process.terminate()
        return await asyncio.to_thread(process.wait, TIMEOUT_S)

    def log(self, identity: str = "one") -> str:
        return (self.folder / f"operator-{identity}.log").read_text()

    # --- resources -------------------------------------------------------------------------------

    async def kubectl(self, *arguments: str, stdin: str = "") -> str:
        return await asyncio.to_thread(self.api.kubectl, *arguments, stdin=stdin)

    async def apply(self, item: Object) -> None:
        """Apply without what the API server makes itself."""
        metadata = {k: v for k, v in item["metadata"].items() if k not in ("uid", "generation")}
        text = json.dumps({**item, "metadata": metadata})
        await self.kubectl("apply", "-f", "-", stdin=text)

    async def apply_job(self, name: str, *roles: Object, **more: Any) -> None:
        item = inference_job(name, *(roles or (simulated(),)), **more)
        item["metadata"]["namespace"] = self.jobs
        await self.apply(item)

    async def resource(
        self, name: str, kind: str = "InferenceJob", space: str | None = None
    ) -> Object:
        """As the API server has it; an empty one if it is not there."""
        return await self.cluster.get(kind, self.jobs if space is None else space, name) or {}

    async def condition(
        self, name: str, kind: str, resource_kind: str = "InferenceJob", space: str | None = None
    ) -> Mapping[str, Any]:
        status = (await self.resource(name, resource_kind, space)).get("status") or {}
        found = {c["type"]: c for c in status.get("conditions") or ()}
        return found.get(kind) or {"status": "", "reason": "", "message": ""}

    async def events(self, name: str) -> list[Object]:
        found = await self.cluster.find("Event", self.jobs)
        return [event for event in found if event["involvedObject"]["name"] == name]

    async def unlisted_reasons(self) -> list[str]:
        """Reasons of conditions and Events of ours that `docs/reference/reasons.md` has not."""
        conditions = {camel(reason) for reason in LISTED.values()}
        shown = [
            (condition["reason"], conditions)
            for kind in (*KINDS, "Node")
            for item in await self.cluster.find(kind)
            for condition in (item.get("status") or {}).get("conditions") or ()
            if kind != "Node" or condition["type"] == CONDITION
        ]
        shown += [
            (event["reason"], {camel(reason) for reason in EventReason})
            for event in await self.cluster.find("Event", self.jobs)
            if event["source"].get("component") == MANAGER
        ]
        return sorted({reason for reason, listed in shown if reason not in listed})

    async def until(self, condition: Callable[[], bool | Awaitable[bool]], what: str) -> None:
        await eventually(condition, what, TIMEOUT_S)

    async def until_condition(
        self, name: str, kind: str, status: str, *, reason: str = "", of: str = "InferenceJob"
    ) -> None:
        space = "" if of in ("SuperNode", "Maintenance", "Node") else None

        async def holds() -> bool:
            found = await self.condition(name, kind, of, space)
            last.append(f"{found['status']} {found['reason']}: {found['message']}")
            return found["status"] == status and reason in ("", found["reason"])

        last: list[str] = []
        try:
            await self.until(holds, f"{of} {name}: {kind} is {status} {reason}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {last[-1]}") from error

    # --- the scheduler ---------------------------------------------------------------------------

    async def call(self, method: str, request: Any) -> Any:
        return await getattr(self.raddle.stub, method)(request, timeout=10.0)

    async def job(self, name: str) -> scheduler_pb2.GetJobResponse | None:
        """The scheduler's job of this name."""
        try:
            found: scheduler_pb2.GetJobResponse = await self.call(
                "GetJob", scheduler_pb2.GetJobRequest(namespace=self.jobs, name=name)
            )
        except grpc.aio.AioRpcError as error:
            if error_from(error).reason is Reason.NOT_FOUND:
                return None
            raise
        return found

    async def until_job(self, name: str, holds: Callable[[job_pb2.Job], bool], what: str) -> None:
        async def check() -> bool:
            found = await self.job(name)
            return found is not None and holds(found.job)

        await self.until(check, f"job {name}: {what}")

    async def until_no_job(self, name: str) -> None:
        async def check() -> bool:
            try:
                return await self.job(name) is None
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return False
                raise

        await self.until(check, f"the scheduler has no job {name}")

    # --- Kubernetes nodes ------------------------------------------------------------------------

    async def add_node(self, name: str, address: str, labels: Mapping[str, str]) -> None:
        """A Node object that says that it is ready."""
        item = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux", **labels}},
        }
        await self.kubectl("create", "-f", "-", stdin=json.dumps(item))
        status = {
            "conditions": [{"type": "Ready", "status": "True", "reason": "Said"}],
            "addresses": [{"type": "InternalIP", "address": address}],
        }
        change = json.dumps({"status": status})
        await self.kubectl(
            "patch", "node", name, "--subresource=status", "--type=merge", "-p", change
        )
        # A node controller would take it away; there is none here.
        taint = json.dumps({"spec": {"taints": None}})
        await self.kubectl("patch", "node", name, "--type=merge", "-p", taint)

    async def clear(self) -> None:
        """What is looked for everywhere: nobody is there who would end it."""
        for kind in ("Node", "InferenceJob", "SuperNode", "Maintenance"):
            for item in await self.cluster.find(kind):
                await self.cluster.patch(item, {"metadata": {"finalizers": None}})
                await self.cluster.delete(item)

    async def data(self, name: str) -> dict[str, str]:
        """Of a ConfigMap of the release."""
        found = await self.resource(name, "ConfigMap", self.space)
        data: dict[str, str] = found.get("data") or {}
        return data


def _agents_with_pods(name: str) -> list[str]:
    """Agents offer the reference engine too, and wait for ranks that nobody brings up here."""
    if not name.startswith("agent"):
        return []
    return ["--drivers", "simulated,reference", "--ranks", "pods"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(
    served_definitions: ApiServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stage]:
    """API server and scheduler run, and one operator."""
    folder = tmp_path_factory.mktemp("stage")
    suffix = secrets.token_hex(3)
    async with AsyncExitStack() as at_end:
        cluster = await Cluster.connect(str(served_definitions.kubeconfig))
        at_end.push_async_callback(cluster.close)
        raddle = LocalCluster(folder, machine=str(MACHINE), more_flags=_agents_with_pods)
        at_end.push_async_callback(raddle.stop)
        found = Stage(
            folder, served_definitions, raddle, cluster, f"raddle-{suffix}", f"jobs-{suffix}"
        )
        at_end.push_async_callback(found.clear)
        at_end.callback(found.kill_operators)
        await raddle.start()
        await found.set_up()
        yield found
        assert await found.unlisted_reasons() == []
