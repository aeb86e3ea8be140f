"""What runs of a job: Pods of ranks, rank tables, front door and Service."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raddle.model.errors import ConflictError, PermanentError, RaddleError, Reason, TemporaryError
from raddle.operator import job_status, pods
from raddle.operator.cluster import Cluster
from raddle.operator.machine import Machine
from raddle.operator.names import GROUP
from raddle.operator.pod_problems import Problem, pod_problem, pod_report
from raddle.operator.reasons import OperatorReason
from raddle.v1 import scheduler_pb2
from raddle.wire.rank_tables import TableRank

_RELEASE_NAMESPACE = f"{GROUP}/release-namespace"
_OURS = ("app.kubernetes.io/managed-by", "app.kubernetes.io/instance", _RELEASE_NAMESPACE)
_HASH = f"{GROUP}/hash"
#: Temporary for as long as something else is missing or in the way, which people have to know.
_LASTING = (Reason.NOT_FOUND, Reason.ALREADY_EXISTS)
Object = dict[str, Any]
Answer = scheduler_pb2.GetJobResponse


@dataclass(slots=True)
class Outcome:
    """What of a job's objects does not come up; a failure is to be raised once that is told."""

    problems: list[Problem] = field(default_factory=list)
    #: Why clients cannot reach the job, if it has a front door of ours.
    front_door: Problem | None = None
    #: Ranks' Pods that were given other devices than they are meant to use.
    devices: list[Problem] = field(default_factory=list)
    #: Ranks' Pods that ended or do not come up, as the scheduler is told.
    reports: list[scheduler_pb2.PodReport] = field(default_factory=list)
    failure: RaddleError | None = None

    def failed(self, error: RaddleError) -> Problem:
        """Note that a part cannot be made.

        Raises:
            RaddleError: the error itself, where a neighbour's hiccup is all that it tells.
        """
        is_lasting = isinstance(error, PermanentError) or error.reason in _LASTING
        if isinstance(error, ConflictError) or not is_lasting:
            raise error
        problem = Problem("not done", error.reason, error.message)
        self.problems.insert(0, problem)
        self.failure = error
        return problem


