"""The machine: which Kubernetes node plays which of its nodes, and what both sides say of them.

In go Kubernetes nodes, foreign Pods and the scheduler's picture of its nodes; out go the ConfigMap
that agents read, cordons, drains and words about lost nodes, and the state of dies where
Kubernetes' own tools see it. Everything is read anew each time; nothing depends on what was told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog

from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.model.kinds import HoldKind, NodeState
from raddle.model.topology import node_of
from raddle.operator import machine_view
from raddle.operator.cluster import Cluster
from raddle.operator.hosts import (
    Host,
    WrongDevice,
    die_of,
    foreign_holders,
    host_of,
    selected,
    wrong_devices,
)
from raddle.operator.pods import Site, labels
from raddle.operator.reasons import OperatorReason
from raddle.operator.scheduler_link import IDENTITY, SchedulerLink
from raddle.operator.served import Served
from raddle.operator.shares import Shares, labelled, shares
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from raddle.wire.rank_tables import TableRank

_DRAIN_TIMEOUT_S = 86_400
_OPEN = (
    incident_pb2.MAINTENANCE_STATE_DRAINING,
    incident_pb2.MAINTENANCE_STATE_DRAINED,
)
_SILENT = (NodeState.SUSPECT, NodeState.UNKNOWN)
_QUIET = (NodeState.LOST, NodeState.ABSENT)
#: Refusals that mean that somebody else was faster, or will be told by the next picture.
_OVERTAKEN = (Reason.NOT_FOUND, Reason.INVALID_ARGUMENT, Reason.MANAGED_BY_OTHER)
log = structlog.get_logger()
Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """Which Kubernetes nodes are the machine, and whose dies count as taken."""

    #: Share the machine's nodes out over Kubernetes nodes; else these have a label each.
    simulated: bool
    #: Labels of the Kubernetes nodes to share out over.
    node_selector: Mapping[str, str]
    #: Taints that keep no work away, `key` or `key:effect`.
    tolerated_taints: Collection[str]
    #: Hold dies that the device plugin gave to Pods of others.
    foreign_pods: bool


class Machine:
    """One operator's view of Kubernetes nodes and the machine's nodes."""

    def __init__(
        self,
        cluster: Cluster,
        link: SchedulerLink,
        served: Served,
        site: Site,
        options: MachineOptions,
    ) -> None:
        self._cluster = cluster
        self._link = link
        self._served = served
        self._site = site
        self._options = options
        #: All Kubernetes nodes, and those among them that are part of the machine.
        self._all_hosts: dict[str, Host] = {}
        self._hosts: dict[str, Host] = {}
        #: Node of the machine -> Kubernetes node.
        self._carriers: dict[str, str] = {}
        #: Node of the machine -> Kubernetes nodes whose labels name it, if they are several.
        self.named_twice: dict[str, tuple[str, ...]] = {}
        self._is_known = False
        #: Die -> who holds it, and whether that is somebody else.
        self.holders: dict[str, tuple[str, bool]] = {}

    # --- what others ask -------------------------------------------------------------------------

    def require_known(self) -> None:
        """Refuse until it is known who plays which node; whoever asked is called again then.

        Raises:
            TemporaryError: NO_LEADER, for only the scheduler knows the nodes.
        """
        if not self._is_known:
            message = "it is not known yet which Kubernetes node plays which node"
            raise TemporaryError(Reason.NO_LEADER, message)

    @property
    def carriers(self) -> dict[str, str] | None:
        """Which Kubernetes node plays each node of the machine; None while that is not known."""
        return self._carriers if self._is_known else None

    def host_of(self, node: str) -> Host | None:
        """The Kubernetes node that plays a node of the machine."""
        return self._hosts.get(self._carriers.get(node, ""))

    def is_changed(self, resource: Mapping[str, Any]) -> bool:
        """Does this Node say anything that matters here and is new?"""
        host = host_of(resource, self._options.tolerated_taints)
        return self._all_hosts.get(host.name) != host

    def device_of(self, die: str) -> int | None:
        """Number of a die on its node, as its agent found it; None for simulated devices."""
        part = self._die(die)
        return part.part.logic_id if part is not None and not self._options.simulated else None

    def wrong_devices(self, pods: Collection[Object]) -> list[WrongDevice]:
        """Those of a job's ranks whose Pods have other devices than the ranks are placed on."""
        if self._options.simulated:
            return []
        told = [self._link.nodes.values.get(node_of(die_of(pod))) for pod in pods]
        nodes = {message.node.node: message for message in told if message is not None}
        return wrong_devices([d for message in nodes.values() for d in message.dies], pods)

    def table_rank(self, rank: job_pb2.RankPlacement, pod_ip: str) -> TableRank | None:
        """What a rank table says of a rank; None for one without a die or a host."""
        host, die = self.host_of(rank.node), self._die(rank.die)
        if host is None or die is None or not die.HasField("part"):
            return None
        part = die.part
        return TableRank(
            rank=rank.rank,
            node=rank.node,
            supernode=rank.node.partition("/")[0],
            host_ip=host.address,
            pod_ip=pod_ip,
            device=part.logic_id,
            device_ip=part.device_ip,
            super_device_id=part.super_device_id,
        )

    def _die(self, die: str) -> scheduler_pb2.DieStatus | None:
        message = self._link.nodes.values.get(node_of(die)) if die else None
        dies = message.dies if message is not None else ()
        return next((found for found in dies if found.die == die), None)

    # --- the procedure ---------------------------------------------------------------------------

    async def bring(self) -> None:
        """Bring both sides together."""
        self._link.nodes.require_whole()
        self._link.maintenances.require_whole()
        found = [
            host_of(item, self._options.tolerated_taints)
            for item in await self._cluster.find("Node")
        ]
        self._all_hosts = {host.name: host for host in found}
        self._hosts = {host.name: host for host in found if self._is_managed(host)}
        now = await self._shares_now()
        wanted = self._wanted(now)
        carriers = {node: host for host, nodes in wanted.items() for node in nodes}
        self._carriers = carriers
        self.holders = self._holders_now()
        # An agent that shall serve nothing is told so: it waits for no share.
        told = dict.fromkeys(self._hosts, ()) | wanted
        if told != now:
            await self._write_shares(now, told)
        self._is_known = True
        await self._tell_lost(now)
        await self._cordon(OperatorReason.HOST_CORDONED, self._wanted_cordons())
        await self._drain()
        await self._show()
        # Last, for it reads all Pods of the cluster.
        await self._cordon(OperatorReason.HELD_BY_OTHER, await self._wanted_die_holds())

    def _holders_now(self) -> dict[str, tuple[str, bool]]:
        found = {
            die.die: (die.holder, any(h.reason == OperatorReason.HELD_BY_OTHER for h in die.holds))
            for message in self._link.nodes.values.values()
            for die in message.dies
        }
        return {die: held for die, held in found.items() if held != ("", False)}

    def _is_managed(self, host: Host) -> bool:
        if self._options.simulated:
            return selected(host, self._options.node_selector)
        return bool(host.node)

    @property
    def _map_name(self) -> str:
        return f"{self._site.release}-nodes"

    async def _shares_now(self) -> Shares:
        data = await self._map(self._map_name)
        return {host: tuple(filter(None, text.split(","))) for host, text in data.items()}

    async def _map(self, name: str) -> dict[str, str]:
        """What a ConfigMap of ours has; nothing if it is not there."""
        found = await self._cluster.get("ConfigMap", self._site.namespace, name)
        return (found or {}).get("data") or {}

    def _state(self, node: str) -> str:
        message = self._link.nodes.values.get(node)
        return str(message.node.state) if message is not None else NodeState.ABSENT

    def _may_run(self, node: str) -> bool:
        """Has the scheduler not said that nothing runs there any more?"""
        return self._state(node) not in _QUIET

    def _busy(self) -> set[str]:
        """Nodes with ranks on them."""
        return {name for name, told in self._link.nodes.values.items() if told.node.ranks}

    def _wanted(self, now: Shares) -> Shares:
        nodes = list(self._link.nodes.values)
        if not self._options.simulated:
            found, named_twice = labelled(
                now, {host.name: host.node for host in self._hosts.values()}
            )
            self._note(named_twice)
            return self._leaving(now, found) | found
        # A Kubernetes node that went keeps its share until what ran there is known to be lost.
        leaving = {host for host, share in now.items() if any(map(self._may_run, share))}
        return shares(
            now,
            nodes=sorted(nodes),
            usable=[host.name for host in self._hosts.values() if host.usable],
            present=self._hosts.keys() | leaving,
            busy=self._busy(),
            heard=[node for node in nodes if self._may_run(node)],
        )

    def _leaving(self, now: Shares, found: Shares) -> Shares:
        """Shares of Kubernetes nodes that went, until what ran there is known to be lost."""
        played = {node for nodes in found.values() for node in nodes}
        return {
            host: nodes
            for host, nodes in now.items()
            if host not in self._all_hosts
            and played.isdisjoint(nodes)
            and any(map(self._may_run, nodes))
        }

    def _note(self, named_twice: dict[str, tuple[str, ...]]) -> None:
        if named_twice != self.named_twice:
            self.named_twice = named_twice
            for node, hosts in named_twice.items():
                log.warning("several Kubernetes nodes are labelled as one", node=node, hosts=hosts)

    async def _write_shares(self, now: Shares, wanted: Shares) -> None:
        data: dict[str, str | None] = {host: ",".join(nodes) for host, nodes in wanted.items()}
        data |= {host: None for host in now if host not in wanted}
        log.info("shares", **{host: text or "none" for host, text in data.items()})
        await self._write_map(self._map_name, data)

    async def _write_map(self, name: str, data: Mapping[str, str | None]) -> None:
        """Set keys of a ConfigMap of ours, made if it is not there; None takes a key away."""
        about: Object = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": name,
                "namespace": self._site.namespace,
                "labels": labels(self._site),
            },
        }
        if await self._cluster.patch(about, {"data": dict(data)}) is None:
            present = {key: text for key, text in data.items() if text is not None}
            if await self._cluster.create({**about, "data": present}) is None:
                raise TemporaryError(Reason.STALE_REVISION, f"ConfigMap {name} was just made")

    # --- words to the scheduler ------------------------------------------------------------------

    async def _tell_lost(self, now: Shares) -> None:
        """A second witness against silent nodes: their Kubernetes node is gone, or plays another.

        A Kubernetes node that is only not ready proves nothing: the API server may be cut off from
        it while ranks there go on.
        """
        for host, nodes in now.items():
            known = self._all_hosts.get(host)
            if known is None or known.gone:
                for node in nodes:
                    if self._state(node) in _SILENT:
                        await self._lost(node, f"its Kubernetes node {host} is gone")
        played = {node for nodes in now.values() for node in nodes} | self._carriers.keys()
        busy = self._busy()
        for node in self._link.nodes.values:
            if node not in played and node not in busy and self._state(node) in _SILENT:
                await self._lost(node, "no Kubernetes node plays it any more")

    async def _lost(self, node: str, message: str) -> None:
        request = scheduler_pb2.DeclareNodeLostRequest(node=node, message=message)
        await self._ask("DeclareNodeLost", request)

    async def _ask(self, method: str, request: Any) -> None:
        """A call whose refusal means that the picture is a moment old: the next one tells."""
        try:
            await self._link.call(method, request)
        except PermanentError as error:
            if error.reason not in _OVERTAKEN:
                raise
            log.info("not done", call=method, why=error.message)

    async def _cordon(self, reason: OperatorReason, wanted: Mapping[str, str]) -> None:
        """Let these subjects, with a message each, and no others be cordoned for this reason."""
        have = {
            hold.subject
            for message in self._link.nodes.values.values()
            for die in message.dies
            for hold in die.holds
            if hold.kind == HoldKind.CORDON and hold.reason == reason
        }
        for subject, message in wanted.items():
            if subject not in have:
                request = scheduler_pb2.CordonRequest(
                    subject=subject, message=message, reason=reason
                )
                await self._ask("Cordon", request)
        for subject in have - wanted.keys():
            await self._ask(
                "Uncordon", scheduler_pb2.UncordonRequest(subject=subject, reason=reason)
            )

    def _wanted_cordons(self) -> dict[str, str]:
        """Nodes whose Kubernetes node gets no new work, and why."""
        hosts = {node: self.host_of(node) for node in self._link.nodes.values}
        return {node: host.cordon for node, host in hosts.items() if host and host.cordon}

    async def _wanted_die_holds(self) -> dict[str, str]:
        """Dies that the device plugin gave to Pods of others."""
        if not self._options.foreign_pods:
            return {}
        by_host: dict[str, list[Object]] = {}
        for pod in await self._cluster.find("Pod"):
            by_host.setdefault((pod.get("spec") or {}).get("nodeName", ""), []).append(pod)
        return {
            die: f"Pod {pod} holds it"
            for node, host in self._carriers.items()
            if (told := self._link.nodes.values.get(node)) is not None
            for die, pod in foreign_holders(told.dies, by_host.get(host, [])).items()
        }

    async def _drain(self) -> None:
        """A NoExecute taint drains a node, and its end ends the drain."""
        open_drains = {
            m.maintenance.subject: m.maintenance
            for m in self._link.maintenances.values.values()
            if m.maintenance.state in _OPEN and m.maintenance.created_by == IDENTITY
        }
        resources = await self._served.maintenances() if open_drains else []
        of_resources = {(item.get("status") or {}).get("id") for item in resources}
        for node in self._link.nodes.values:
            host = self.host_of(node)
            record = open_drains.get(node)
            if host is not None and host.drain and record is None:
                request = scheduler_pb2.CreateMaintenanceRequest(subject=node, message=host.drain)
                request.timeout.seconds = _DRAIN_TIMEOUT_S
                await self._ask("CreateMaintenance", request)
            elif (
                record is not None
                and host is not None
                and not host.drain
                and record.id not in of_resources
                and not any(item["spec"]["subject"] == node for item in resources)
            ):
                gone = scheduler_pb2.CancelMaintenanceRequest(id=record.id)
                await self._ask("CancelMaintenance", gone)

    # --- what Kubernetes' tools see --------------------------------------------------------------

    async def _show(self) -> None:
        """The state of dies: a condition of each Kubernetes node, and a ConfigMap a supernode."""
        told = self._link.nodes.values
        for host in self._hosts.values():
            played = [n for n, carrier in self._carriers.items() if carrier == host.name]
            nodes = [told[node] for node in played if node in told]
            if not nodes:
                continue
            condition = machine_view.node_condition(nodes)
            if host.dies != condition:
                stamped = machine_view.stamped(condition, host.dies)
                await self._cluster.patch_node_condition(host.name, stamped)
                # What the API server tells of it now is no news.
                self._all_hosts[host.name] = replace(host, dies=condition)
        for supernode, data in machine_view.die_maps(told.values()).items():
            name = f"{self._site.release}-dies-{supernode}"
            old = await self._map(name)
            changed: dict[str, str | None] = {k: v for k, v in data.items() if old.get(k) != v}
            changed |= {key: None for key in old if key not in data}
            if changed:
                await self._write_map(name, changed)
