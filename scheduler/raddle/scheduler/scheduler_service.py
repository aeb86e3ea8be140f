"""The `Scheduler` service: requests to the core, reads from the mirror.

In go messages, out come messages; what is decided is decided in the core. Errors are raised as
`RaddleError` and become gRPC statuses in the interceptor.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, TypeVar

import grpc

from raddle.core import requests
from raddle.core.context import PodWord
from raddle.core.events import AgentStreamBroken, AgentStreamOpened, StatsReported
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import AgentAcks, FaultLevel
from raddle.model.incident import Incident
from raddle.model.job import Job, Placement
from raddle.model.stats import RankStats
from raddle.model.types import RankKey, Why
from raddle.scheduler import explain, inventory, kv_service
from raddle.scheduler.interceptor import caller_of, refuse_foreign_node, time_left
from raddle.scheduler.node_watch import NodeWatch
from raddle.scheduler.record_watch import RecordWatch
from raddle.scheduler.replica import Replica
from raddle.scheduler.view import View
from raddle.scheduler.watches import Watches
from raddle.v1 import (
    health_pb2,
    incident_pb2,
    job_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
    topology_pb2,
    types_pb2,
)
from raddle.wire import parse
from raddle.wire.codec import from_message, to_message

PAGE_DEFAULT = 100
PAGE_MAX = 1_000
PODS_MAX = 10_000
DRAIN_TIMEOUT_S = 3600.0
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


def new_job_uid() -> str:
    """Made by the server, never used again."""
    return f"j-{secrets.token_hex(6)}"


class SchedulerService(scheduler_pb2_grpc.SchedulerServicer):
    """See scheduler.proto for what each call promises."""

    def __init__(self, replica: Replica, watches: Watches) -> None:
        self._replica = replica
        self._mirror = replica.mirror
        self._watches = watches
        self._record_watch = RecordWatch(replica.mirror, watches)

    async def _ask(self, request: requests.Request, context: Context) -> Any:
        return await self._replica.ask(request, caller_of(context), time_left(context))

    def _view(self, context: Context) -> View:
        """The records as the caller may see them."""
        return View(self._mirror, self._replica.policy, caller_of(context))

    def _job_message(self, job: Job, revision: int = 0) -> job_pb2.Job:
        """The job at a revision; 0: as it is now."""
        revision = revision or self._mirror.mod_revision(keys.job(job.uid))
        message: job_pb2.Job = to_message(replace(job, revision=revision), job_pb2.Job)
        return message

    # --- jobs ----------------------------------------------------------------------------------

    async def SubmitJob(self, request: Any, context: Context) -> scheduler_pb2.SubmitJobResponse:
        value = await self._ask(
            requests.SubmitJob(
                spec=parse.job_spec(request.spec),
                job_uid=new_job_uid(),
                spec_digest=parse.spec_digest(request.spec),
                idempotency_key=request.idempotency_key,
                dry_run=request.dry_run,
                managed_by=request.managed_by,
            ),
            context,
        )
        job, placement = value
        answer = scheduler_pb2.SubmitJobResponse(job=self._job_message(job))
        if placement is not None:
            answer.placement.CopyFrom(to_message(placement, job_pb2.Placement))
        return answer

    async def UpdateJob(self, request: Any, context: Context) -> scheduler_pb2.UpdateJobResponse:
        # Only what the mask names is read, so the rest may be missing.
        job = await self._ask(
            requests.UpdateJob(
                job_uid=request.job_uid,
                spec=parse.job_change(request.spec),
                update_mask=tuple(request.update_mask.paths),
                expected_generation=request.expected_generation,
                managed_by=request.managed_by,
            ),
            context,
        )
        return scheduler_pb2.UpdateJobResponse(job=self._job_message(job))

    async def GetJob(self, request: Any, _context: Context) -> scheduler_pb2.GetJobResponse:
        job = self._find_job(request.job_uid, request.namespace, request.name)
        answer = scheduler_pb2.GetJobResponse(job=self._job_message(job))
        placement: Placement | None = self._mirror.get(keys.placement(job.uid))
        if placement is not None:
            answer.placement.CopyFrom(to_message(placement, job_pb2.Placement))
            nodes = {rank.node for part in placement.instances for rank in part.ranks}
            for node in sorted(nodes):
                acks: AgentAcks | None = self._mirror.get(keys.acks(node, job.uid))
                for status in acks.ranks if acks else ():
                    answer.ranks.append(to_message(status, health_pb2.RankStatus))
        return answer

    def _find_job(self, job_uid: str, namespace: str, name: str) -> Job:
        if not job_uid:
            owner = self._mirror.get(keys.name(namespace or "default", name))
            job_uid = owner.job_uid if owner is not None else ""
        job: Job | None = self._mirror.get(keys.job(job_uid)) if job_uid else None
        if job is None:
            asked = job_uid or f"{namespace or 'default'}/{name}"
            raise PermanentError(
                Reason.NOT_FOUND, f"There is no job {asked}; `raddle status` lists jobs."
            )
        return job

    async def ListJobs(self, request: Any, context: Context) -> scheduler_pb2.ListJobsResponse:
        size = page_size(request.page_size)
        after = _decode_token(request.page_token)
        found = sorted(
            ((job.spec.namespace, job.spec.name, job.uid), job)
            for _, job in self._view(context).under(keys.JOBS)
            if not request.namespace or job.spec.namespace == request.namespace
        )
        rest = [(key, job) for key, job in found if key > after]
        answer = scheduler_pb2.ListJobsResponse(revision=self._mirror.revision)
        answer.jobs.extend(self._job_message(job) for _, job in rest[:size])
        if len(rest) > size:
            answer.next_page_token = _encode_token(rest[size - 1][0])
        return answer

    async def WatchJobs(
        self, request: Any, context: Context
    ) -> AsyncIterator[scheduler_pb2.WatchJobsResponse]:
        view = self._view(context)

        def shown(key: str, job: Job) -> Job | None:
            is_wanted = request.namespace in ("", job.spec.namespace)
            return view.shown(key, job) if is_wanted else None

        told = self._record_watch.follow(keys.JOBS, request.after_revision, shown)
        async for told_one in told:
            message = scheduler_pb2.WatchJobsResponse(
                kind=told_one.kind, revision=told_one.revision
            )
            if told_one.value is not None:
                message.job.CopyFrom(self._job_message(told_one.value, told_one.record_revision))
            yield message

    async def ScaleJob(self, request: Any, context: Context) -> scheduler_pb2.ScaleJobResponse:
        job = await self._ask(
            requests.ScaleJob(
                job_uid=request.job_uid,
                role=request.role,
                instances=request.instances,
                ranks=request.ranks,
                expected_generation=request.expected_generation,
                managed_by=request.managed_by,
            ),
            context,
        )
        return scheduler_pb2.ScaleJobResponse(job=self._job_message(job))

    async def CancelJob(self, request: Any, context: Context) -> scheduler_pb2.CancelJobResponse:
        job = await self._ask(
            requests.CancelJob(job_uid=request.job_uid, managed_by=request.managed_by), context
        )
        return scheduler_pb2.CancelJobResponse(job=self._job_message(job))

    async def DeleteJob(self, request: Any, context: Context) -> scheduler_pb2.DeleteJobResponse:
        await self._ask(
            requests.DeleteJob(job_uid=request.job_uid, managed_by=request.managed_by), context
        )
        return scheduler_pb2.DeleteJobResponse()

    async def Explain(self, request: Any, context: Context) -> scheduler_pb2.ExplainResponse:
        why, story = explain.explain(self._view(context), request.subject, self._waits_for)
        return scheduler_pb2.ExplainResponse(why=explain.why_message(why), story=story)

    def _waits_for(self, job_uid: str) -> Why | None:
        leader = self._replica.leader
        return leader.waits_for(job_uid) if leader is not None else None

    # --- the machine ---------------------------------------------------------------------------

    async def ApplySuperNode(
        self, request: Any, context: Context
    ) -> scheduler_pb2.ApplySuperNodeResponse:
        value = await self._ask(
            requests.ApplySuperNode(supernode=parse.supernode(request.supernode)), context
        )
        supernode, changed = value
        return scheduler_pb2.ApplySuperNodeResponse(
            supernode=to_message(supernode, topology_pb2.SuperNode), changed=changed
        )

    async def ListNodes(self, _request: Any, _context: Context) -> scheduler_pb2.ListNodesResponse:
        return scheduler_pb2.ListNodesResponse(nodes=inventory.nodes(self._mirror, self._replica))

    async def WatchNodes(
        self, request: Any, _context: Context
    ) -> AsyncIterator[scheduler_pb2.WatchNodesResponse]:
        watch = NodeWatch(self._replica, with_dies=request.dies)
        async for message in watch.follow(self._watches):
            yield message

    async def ListDies(self, request: Any, _context: Context) -> scheduler_pb2.ListDiesResponse:
        dies = inventory.dies(self._mirror, request.node)
        if request.node and not dies:
            raise PermanentError(
                Reason.NOT_FOUND, f"There is no node {request.node!r}; `raddle nodes` lists them."
            )
        return scheduler_pb2.ListDiesResponse(dies=dies)

    async def Cordon(self, request: Any, context: Context) -> scheduler_pb2.CordonResponse:
        hold = await self._ask(
            requests.Cordon(
                subject=request.subject, message=request.message, reason=request.reason
            ),
            context,
        )
        return scheduler_pb2.CordonResponse(hold=to_message(hold, health_pb2.Hold))

    async def Uncordon(self, request: Any, context: Context) -> scheduler_pb2.UncordonResponse:
        left = await self._ask(
            requests.Uncordon(subject=request.subject, reason=request.reason), context
        )
        return scheduler_pb2.UncordonResponse(
            holds=[to_message(hold, health_pb2.Hold) for hold in left]
        )

    async def DeclareNodeLost(
        self, request: Any, context: Context
    ) -> scheduler_pb2.DeclareNodeLostResponse:
        why = await self._ask(
            requests.DeclareNodeLost(node=request.node, message=request.message), context
        )
        return scheduler_pb2.DeclareNodeLostResponse(why=to_message(why, types_pb2.Why))

    async def ReportPods(self, request: Any, context: Context) -> scheduler_pb2.ReportPodsResponse:
        if len(request.pods) > PODS_MAX:
            raise PermanentError(
                Reason.LIMIT_EXCEEDED, f"{len(request.pods)} pods: tell at most {PODS_MAX} at once."
            )
        words = tuple(
            PodWord(
                rank=from_message(pod.rank, RankKey),
                start_count=pod.start_count,
                has_ended=pod.has_ended,
                reason=pod.reason,
                message=pod.message,
            )
            for pod in request.pods
        )
        await self._ask(requests.ReportPods(job_uid=request.job_uid, words=words), context)
        return scheduler_pb2.ReportPodsResponse()

    async def CreateMaintenance(
        self, request: Any, context: Context
    ) -> scheduler_pb2.CreateMaintenanceResponse:
        timeout_s = parse.duration_s("timeout", request.timeout)
        record = await self._ask(
            requests.CreateMaintenance(
                maintenance_id=f"m-{secrets.token_hex(4)}",
                subject=request.subject,
                timeout_s=timeout_s or DRAIN_TIMEOUT_S,
                message=request.message,
                dry_run=request.dry_run,
            ),
            context,
        )
        return scheduler_pb2.CreateMaintenanceResponse(maintenance=_maintenance(record))

    async def GetMaintenance(
        self, request: Any, _context: Context
    ) -> scheduler_pb2.GetMaintenanceResponse:
        record = self._require(keys.maintenance(request.id), f"maintenance {request.id}")
        return scheduler_pb2.GetMaintenanceResponse(maintenance=_maintenance(record))

    async def ListMaintenances(
        self, _request: Any, _context: Context
    ) -> scheduler_pb2.ListMaintenancesResponse:
        found = [record for _, record in self._mirror.under(keys.MAINTENANCE)]
        found.sort(key=lambda record: -record.create_time)
        return scheduler_pb2.ListMaintenancesResponse(
            maintenances=[_maintenance(record) for record in found]
        )

    async def WatchMaintenances(
        self, request: Any, context: Context
    ) -> AsyncIterator[scheduler_pb2.WatchMaintenancesResponse]:
        shown = self._view(context).shown
        told = self._record_watch.follow(keys.MAINTENANCE, request.after_revision, shown)
        async for told_one in told:
            message = scheduler_pb2.WatchMaintenancesResponse(
                kind=told_one.kind, revision=told_one.revision
            )
            if told_one.value is not None:
                message.maintenance.CopyFrom(_maintenance(told_one.value))
            yield message

    async def CancelMaintenance(
        self, request: Any, context: Context
    ) -> scheduler_pb2.CancelMaintenanceResponse:
        record = await self._ask(requests.CancelMaintenance(maintenance_id=request.id), context)
        return scheduler_pb2.CancelMaintenanceResponse(maintenance=_maintenance(record))

    def _require(self, key: str, what: str) -> Any:
        value = self._mirror.get(key)
        if value is None:
            raise PermanentError(Reason.NOT_FOUND, f"There is no {what}.")
        return value

    # --- history -------------------------------------------------------------------------------

    async def GetIncident(
        self, request: Any, context: Context
    ) -> scheduler_pb2.GetIncidentResponse:
        record = self._view(context).get(keys.incident(request.id))
        if record is None:
            raise PermanentError(Reason.NOT_FOUND, f"There is no incident {request.id}.")
        return scheduler_pb2.GetIncidentResponse(incident=to_message(record, incident_pb2.Incident))

    async def ListIncidents(
        self, request: Any, context: Context
    ) -> scheduler_pb2.ListIncidentsResponse:
        view = self._view(context)
        found: list[Incident] = [
            record for _, record in view.under(keys.INCIDENTS) if _is_about(record, request.job_uid)
        ]
        newest = sorted(found, key=lambda i: i.id, reverse=True)[: page_size(request.page_size)]
        return scheduler_pb2.ListIncidentsResponse(
            incidents=[to_message(record, incident_pb2.Incident) for record in newest]
        )

    async def WatchIncidents(
        self, request: Any, context: Context
    ) -> AsyncIterator[scheduler_pb2.WatchIncidentsResponse]:
        view = self._view(context)

        def shown(key: str, incident: Incident) -> Incident | None:
            return view.shown(key, incident) if _is_about(incident, request.job_uid) else None

        told = self._record_watch.follow(keys.INCIDENTS, request.after_revision, shown)
        async for told_one in told:
            message = scheduler_pb2.WatchIncidentsResponse(
                kind=told_one.kind, revision=told_one.revision
            )
            if told_one.value is not None:
                message.incident.CopyFrom(to_message(told_one.value, incident_pb2.Incident))
            yield message

    async def ListEvents(self, request: Any, context: Context) -> scheduler_pb2.ListEventsResponse:
        found = [
            record
            for _, record in self._view(context).under(keys.AUDIT)
            if not request.subject or record.subject == request.subject
        ]
        newest = found[-page_size(request.page_size) :]
        return scheduler_pb2.ListEventsResponse(
            events=[to_message(record, incident_pb2.Event) for record in newest]
        )

    async def InjectFault(
        self, request: Any, context: Context
    ) -> scheduler_pb2.InjectFaultResponse:
        if not self._replica.fault_injection:
            raise PermanentError(
                Reason.FAULT_INJECTION_DISABLED,
                "this scheduler was not started with --allow-fault-injection.",
            )
        levels = list(FaultLevel)
        level = levels[request.level] if 0 < request.level < len(levels) else None
        if not request.clear and (level is None or not request.code):
            raise PermanentError(Reason.INVALID_ARGUMENT, "give a fault code and a level.")
        why = await self._ask(
            requests.InjectFault(
                subject=request.subject,
                code=request.code,
                level=level or FaultLevel.UNSPECIFIED,
                clear=request.clear,
            ),
            context,
        )
        return scheduler_pb2.InjectFaultResponse(why=explain.why_message(why))

    # --- KV caches ------------------------------------------------------------------------------

    async def GetKvStatus(
        self, request: Any, _context: Context
    ) -> scheduler_pb2.GetKvStatusResponse:
        job = self._find_job(request.job_uid, request.namespace, request.name)
        return kv_service.status(self._replica, job.uid)

    async def LocateKvBlocks(
        self, request: Any, _context: Context
    ) -> scheduler_pb2.LocateKvBlocksResponse:
        job = self._find_job(request.job_uid, request.namespace, request.name)
        return kv_service.locate(self._replica, job.uid, request)

    # --- agents --------------------------------------------------------------------------------

    async def ReportStats(
        self, request_iterator: Any, context: Context
    ) -> scheduler_pb2.ReportStatsResponse:
        leader = self._replica.require_leader()
        node = ""
        try:
            async for request in request_iterator:
                if not node:
                    refuse_foreign_node(context, request.node)
                    node = request.node
                    leader.tell(AgentStreamOpened(node))
                if request.reports:
                    reports = tuple(from_message(r, RankStats) for r in request.reports)
                    leader.take_report(StatsReported(node, request.job_uid, reports))
        finally:
            if node:
                leader.tell(AgentStreamBroken(node))
        return scheduler_pb2.ReportStatsResponse()

    async def GetStatus(self, _request: Any, _context: Context) -> scheduler_pb2.GetStatusResponse:
        return inventory.status(self._mirror, self._replica)


def _maintenance(record: Any) -> incident_pb2.Maintenance:
    message: incident_pb2.Maintenance = to_message(record, incident_pb2.Maintenance)
    return message


def _is_about(incident: Incident, job_uid: str) -> bool:
    """Is a plan of the incident for this job? The empty uid stands for all."""
    return not job_uid or any(plan.job_uid == job_uid for plan in incident.plans)


def page_size(asked: int) -> int:
    """A page's size: 100 unless asked, 1,000 at most.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    if not 0 <= asked <= PAGE_MAX:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"page_size is {asked}; it must be between 1 and {PAGE_MAX}."
        )
    return asked or PAGE_DEFAULT


def _encode_token(key: tuple[str, str, str]) -> str:
    return base64.urlsafe_b64encode("\n".join(key).encode()).decode()


def _decode_token(token: str) -> tuple[str, str, str]:
    if not token:
        return ("", "", "")
    try:
        namespace, name, uid = base64.urlsafe_b64decode(token).decode().split("\n")
    except (ValueError, UnicodeDecodeError) as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, "page_token is not one that this service gave."
        ) from error
    return namespace, name, uid