class JobPods:
    """Makes and removes what a placement asks for."""

    def __init__(
        self, cluster: Cluster, machine: Machine, site: pods.Site, *, ranks_in_pods: bool
    ) -> None:
        self._cluster = cluster
        self._machine = machine
        self._site = site
        self._ranks_in_pods = ranks_in_pods

    async def run(
        self,
        resource: Object,
        roles: Mapping[str, Object],
        answer: Answer,
        present: list[Object],
    ) -> Outcome:
        """Pods, rank tables, front door and Service of a job; gives what does not come up."""
        if not self._ranks_in_pods or job_status.is_over(answer.job):
            await self.withdraw(resource, present)
            return Outcome()
        self._machine.require_known()
        outcome = Outcome()
        # Somebody may have deleted the InferenceRole of a role that the resource names no more.
        seats = [seat for seat in pods.seats(answer) if seat.role in roles]
        # An older job's starts were counted from one as well: its Pods may have names of ours.
        former = [pod for pod in present if _is_rank(pod) and not _is_of(pod, answer.job.uid)]
        present = [pod for pod in present if pod not in former]
        ranks = [pod for pod in present if _is_rank(pod)]
        wanted = {pods.pod_name(answer.job.spec.name, seat) for seat in seats}
        # What goes does not wait for what cannot be made.
        await self._delete_unasked(former, ranks, seats, wanted)
        try:
            await self._secrets(resource["metadata"]["namespace"])
            await self._rank_tables(roles, answer, ranks, seats)
            outcome.problems += await self._make_ranks(
                resource, roles, answer, [*former, *ranks], seats
            )
        except RaddleError as error:
            outcome.failed(error)
        if pods.is_served(answer.job):
            outcome.front_door = _front_door_problem(present)
            try:
                for item in pods.front_door(self._site, answer.job, resource):
                    await self._ensure(item, resource)
            except RaddleError as error:
                outcome.front_door = outcome.failed(error)
        outcome.devices = job_status.device_problems(self._machine.wrong_devices(ranks))
        reports = (pod_report(pod, answer.job.uid) for pod in ranks)
        outcome.reports = [report for report in reports if report is not None]
        for pod in present:
            is_wanted = pod["metadata"]["name"] in wanted or not _is_rank(pod)
            problem = pod_problem(pod) if is_wanted else None
            if problem is not None:
                outcome.problems.append(problem)
        return outcome

    async def _delete_unasked(
        self,
        former: list[Object],
        ranks: list[Object],
        seats: list[pods.Seat],
        wanted: set[str],
    ) -> None:
        """Pods that no seat asks for; rank tables of instances that went go with them."""
        instances = {(seat.role, str(seat.instance)) for seat in seats}
        await self._delete_tables(
            pod for pod in [*former, *ranks] if _instance(pod) not in instances
        )
        await asyncio.gather(
            *(
                self._cluster.delete(pod)
                for pod in [*former, *pods.to_delete(ranks, wanted)]
                if not pod["metadata"].get("deletionTimestamp")
            )
        )

    async def _make_ranks(
        self,
        resource: Object,
        roles: Mapping[str, Object],
        answer: Answer,
        present: list[Object],
        seats: list[pods.Seat],
    ) -> list[Problem]:
        """Pods of seats that have none yet; gives what does not come up."""
        name = answer.job.spec.name
        there = {pod["metadata"]["name"]: pod for pod in present}
        was_up = pods.started(answer)
        templates = {role["name"]: role.get("template") or {} for role in resource["spec"]["roles"]}
        problems: list[Problem] = []
        making = []
        for seat in seats:
            pod = pods.pod_name(name, seat)
            if pods.seat_key(seat) in was_up:
                # Once started never started again: the scheduler gives another start instead.
                continue
            if pod in there:
                if not _is_of(there[pod], answer.job.uid):
                    message = f"the Pod of an older job {name} is not gone yet"
                    problems.append(Problem(f"Pod {pod}", Reason.ALREADY_EXISTS, message))
                continue
            host = self._machine.host_of(seat.rank.node)
            if host is None:
                message = f"no Kubernetes node plays {seat.rank.node}"
                problems.append(Problem(f"Pod {pod}", OperatorReason.NO_KUBERNETES_NODE, message))
                continue
            item = pods.rank_pod(
                self._site,
                answer,
                seat,
                host=host.name,
                role_resource=roles[seat.role],
                # A role that the resource names no more has lost its template with its name.
                template=templates.get(seat.role, {}),
                device=self._machine.device_of(seat.rank.die),
            )
            making.append(self._make(item, problems))
        await asyncio.gather(*making)
        return problems

    async def _make(self, item: Object, problems: list[Problem]) -> None:
        """Create a Pod; what the API server refuses is told in the job's status."""
        try:
            await self._cluster.create(item)
        except PermanentError as error:
            name = f"Pod {item['metadata']['name']}"
            problems.append(Problem(name, error.reason, error.message))

    async def _rank_tables(
        self,
        roles: Mapping[str, Object],
        answer: Answer,
        present: list[Object],
        seats: list[pods.Seat],
    ) -> None:
        addresses = {
            pod["metadata"]["name"]: (pod.get("status") or {}).get("podIP", "") for pod in present
        }
        groups: dict[tuple[str, int], list[TableRank]] = {}
        for seat in seats:
            name = pods.pod_name(answer.job.spec.name, seat)
            rank = self._machine.table_rank(seat.rank, addresses.get(name, ""))
            if rank is not None:
                groups.setdefault((seat.role, seat.instance), []).append(rank)
        for (role, instance), ranks in groups.items():
            item = pods.rank_table(self._site, answer.job, roles[role], role, instance, ranks)
            await self._ensure(item, roles[role])

    async def _delete_tables(self, ranks: Iterable[Object]) -> None:
        """Of the instances of these Pods, which go after them: by them they are known."""
        for namespace, name in sorted({_table(pod) for pod in ranks}):
            known = await self._cluster.get("ConfigMap", namespace, name)
            if known is not None and _carries(known, pods.labels(self._site, "rank")):
                await self._cluster.delete(known)

    async def _ensure(self, item: Object, owner: Object) -> None:
        """Apply an object, if it is not that already and nobody else's.

        Raises:
            PermanentError: ALREADY_EXISTS when it is somebody else's.
        """
        text = json.dumps(item, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        metadata = item["metadata"]
        known = await self._cluster.get(item["kind"], metadata["namespace"], metadata["name"])
        if known is not None and not is_owned(known, owner):
            refuse_foreign(known, owner)
        if known is None or (known["metadata"].get("annotations") or {}).get(_HASH) != digest:
            annotated = {**metadata, "annotations": {_HASH: digest}}
            await self._cluster.apply({**item, "metadata": annotated})

    async def _secrets(self, namespace: str) -> None:
        """Copies of the certificates that ranks and front doors show, where they run."""
        if not self._site.tls or namespace == self._site.namespace:
            return
        marks = pods.labels(self._site, "certificates") | {_RELEASE_NAMESPACE: self._site.namespace}
        for secret in (self._site.rank_secret, self._site.front_door_secret):
            source = await self._cluster.get("Secret", self._site.namespace, secret)
            if source is None:
                raise TemporaryError(
                    Reason.NOT_FOUND, f"Secret {self._site.namespace}/{secret} is not there yet"
                )
            name = self._site.secret_in(namespace, secret)
            known = await self._cluster.get("Secret", namespace, name)
            if known is not None and not _carries(known, marks):
                raise PermanentError(
                    Reason.ALREADY_EXISTS,
                    f"Secret {namespace}/{name} is there and is not a copy of the certificate of"
                    f" {self._site.namespace}/{self._site.release}: delete it, or rename it.",
                )
            if known is None or known.get("data") != source.get("data"):
                await self._cluster.apply(
                    {
                        "apiVersion": "v1",
                        "kind": "Secret",
                        "type": source["type"],
                        "metadata": {"name": name, "namespace": namespace, "labels": marks},
                        "data": source["data"],
                    }
                )

    async def withdraw(self, resource: Object, present: list[Object]) -> None:
        """Nothing of the job runs: Pods, rank tables and front door go."""
        ranks = [pod for pod in present if _is_rank(pod)]
        await self._delete_tables(ranks)
        for pod in ranks:
            if not pod["metadata"].get("deletionTimestamp"):
                await self._cluster.delete(pod)
        metadata = resource["metadata"]
        for kind, name in pods.front_door_names(metadata["name"]):
            known = await self._cluster.get(kind, metadata["namespace"], name)
            if known is not None and is_owned(known, resource):
                await self._cluster.delete(known)


def _carries(item: Mapping[str, Any], marks: Mapping[str, str]) -> bool:
    """Does a label say that this operator made it, and for this release?"""
    said = item["metadata"].get("labels") or {}
    return all(said.get(name) == marks.get(name) for name in _OURS)


def refuse_foreign(known: Object | None, resource: Mapping[str, Any]) -> None:
    if known is None or known["metadata"].get("deletionTimestamp"):
        return
    metadata, name = known["metadata"], resource["metadata"]["name"]
    owners = metadata.get("ownerReferences") or ()
    if any(o["apiVersion"].startswith(f"{GROUP}/") and o["name"] == name for o in owners):
        raise TemporaryError(
            Reason.ALREADY_EXISTS,
            f"{known['kind']} {metadata['name']} belongs to an older resource and goes with it",
        )
    raise PermanentError(
        Reason.ALREADY_EXISTS,
        f"{known['kind']} {metadata['name']} is there and is not of InferenceJob {name}:"
        " delete it, or choose another name for the job.",
    )


def is_owned(item: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    references = item["metadata"].get("ownerReferences") or ()
    return any(reference["uid"] == owner["metadata"]["uid"] for reference in references)


def _front_door_problem(present: Iterable[Object]) -> Problem | None:
    return job_status.front_door_problem(
        pod
        for pod in present
        if _component(pod) == "frontdoor" and not pod["metadata"].get("deletionTimestamp")
    )


def _instance(pod: Mapping[str, Any]) -> tuple[str, str]:
    """(role, instance) of a rank's Pod."""
    said = pod["metadata"].get("labels") or {}
    return said.get(f"{GROUP}/role", ""), said.get(f"{GROUP}/instance", "")


def _table(pod: Mapping[str, Any]) -> tuple[str, str]:
    """(namespace, name) of the rank table of a rank's Pod."""
    metadata = pod["metadata"]
    return metadata["namespace"], pods.table_name(
        metadata["labels"][f"{GROUP}/job"], *_instance(pod)
    )


def _is_of(pod: Mapping[str, Any], job_uid: str) -> bool:
    return bool((pod["metadata"].get("labels") or {}).get(f"{GROUP}/job-uid") == job_uid)


def _is_rank(pod: Mapping[str, Any]) -> bool:
    return _component(pod) == "rank"


def _component(pod: Mapping[str, Any]) -> str:
    return str((pod["metadata"].get("labels") or {}).get("app.kubernetes.io/component", ""))
