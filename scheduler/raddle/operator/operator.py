"""One term of the operator: who is told what, and what is looked after because of it.

Watches of the API server and of the scheduler only mark what may have changed. What is done about
it is in `jobs`, `machine` and `machine_resources`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raddle.operator.cluster import Cluster
from raddle.operator.jobs import Jobs
from raddle.operator.machine import Machine, MachineOptions
from raddle.operator.machine_resources import MachineResources
from raddle.operator.names import ASCEND_ANNOTATION, GROUP, KINDS, VERSION
from raddle.operator.pods import Site
from raddle.operator.scheduler_link import SchedulerLink
from raddle.operator.served import Served
from raddle.operator.watching import EVERYWHERE, Mark, News, Watch, follow
from raddle.operator.work import Counts, Item, Work
from raddle.telemetry.tls import TlsFiles

_JOB = "job"
_INCIDENT = "incident"
_MACHINE = "machine"
_SUPERNODE = "supernode"
_MAINTENANCE = "maintenance"
_GIVEN = "given supernode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the settings say, checked."""

    site: Site
    namespaces: tuple[str, ...]
    ranks_in_pods: bool
    machine: MachineOptions
    kubeconfig: str
    tls: TlsFiles | None
    #: SuperNodes that are served, with their Maintenances; empty: all.
    supernodes: frozenset[str]
    #: A SuperNode resource to apply when a term begins, as the release describes its machine.
    supernode: Mapping[str, Any] | None


class Operator:
    """Runs term after term."""

    def __init__(self, cluster: Cluster, options: Options) -> None:
        self._cluster = cluster
        self._options = options
        self.counts = Counts()

    async def run(self) -> None:
        """One term, until cancelled."""
        link = SchedulerLink(self._options.site.schedulers, self._options.tls)
        term = _Term(self._cluster, link, self._options, self.counts)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(link.run())
                group.create_task(term.work.run())
                kubeconfig, served = self._options.kubeconfig, self._options.namespaces
                group.create_task(follow(_watches(term), served, kubeconfig))
                if self._options.machine.foreign_pods:
                    foreign = follow(_foreign_watches(term), (EVERYWHERE,), kubeconfig)
                    group.create_task(foreign)
        finally:
            await link.close()


class _Term:
    """The parts of one term, and what marks what."""

    def __init__(
        self, cluster: Cluster, link: SchedulerLink, options: Options, counts: Counts
    ) -> None:
        self._link = link
        self._cluster = cluster
        self._given = options.supernode
        self.served = Served(cluster, options.supernodes)
        self.machine = Machine(cluster, link, self.served, options.site, options.machine)
        self._jobs = Jobs(
            cluster, link, self.machine, options.site, ranks_in_pods=options.ranks_in_pods
        )
        self._resources = MachineResources(
            cluster, link, self.served, lambda: self.machine.named_twice
        )
        self.work = Work(self._do, counts)
        #: InferenceJobs and SuperNodes that the API server told of.
        self._known: set[Item] = set()
        #: Job uid -> (namespace, name), for what speaks of uids.
        self._names: dict[str, tuple[str, str]] = {}
        self._maintenances: set[str] = set()
        link.jobs.listeners.append(self._job_told)
        link.incidents.listeners.append(self._incident_told)
        link.nodes.listeners.append(self._node_told)
        link.maintenances.listeners.append(lambda _: self._maintenance_told())
        # What needs whole pictures was put off, and an empty one names nothing.
        link.nodes.when_whole.append(lambda: self._node_told(""))
        link.maintenances.when_whole.append(self._maintenance_told)
        self.mark_machine()
        if self._given is not None:
            self.work.mark(_GIVEN, "", str(self._given["metadata"]["name"]))

    async def _do(self, item: Item) -> bool:
        if item.kind == _JOB:
            exists = await self._jobs.bring(item.namespace, item.name)
        elif item.kind == _INCIDENT:
            await self._jobs.announce(item.namespace, item.name)
            exists = False
        elif item.kind == _SUPERNODE:
            exists = await self._resources.bring_supernode(item.name)
        elif item.kind == _MAINTENANCE:
            exists = await self._resources.bring_maintenance(item.name)
        elif item.kind == _GIVEN:
            assert self._given is not None, "only a given supernode is marked so"
            exists = bool(await self._cluster.apply(dict(self._given)))
        else:
            await self._bring_machine()
            exists = True
        if not exists:
            self._known.discard(item)
        return exists

    async def _bring_machine(self) -> None:
        machine = self.machine
        carriers, holders, named_twice = machine.carriers, machine.holders, machine.named_twice
        try:
            await machine.bring()
        finally:
            # What is new is told though the rest failed: at the next attempt it is not new.
            if (machine.carriers, machine.holders) != (carriers, holders):
                self._mark_all(_JOB)
            if machine.named_twice != named_twice:
                self._mark_all(_SUPERNODE)

    # --- told by the API server ------------------------------------------------------------------

    def told(self, kind: str, namespace: str, name: str) -> None:
        """A resource of ours was made, changed or deleted."""
        self._known.add(Item(kind, namespace, name))
        self.work.mark(kind, namespace, name)

    def pod_told(self, namespace: str, job: str, body: Mapping[str, Any]) -> None:
        """A Pod of a job was made, changed or deleted."""
        self._jobs.pod_told(dict(body))
        self.told(_JOB, namespace, job)

    def mark_machine(self) -> None:
        self.work.mark(_MACHINE, "", "")

    # --- told by the scheduler -------------------------------------------------------------------

    def _job_told(self, job_uid: str) -> None:
        told = self._link.jobs.values.get(job_uid)
        if told is not None:
            self._names[job_uid] = (told.job.spec.namespace, told.job.spec.name)
        self._mark_named(_JOB, job_uid)
        if told is None:
            self._names.pop(job_uid, None)

    def _incident_told(self, incident_id: str) -> None:
        told = self._link.incidents.values.get(incident_id)
        for plan in told.incident.plans if told is not None else ():
            # Work of its own: people see an incident though its job is being looked after.
            self._mark_named(_INCIDENT, plan.job_uid)
            self._job_told(plan.job_uid)

    def _mark_named(self, kind: str, job_uid: str) -> None:
        found = self._names.get(job_uid)
        if found is not None and Item(_JOB, *found) in self._known:
            self.work.mark(kind, *found)

    def _node_told(self, _node: str) -> None:
        self.mark_machine()
        self._mark_all(_SUPERNODE)

    def _maintenance_told(self) -> None:
        self.mark_machine()
        self._mark_all(_MAINTENANCE)

    def _mark_all(self, kind: str) -> None:
        for item in sorted(self._known):
            if item.kind == kind:
                self.work.mark(item.kind, item.namespace, item.name)


