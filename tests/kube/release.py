"""An installed release, as those see it who have only kubectl and Raddle's own command line."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster, CommandError

from tests.kube.watched import printed

NAMESPACE = "raddle"
JOB = "small"
SCHEDULERS = "app.kubernetes.io/component=scheduler"
FRONT_DOOR = "app.kubernetes.io/component=frontdoor"
#: On two cores that everything shares.
PATIENCE_S = 300.0
#: Kinds that come and go by themselves, or with a resource definition.
_FLEETING = {
    "apiservices.apiregistration.k8s.io",
    "componentstatuses",
    "events",
    "events.events.k8s.io",
}
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """When an incident of the job was opened, and when kubectl showed its row and its Event."""

    incident: str
    opened: datetime
    listed: datetime
    told: datetime


@dataclass(frozen=True, slots=True)
class Watched:
    """When `kubectl get ij` had each incident in its row, and `kubectl describe` in an Event."""

    rows: Mapping[str, datetime]
    events: Mapping[str, datetime]


class Installation:
    """What stands in a namespace after `helm install`."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        #: The Kubernetes node that is lost now.
        self.lost = ""

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, stdin=stdin)

    def raddle(self, *arguments: str, stdin: str = "") -> Any:
        """What `raddle ...` says in a scheduler's pod, decoded.

        Raises:
            CommandError: no scheduler is ready, or the command failed.
        """
        ready = [
            pod["metadata"]["name"]
            for pod in self.pods(SCHEDULERS)
            if pod["spec"].get("nodeName") != self.lost and is_ready(pod)
        ]
        if not ready:
            raise CommandError("no scheduler is ready")
        command = ("exec", "-i", ready[0], "--", "raddle", *arguments, "--output", "json")
        return json.loads(self.kubectl(*command, stdin=stdin))

    def pods(self, selector: str) -> list[Object]:
        """Pods that are not on their way out."""
        command = ("pods", "--namespace", self.namespace, "--selector", selector)
        found = self.cluster.get(*command)["items"]
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def leader(self) -> str:
        """The pod of the scheduler that leads; empty while none does."""
        try:
            return str(self.raddle("version")["leader_identity"])
        except CommandError:
            return ""

    def incident(self, incident: str) -> Object:
        found: Object = self.raddle("incidents", incident)["incident"]
        return found


