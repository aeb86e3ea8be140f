"""InferenceJobs: each is brought to what its resource, the scheduler and the Pods say together.

One procedure for every occasion: it reads the resource, the job and the Pods anew, does what is
missing and writes what it saw. So it does not matter who told what how often, or that this process
was away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from raddle.model.errors import ConflictError, PermanentError, RaddleError, Reason, TemporaryError
from raddle.operator import job_status, pods
from raddle.operator.cluster import Cluster
from raddle.operator.conditions import Condition
from raddle.operator.finalizers import hold, is_held, let_go
from raddle.operator.job_pods import JobPods, is_owned, refuse_foreign
from raddle.operator.machine import Machine
from raddle.operator.names import GROUP, JOB_REPLICAS, MANAGER, role_name
from raddle.operator.pod_problems import pod_report
from raddle.operator.scheduler_link import SchedulerLink
from raddle.operator.spec import (
    Change,
    Replace,
    Scale,
    Update,
    changes,
    is_suspended,
    job_message,
    replicas,
)
from raddle.operator.telling import Teller
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2

#: Jobs of which Pods that ended are kept.
_ENDED_PODS_MAX = 1_000
log = structlog.get_logger()
Object = dict[str, Any]
Answer = scheduler_pb2.GetJobResponse


@dataclass(frozen=True, slots=True)
class Brought:
    """What the scheduler has of a resource: a job, or the conditions that say why none.

    `refusal` is why the job, which goes on, is not as the resource asks.
    """

    answer: Answer | None
    conditions: list[Condition]
    refusal: RaddleError | None = None


class Jobs:
    """All InferenceJobs of one operator."""

    def __init__(
        self,
        cluster: Cluster,
        link: SchedulerLink,
        machine: Machine,
        site: pods.Site,
        *,
        ranks_in_pods: bool,
    ) -> None:
        self._cluster = cluster
        self._link = link
        self._site = site
        self._pods = JobPods(cluster, machine, site, ranks_in_pods=ranks_in_pods)
        self._teller = Teller(cluster)
        #: Ranks' Pods that ended, by the namespace and the name of their job and by their own name,
        #: until the scheduler has heard of them.
        self._ended_pods: dict[tuple[str, str], dict[str, Object]] = {}

    def pod_told(self, pod: Object) -> None:
        """Keep a Pod that ended: it may be gone when its job is looked after."""
        metadata = pod["metadata"]
        labels = metadata.get("labels") or {}
        report = pod_report(pod, labels.get(f"{GROUP}/job-uid", ""))
        if report is None or not report.has_ended:
            return
        of_job = (metadata["namespace"], labels[f"{GROUP}/job"])
        self._ended_pods.setdefault(of_job, {})[metadata["name"]] = pod
        if len(self._ended_pods) > _ENDED_PODS_MAX:
            del self._ended_pods[next(iter(self._ended_pods))]

    async def announce(self, namespace: str, name: str) -> None:
        """Show the newest incident of a job at once; what there is to do about it takes longer."""
        resource = await self._cluster.get("InferenceJob", namespace, name)
        incident = self._incident(((resource or {}).get("status") or {}).get("jobUid", ""))
        if resource is not None and incident is not None:
            await self._teller.announce(resource, incident)

    async def bring(self, namespace: str, name: str) -> bool:
        """Bring one resource to where it belongs; False if there is none."""
        resource = await self._cluster.get("InferenceJob", namespace, name)
        if resource is None:
            return False
        if resource["metadata"].get("deletionTimestamp"):
            await self._let_go(resource)
            return True
        if not await hold(self._cluster, resource):
            return False
        try:
            roles = await self._roles(resource)
            sizes = {role["spec"]["role"]: role["spec"]["replicas"] for role in roles.values()}
            brought = await self._job(resource, sizes)
        except ConflictError:
            raise
        except RaddleError as error:
            if isinstance(error, PermanentError) or not _has_job(resource):
                # A job that runs goes on while the scheduler is away; what was said of it stays.
                await self._teller.say(resource, None, job_status.refused(error), None, [])
            raise
        present = await self._present(resource)
        former = await self._former_roles(resource, roles)
        if brought.refusal is None:
            for role in former.values():
                await self._cluster.delete(role)
        else:
            # The job goes on as it was, and so do Pods of roles that its resource names no more.
            roles |= former
        said_of = list(roles.values())
        if brought.answer is None:
            await self._pods.withdraw(resource, present)
            await self._teller.say(resource, None, brought.conditions, None, said_of)
            return True
        outcome = await self._pods.run(resource, roles, brought.answer, present)
        # The newest of now: another one may have been announced meanwhile.
        incident = self._incident(brought.answer.job.uid)
        conditions = job_status.conditions(
            brought.answer, incident, outcome.problems, outcome.front_door, outcome.devices
        )
        if brought.refusal is not None:
            conditions = job_status.unchanged(conditions, brought.refusal)
            await self._teller.tell_refusal(resource, brought.refusal, said_of)
        await self._teller.say(resource, brought.answer, conditions, incident, said_of)
        await self._report(brought.answer.job, outcome.reports)
        if failure := outcome.failure or brought.refusal:
            raise failure
        return True

    # --- the job in the scheduler ----------------------------------------------------------------

    async def _find(self, resource: Object) -> Answer | None:
        """The job of this resource's name, whoever made it."""
        metadata = resource["metadata"]
        request = scheduler_pb2.GetJobRequest(
            namespace=metadata["namespace"], name=metadata["name"]
        )
        try:
            found: Answer = await self._link.call("GetJob", request)
        except PermanentError as error:
            if error.reason is Reason.NOT_FOUND:
                return None
            raise
        return found

    async def _present(self, resource: Object) -> list[Object]:
        """The Pods that carry the name of this resource's job."""
        metadata = resource["metadata"]
        selector = f"{GROUP}/job={metadata['name']}"
        return await self._cluster.find("Pod", metadata["namespace"], selector)

    async def _let_go(self, resource: Object) -> None:
        """End the job and forget it, then let the resource go."""
        if not is_held(resource):
            return
        found = await self._find(resource)
        is_ours = found is not None and found.job.managed_by == MANAGER
        if found is not None and is_ours and not await self._end(found.job):
            # The watch tells when it has ended. A rank that hangs ends with its Pod alone.
            await self._pods.withdraw(resource, await self._present(resource))
            answer = await self._find(resource) or found
            conditions = job_status.conditions(answer, None, [])
            await self._teller.say(resource, answer, conditions, None, [])
            return
        await let_go(self._cluster, resource)

    async def _end(self, job: job_pb2.Job) -> bool:
        """Cancel a job of ours, or delete its record once it has ended; True when it is gone."""
        if not job_status.is_ended(job):
            if job.state == job_pb2.JOB_STATE_STOPPING:
                return False
            request = scheduler_pb2.CancelJobRequest(job_uid=job.uid, managed_by=MANAGER)
            job = (await self._link.call("CancelJob", request)).job
            if not job_status.is_ended(job):
                return False
        gone = scheduler_pb2.DeleteJobRequest(job_uid=job.uid, managed_by=MANAGER)
        try:
            await self._link.call("DeleteJob", gone)
        except PermanentError as error:
            if error.reason is not Reason.NOT_FOUND:
                raise
        return True

    async def _job(self, resource: Object, sizes: Mapping[str, int]) -> Brought:
        """Make the scheduler's job what the resource wants."""
        found = await self._find(resource)
        if found is not None and found.job.managed_by != MANAGER:
            job = found.job
            raise PermanentError(
                Reason.ALREADY_EXISTS,
                f"job {job.spec.namespace}/{job.spec.name} ({job.uid}) was made by"
                f" {job.created_by}, not from a resource: delete it, or choose another name.",
            )
        if is_suspended(resource):
            if found is not None and not await self._end(found.job):
                return Brought(None, job_status.ending("the job ends, as spec.suspend asks"))
            return Brought(None, job_status.suspended())
        if found is not None and self._is_past(resource, found.job):
            if not await self._end(found.job):
                message = f"job {found.job.uid} of before has to end first"
                return Brought(None, job_status.ending(message))
            found = None
        refusal: RaddleError | None = None
        if found is None:
            await self._submit(resource, job_message(resource, sizes))
        else:
            refusal = await self._change(found.job, resource, sizes)
        answer = await self._find(resource)
        if answer is None:
            gone = TemporaryError(Reason.NOT_FOUND, "the job went while it was looked at")
            raise refusal or gone
        return Brought(answer, [], refusal)

    @staticmethod
    def _is_past(resource: Object, job: job_pb2.Job) -> bool:
        """Is it a job that this resource, as it is now, does not stand for?

        Another resource's of the same name, one that is being ended, or one that was cancelled. One
        that failed stays: suspend the resource and resume it for another try.
        """
        ends = (job_pb2.JOB_STATE_STOPPING, job_pb2.JOB_STATE_CANCELLED)
        return job.idempotency_key != resource["metadata"]["uid"] or job.state in ends

    async def _submit(self, resource: Object, wanted: job_pb2.JobSpec) -> None:
        """The resource's uid is the key: the same resource never makes two jobs."""
        request = scheduler_pb2.SubmitJobRequest(
            spec=wanted, idempotency_key=resource["metadata"]["uid"], managed_by=MANAGER
        )
        job = (await self._link.call("SubmitJob", request)).job
        log.info("submitted", job=job.uid, namespace=wanted.namespace, name=wanted.name)

    async def _change(
        self, job: job_pb2.Job, resource: Object, sizes: Mapping[str, int]
    ) -> RaddleError | None:
        """Carry out what differs; gives why not, for the job goes on as it is.

        The generation that was compared must still be the job's.
        """
        if job_status.is_ended(job):
            return None
        generation = job.generation
        try:
            wanted = job_message(resource, sizes)
            for change in changes(wanted, job.spec):
                log.info("changes", job=job.uid, change=str(change))
                generation = await self._one_change(job, wanted, change, generation)
        except ConflictError:
            raise
        except RaddleError as error:
            return error
        return None

    async def _one_change(
        self, job: job_pb2.Job, wanted: job_pb2.JobSpec, change: Change, generation: int
    ) -> int:
        """Carry out one change; gives the job's generation after it."""
        match change:
            case Update(paths):
                update = scheduler_pb2.UpdateJobRequest(
                    job_uid=job.uid,
                    spec=wanted,
                    expected_generation=generation,
                    managed_by=MANAGER,
                )
                update.update_mask.paths.extend(paths)
                return int((await self._link.call("UpdateJob", update)).job.generation)
            case Scale(role, instances, ranks):
                scale = scheduler_pb2.ScaleJobRequest(
                    job_uid=job.uid,
                    role=role,
                    instances=instances,
                    ranks=ranks,
                    expected_generation=generation,
                    managed_by=MANAGER,
                )
                return int((await self._link.call("ScaleJob", scale)).job.generation)
            case Replace(message):
                if not await self._end(job):
                    raise TemporaryError(
                        Reason.IMMUTABLE_FIELD, f"{message}: it ends, and begins anew after that"
                    )
                raise TemporaryError(Reason.IMMUTABLE_FIELD, message)

    def _incident(self, job_uid: str) -> incident_pb2.Incident | None:
        told = self._link.incidents.values
        return job_status.newest({name: m.incident for name, m in told.items()}, job_uid)

    async def _report(self, job: job_pb2.Job, present: Collection[scheduler_pb2.PodReport]) -> None:
        """Tell the scheduler why ranks' Pods ended or do not come up."""
        of_job = (job.spec.namespace, job.spec.name)
        ended = self._ended_pods.pop(of_job, {})
        gone = (pod_report(pod, job.uid) for pod in ended.values())
        reports = [*(report for report in gone if report is not None), *present]
        if not reports:
            return
        request = scheduler_pb2.ReportPodsRequest(job_uid=job.uid, pods=reports)
        try:
            await self._link.call("ReportPods", request)
        except RaddleError:
            self._ended_pods[of_job] = ended | self._ended_pods.get(of_job, {})
            raise

    # --- roles -----------------------------------------------------------------------------------

    async def _roles(self, resource: Object) -> dict[str, Object]:
        """The InferenceRoles, by role; the job's own sizes go over when they were changed there."""
        namespace, job = resource["metadata"]["namespace"], resource["metadata"]["name"]
        found: dict[str, Object] = {}
        for role in resource["spec"]["roles"]:
            name, size = role_name(job, role["name"]), replicas(role)
            known = await self._cluster.get("InferenceRole", namespace, name)
            if known is None or not is_owned(known, resource):
                refuse_foreign(known, resource)
                wanted = pods.role_resource(self._site, resource, role, size)
                known = await self._cluster.apply(wanted)
            elif (known["metadata"].get("annotations") or {}).get(JOB_REPLICAS) != str(size):
                change = {
                    "metadata": {"annotations": {JOB_REPLICAS: str(size)}},
                    "spec": {"replicas": size},
                }
                known = await self._cluster.patch(known, change) or known
            found[role["name"]] = known
        return found

    async def _former_roles(
        self, resource: Object, roles: Mapping[str, Object]
    ) -> dict[str, Object]:
        """InferenceRoles, by role, that the job had and that its resource names no more."""
        namespace, job = resource["metadata"]["namespace"], resource["metadata"]["name"]
        return {
            role["spec"]["role"]: role
            for role in await self._cluster.find("InferenceRole", namespace, f"{GROUP}/job={job}")
            if role["spec"]["role"] not in roles and is_owned(role, resource)
        }


def _has_job(resource: Mapping[str, Any]) -> bool:
    return bool((resource.get("status") or {}).get("jobUid"))