def _watches(term: _Term) -> list[Watch]:
    """What is watched in the served namespaces, and whom it tells."""

    def ours(kind: str, mark: Mark) -> Watch:
        news = News()

        def mark_news(body: Mapping[str, Any], what: str) -> None:
            if news.is_one(body, what):
                mark(body, what)

        return Watch(GROUP, VERSION, KINDS[kind].plural, mark_news)

    def of_kind(kind: str, is_served: Callable[[Mapping[str, Any]], bool] = lambda _: True) -> Mark:
        def mark(body: Mapping[str, Any], _: str) -> None:
            metadata = body["metadata"]
            if is_served(body):
                term.told(kind, metadata.get("namespace", ""), metadata["name"])

        return mark

    return [
        ours("InferenceJob", of_kind(_JOB)),
        ours("InferenceRole", lambda body, _: _role_told(term, body)),
        ours("SuperNode", of_kind(_SUPERNODE, term.served.has_supernode)),
        ours("Maintenance", of_kind(_MAINTENANCE, term.served.has_maintenance)),
        Watch("", "v1", "nodes", lambda body, what: _host_told(term, body, what)),
        Watch("", "v1", "pods", lambda body, _: _pod_told(term, body)),
    ]


def _foreign_watches(term: _Term) -> list[Watch]:
    """Pods of all namespaces, for the dies that they hold."""

    def mark(body: Mapping[str, Any], _: str) -> None:
        if ASCEND_ANNOTATION in (body["metadata"].get("annotations") or {}):
            term.mark_machine()

    return [Watch("", "v1", "pods", mark)]


def _role_told(term: _Term, body: Mapping[str, Any]) -> None:
    """A role is looked after with its job."""
    term.told(_JOB, body["metadata"]["namespace"], body["spec"]["job"])


def _host_told(term: _Term, body: Mapping[str, Any], what: str) -> None:
    """Nodes report often, and mostly nothing that matters here."""
    if what == "DELETED" or term.machine.is_changed(body):
        term.mark_machine()


def _pod_told(term: _Term, body: Mapping[str, Any]) -> None:
    metadata = body["metadata"]
    job = (metadata.get("labels") or {}).get(f"{GROUP}/job")
    if job:
        term.pod_told(metadata["namespace"], job, body)