class Release(Installation):
    """The release `raddle` with the job `small` on a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster, NAMESPACE)

    # --- objects ---------------------------------------------------------------------------------

    def nodes_of(self, selector: str) -> set[str]:
        return {pod["spec"].get("nodeName", "") for pod in self.pods(selector)}

    def rank_pods(self, role: str = "") -> list[Object]:
        which = f",raddle.dev/role={role}" if role else ""
        return self.pods(f"raddle.dev/job={JOB},app.kubernetes.io/component=rank{which}")

    def own_pods(self) -> dict[str, str]:
        """Uid -> name of the pods of Raddle itself."""
        components = "scheduler,agent,operator,etcd"
        pods = self.pods(f"app.kubernetes.io/component in ({components})")
        return {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}

    def objects(self) -> set[str]:
        """Everything in the cluster that lasts, by kind and name; not kubelets' own leases."""
        kinds = self.cluster.kubectl("api-resources", "--verbs=list", "--output=name").split()
        lasting = ",".join(kind for kind in kinds if kind not in _FLEETING)
        found = self.cluster.kubectl("get", lasting, "-A", "--output=name").split()
        return set(found) - {f"lease.coordination.k8s.io/{node}" for node in self.cluster.nodes}

    def is_alone(self) -> bool:
        """Is no namespace on its way out, whose objects would go with it later?"""
        found = self.cluster.get("namespaces")["items"]
        return all("deletionTimestamp" not in item["metadata"] for item in found)

    # --- the job ---------------------------------------------------------------------------------

    def service(self) -> str:
        """Address of the job's Service in the cluster."""
        found = self.cluster.get("service", JOB, "--namespace", NAMESPACE)
        return f"{found['spec']['clusterIP']}:80"

    def status(self) -> Object:
        found = self.cluster.get("inferencejob", JOB, "--namespace", NAMESPACE)
        status: Object = found.get("status") or {}
        return status

    def is_ready(self, epoch: int) -> bool:
        """Do the conditions say that the job serves at this epoch or a later one?"""
        status = self.status()
        said = {row["type"]: row["status"] for row in status.get("conditions", ())}
        wanted = {"Ready": "True", "Placed": "True", "Recovering": "False", "Queued": "False"}
        return wanted.items() <= said.items() and status["liveEpoch"] >= epoch

    def until_ready(self, epoch: int) -> None:
        wait_until(lambda: self.is_ready(epoch), f"the job serves at epoch {epoch}", PATIENCE_S)

    @contextmanager
    def watched(self) -> Iterator[Watched]:
        """Watch what kubectl shows of the job, for the time of a block."""
        watch = ("--namespace", NAMESPACE, "--watch")
        told = f"involvedObject.name={JOB},reason=IncidentOpened"
        messages = ("--field-selector", told, "--output", r'jsonpath={.message}{"\n"}')
        with (
            printed(self.cluster, "get", "ij", JOB, *watch) as rows,
            printed(self.cluster, "get", "events", *watch, *messages) as events,
        ):
            yield Watched(rows, events)

    def next_incident(self, watched: Watched, killed: datetime) -> Shown:
        """Wait until kubectl shows an incident of after the kill: its row, and its Event."""
        older: set[str] = set()
        while True:
            wait_until(lambda: bool(watched.rows.keys() - older), "the incident is listed")
            incident = max(watched.rows.keys() - older)
            opened = datetime.fromisoformat(self.incident(incident)["create_time"])
            if opened >= killed:
                break
            older.add(incident)
        wait_until(lambda: incident in watched.events, "the incident has an Event")
        text = self.kubectl("describe", "ij", JOB)
        assert re.search(rf"IncidentOpened .*\b{incident}\b", text)
        return Shown(incident, opened, watched.rows[incident], watched.events[incident])

    def is_closed(self, incident: str) -> bool:
        return bool(self.incident(incident)["phase"] == "INCIDENT_PHASE_CLOSED")

    def signal_rank(self, role: str, number: signal.Signals) -> None:
        """Signal the process of one rank in its pod, by the number that the machine knows it by."""
        pod = next(pod for pod in self.rank_pods(role) if is_ready(pod))
        pids = self.cluster.container_pids(NAMESPACE, pod["metadata"]["name"], "rank")
        os.kill(pids[0], number)

    # --- who leads -------------------------------------------------------------------------------

    def acting_operator(self) -> str:
        """The pod of the operator that acts."""
        lease = self.cluster.get("lease", "raddle-operator", "--namespace", NAMESPACE)
        return str(lease["spec"].get("holderIdentity") or "")

    def evict(self, pod: str) -> None:
        """As `kubectl drain` does it.

        Raises:
            CommandError: a budget forbids it now.
        """
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        self.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))

    def schedulers_are_ready(self, count: int) -> bool:
        return [is_ready(pod) for pod in self.pods(SCHEDULERS)] == [True] * count

    def move_leader(self, node: str, *, here: bool) -> None:
        """Delete the leading scheduler's pod until one on this Kubernetes node leads, or none."""

        def moved() -> bool:
            pod = self.leader()
            if not pod:
                return False
            on_it = self._node_of(pod) == node
            if on_it != here:
                self.kubectl("delete", "pod", pod, "--wait=false")
            return on_it == here

        wait_until(moved, f"the leader is {'' if here else 'not '}on {node}", PATIENCE_S)

    def move_operator_from(self, node: str) -> None:
        """Another operator acts if the one that does is on this Kubernetes node."""

        def moved() -> bool:
            pod = self.acting_operator()
            if pod and self._node_of(pod) == node:
                self.kubectl("delete", "pod", pod, "--wait=false")
                return False
            return bool(pod)

        wait_until(moved, f"no operator on {node} acts", PATIENCE_S)

    def _node_of(self, pod: str) -> str:
        found = self.cluster.get("pods", "--namespace", NAMESPACE)["items"]
        return next(
            (item["spec"].get("nodeName", "") for item in found if item["metadata"]["name"] == pod),
            "",
        )

    # --- Kubernetes nodes ------------------------------------------------------------------------

    def lose_node(self, node: str) -> None:
        self.lost = node
        self.cluster.kill_node(node)

    def regain_node(self, node: str) -> None:
        """Bring it back, and wait until every node of the machine reports."""
        self.cluster.start_node(node)
        self.lost = ""
        wait_until(self._is_whole, "all nodes of the machine report", PATIENCE_S)

    def _is_whole(self) -> bool:
        try:
            nodes = self.raddle("nodes")["nodes"]
        except CommandError:
            return False
        return bool(nodes) and all(node["state"] == "READY" for node in nodes)


def is_ready(pod: Object) -> bool:
    said = {row["type"]: row["status"] for row in pod["status"].get("conditions", ())}
    return said.get("Ready") == "True"
