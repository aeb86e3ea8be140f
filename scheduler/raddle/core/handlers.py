"""What users ask, one function a request: check against the state, stage writes, give the answer.

Raises `RaddleError` to refuse; then nothing was staged. The answers are the values of the API's
responses (a Job, a Hold, a Maintenance, ...).
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import Any

from raddle.core import lifecycle, pod_words
from raddle.core.admission import check_spec
from raddle.core.context import Context, is_ended, note, put_job, ranks_under, role_of
from raddle.core.holds import covering, holding_maintenance, lift_drain, lift_hold, put_hold
from raddle.core.placement.gang import PlacedJob, place_job
from raddle.core.requests import (
    ApplySuperNode,
    CancelJob,
    CancelMaintenance,
    Cordon,
    CreateMaintenance,
    DeclareNodeLost,
    DeleteJob,
    InjectFault,
    ReportPods,
    ScaleJob,
    SubmitJob,
    Uncordon,
    UpdateJob,
)
from raddle.model import keys
from raddle.model.errors import ConflictError, PermanentError, Reason
from raddle.model.health import ActiveFault, Hold, Injections
from raddle.model.incident import Maintenance, MaintenanceState
from raddle.model.job import Job, JobSpec, JobState, NameRecord, Placement
from raddle.model.kinds import HoldKind, NodeState
from raddle.model.reasons import Decision
from raddle.model.topology import DIES_MAX, SuperNode
from raddle.model.types import Why

JOBS_MAX = 20_000
INJECTIONS_A_NODE_MAX = 256
CODE_CHARACTERS_MAX = 64
_MUTABLE = {
    "priority",
    "queue",
    "recovery",
    "recovery.allowed_options",
    "recovery.max_pause",
    "recovery.allow_masking",
}


@singledispatch
def answer(request: Any, context: Context, identity: str) -> Any:
    """Carry out one request and return its answer."""
    raise TypeError(f"no handler for {type(request).__name__} from {identity} at {context.now}")


@answer.register
def submit_job(request: SubmitJob, context: Context, identity: str) -> tuple[Job, Placement | None]:
    """Accept a job; the same idempotency key gives the same job."""
    state, spec = context.state, request.spec
    known = state.idempotency.get((identity, request.idempotency_key))
    if request.idempotency_key and known is not None:
        return _same_job(state.require_job(known), request), state.placement(known)
    check_spec(spec, context.cluster)
    name_key = keys.name(spec.namespace, spec.name)
    if name_key in state.records:
        raise PermanentError(
            Reason.ALREADY_EXISTS,
            f"Job {spec.namespace}/{spec.name} exists ({state.records[name_key].job_uid}):"
            " choose another name, or cancel and delete it first.",
        )
    if len(state.job_uids) >= JOBS_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED, f"{JOBS_MAX} jobs are stored: delete ended ones first."
        )
    job = Job(
        uid=request.job_uid,
        spec=spec,
        generation=1,
        state=JobState.PENDING,
        why=Why(reason=Decision.ACCEPTED, message="accepted, waits to be placed"),
        created_by=identity,
        managed_by=request.managed_by,
        idempotency_key=request.idempotency_key,
        spec_digest=request.spec_digest,
        create_time=context.now,
    )
    if request.dry_run:
        return _dry_run(context, job)
    put_job(context, job)
    state.put(name_key, NameRecord(job_uid=job.uid))
    note(context, "JOB_ACCEPTED", job.uid, f"{spec.namespace}/{spec.name}", identity=identity)
    state.stimulus(job.uid)
    context.queue_dirty = True
    return job, None


def _same_job(job: Job, request: SubmitJob) -> Job:
    if job.spec_digest != request.spec_digest:
        raise PermanentError(
            Reason.IDEMPOTENCY_KEY_REUSED,
            f"Idempotency key {request.idempotency_key!r} belongs to job {job.uid} with another"
            " spec: use a new key for a new job.",
            job_uid=job.uid,
        )
    return job


def _dry_run(context: Context, job: Job) -> tuple[Job, Placement | None]:
    placed = place_job(job.spec, context.cluster)
    if isinstance(placed, PlacedJob):
        placement = placed.placement(job.uid, 0)
        return replace(job, uid="", why=placement.why), placement
    return replace(job, uid="", why=placed), None


def _require_owner(job: Job, managed_by: str) -> None:
    if job.managed_by and managed_by != job.managed_by:
        raise PermanentError(
            Reason.MANAGED_BY_OTHER,
            f"Job {job.uid} is managed by {job.managed_by}: change it there.",
            managed_by=job.managed_by,
        )


def _require_writable(job: Job, managed_by: str, expected_generation: int) -> None:
    _require_owner(job, managed_by)
    if expected_generation and expected_generation != job.generation:
        raise ConflictError(
            Reason.STALE_GENERATION,
            f"Job {job.uid} is at generation {job.generation}, not {expected_generation}:"
            " read it again and repeat.",
            generation=str(job.generation),
        )
    if is_ended(job) or job.state is JobState.STOPPING:
        raise PermanentError(Reason.NOT_FOUND, f"Job {job.uid} has ended ({job.state}).")


@answer.register
def update_job(request: UpdateJob, context: Context, identity: str) -> Job:
    """Change the mutable fields that the mask names."""
    job = context.state.require_job(request.job_uid)
    _require_writable(job, request.managed_by, request.expected_generation)
    paths = tuple(dict.fromkeys(request.update_mask))
    for path in paths:
        if path not in _MUTABLE:
            raise PermanentError(
                Reason.IMMUTABLE_FIELD,
                f"{path[:80]} can't be changed; mutable are: {', '.join(sorted(_MUTABLE))}.",
                field=path[:80],
            )
    spec = job.spec
    for path in paths:
        spec = _with_path(spec, request.spec, path)
    check_spec(spec, context.cluster)
    if spec == job.spec:
        return job
    job = replace(job, spec=spec, generation=job.generation + 1)
    if job.state is not JobState.PENDING:
        # What can change takes effect at the next decision: nothing has to move.
        job = replace(job, observed_generation=job.generation)
    put_job(context, job)
    note(context, "JOB_UPDATED", job.uid, ", ".join(paths), identity=identity)
    context.queue_dirty = True
    return job


def _with_path(spec: JobSpec, source: JobSpec, path: str) -> JobSpec:
    first, _, rest = path.partition(".")
    if not rest:
        return replace(spec, **{first: getattr(source, first)})
    inner = replace(getattr(spec, first), **{rest: getattr(getattr(source, first), rest)})
    return replace(spec, **{first: inner})


@answer.register
def scale_job(request: ScaleJob, context: Context, identity: str) -> Job:
    """Change a role's size: the job is placed anew at its next epoch with the new size."""
    job = context.state.require_job(request.job_uid)
    _require_writable(job, request.managed_by, request.expected_generation)
    if (request.instances > 0) == (request.ranks > 0):
        raise PermanentError(
            Reason.INVALID_ARGUMENT, "Say either instances or ranks, as a number above 0."
        )
    if request.role not in [role.name for role in job.spec.roles]:
        raise PermanentError(Reason.NOT_FOUND, f"Job {job.uid} has no role {request.role!r}.")
    old = role_of(job, request.role)
    new = replace(
        old, instances=request.instances or old.instances, ranks=request.ranks or old.ranks
    )
    if new == old:
        return job
    roles = tuple(new if role.name == new.name else role for role in job.spec.roles)
    spec = replace(job.spec, roles=roles)
    check_spec(spec, context.cluster)
    job = replace(job, spec=spec, generation=job.generation + 1)
    put_job(context, job)
    size = f"{new.instances} instances of {new.ranks} ranks"
    note(context, "JOB_SCALED", job.uid, f"{new.name}: {size}", identity=identity)
    if job.state is not JobState.PENDING:
        why = Why(reason=Decision.SCALED, message=f"role {new.name} now has {size}: placed anew")
        job = lifecycle.requeue(context, job, why)
    context.queue_dirty = True
    return job


@answer.register
def cancel_job(request: CancelJob, context: Context, identity: str) -> Job:
    job = context.state.require_job(request.job_uid)
    _require_owner(job, request.managed_by)
    if is_ended(job) or job.state is JobState.STOPPING:
        return job
    why = Why(reason=Decision.CANCELLED, message=f"cancelled by {identity}")
    return lifecycle.stop(context, job, why)


@answer.register
def delete_job(request: DeleteJob, context: Context, identity: str) -> None:
    job = context.state.require_job(request.job_uid)
    _require_owner(job, request.managed_by)
    if not is_ended(job):
        raise PermanentError(
            Reason.NOT_ENDED, f"Job {job.uid} is {job.state}: cancel it before deleting it."
        )
    context.state.delete(keys.job(job.uid))
    context.state.delete(keys.name(job.spec.namespace, job.spec.name))
    context.forget(job.uid)
    note(context, "JOB_DELETED", job.uid, f"{job.spec.name}", identity=identity)


@answer.register
def apply_supernode(
    request: ApplySuperNode, context: Context, identity: str
) -> tuple[SuperNode, bool]:
    """Add a supernode; the same description again changes nothing."""
    new = request.supernode
    _require_dies(context, new)
    old = context.state.records.get(keys.supernode(new.name))
    if old == new:
        return new, False
    if old is not None and any(
        context.state.placement(job.uid) is not None for job in context.state.jobs()
    ):
        raise PermanentError(
            Reason.IMMUTABLE_FIELD,
            f"Supernode {new.name} has jobs: cancel them before changing its description.",
        )
    context.state.put(keys.supernode(new.name), new)
    context.rebuild_cluster()
    note(context, "SUPERNODE_APPLIED", new.name, new.machine, identity=identity)
    return new, True


def _require_dies(context: Context, new: SuperNode) -> None:
    """All supernodes together have as many dies as one may have."""
    others = sum(s.dies for s in context.state.supernodes() if s.name != new.name)
    if others + new.dies > DIES_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"{new.name} would make {others + new.dies} dies; one cluster has at most {DIES_MAX}.",
        )


@answer.register
def cordon(request: Cordon, context: Context, identity: str) -> Hold:
    """Forbid new work on a part of the machine."""
    return put_hold(
        context, request.subject, HoldKind.CORDON, request.message, identity, request.reason
    )


@answer.register
def uncordon(request: Uncordon, context: Context, identity: str) -> tuple[Hold, ...]:
    """Lift the cordon; gives the holds that still keep work away from the subject."""
    subject = request.subject
    hold = context.holds.get((subject, HoldKind.CORDON))
    if request.reason and (hold is None or hold.reason != request.reason):
        return covering(context, subject)
    if hold is None:
        raise _no_cordon(context, subject)
    lift_hold(context, subject, HoldKind.CORDON)
    left = covering(context, subject)
    said = ", ".join(f"{hold.kind} on {hold.subject}" for hold in left)
    note(
        context,
        "HOLD_LIFTED",
        subject,
        f"the cordon is lifted; still held by {said}" if left else "takes work again",
        identity=identity,
    )
    return left


def _no_cordon(context: Context, subject: str) -> PermanentError:
    drain = holding_maintenance(context, subject)
    if drain is not None:
        return PermanentError(
            Reason.MANAGED_BY_OTHER,
            f"{subject} is being drained and has no cordon: cancel the maintenance"
            f" (`raddle drain {drain.id} --cancel`).",
        )
    return PermanentError(
        Reason.NOT_FOUND, f"{subject} has no hold of its own; `raddle dies` shows all holds."
    )


@answer.register
def declare_node_lost(request: DeclareNodeLost, context: Context, identity: str) -> Why:
    """An operator is the second witness against a silent node."""
    if not context.cluster.has_node(request.node):
        raise PermanentError(
            Reason.NOT_FOUND, f"There is no node {request.node!r}; `raddle nodes` lists them."
        )
    node = context.nodes.node(request.node)
    if node.state not in (NodeState.SUSPECT, NodeState.UNKNOWN, NodeState.LOST):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"Node {request.node} is {node.state}: only a silent node can be declared lost; use"
            " `raddle drain` to move work away.",
        )
    said = request.message or "declared lost"
    context.nodes.declared_lost(request.node, f"{said}, says {identity}")
    note(context, "NODE_DECLARED_LOST", request.node, said, identity=identity)
    return node.why


@answer.register
def report_pods(request: ReportPods, context: Context, identity: str) -> None:
    """Kubernetes' words about pods of a job's ranks; those of a job that has ended are late."""
    job = context.state.require_job(request.job_uid)
    if not is_ended(job):
        pod_words.take(context, job, request.words, identity)


@answer.register
def create_maintenance(request: CreateMaintenance, context: Context, identity: str) -> Maintenance:
    """Begin a drain: no new work, and what runs moves away under a plan.

    What is drained already, or being drained, stays so under the maintenance that did it.
    """
    context.cluster.require_subject(request.subject)
    if request.timeout_s <= 0:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"timeout is {request.timeout_s:g} s; it must be above 0.",
            field="timeout",
        )
    known = holding_maintenance(context, request.subject)
    if known is not None:
        return known
    record = Maintenance(
        id=request.maintenance_id,
        subject=request.subject,
        state=MaintenanceState.DRAINING,
        why=Why(reason=Decision.DRAINING, message=request.message or "ranks move away"),
        deadline=context.now + request.timeout_s,
        ranks_total=sum(ranks_under(context, request.subject).values()),
        created_by=identity,
        create_time=context.now,
    )
    if request.dry_run:
        message = f"{record.ranks_total} ranks would have to move away"
        return replace(record, id="", why=Why(reason=Decision.DRY_RUN, message=message))
    put_hold(context, request.subject, HoldKind.DRAIN, record.why.message, identity)
    context.state.put(keys.maintenance(record.id), record)
    context.drains_dirty = True
    return record


@answer.register
def cancel_maintenance(request: CancelMaintenance, context: Context, identity: str) -> Maintenance:
    """End a drain: its subject takes work again, unless something else holds it."""
    key = keys.maintenance(request.maintenance_id)
    record: Maintenance | None = context.state.records.get(key)
    if record is None:
        raise PermanentError(Reason.NOT_FOUND, f"There is no maintenance {request.maintenance_id}.")
    if record.state in (MaintenanceState.CANCELLED, MaintenanceState.EXPIRED):
        return record
    why = Why(reason=Decision.CANCELLED, message=f"cancelled by {identity}")
    record = replace(record, state=MaintenanceState.CANCELLED, why=why)
    context.state.put(key, record)
    context.seen_since.pop(record.id, None)
    lift_drain(context, record.subject)
    context.drains_dirty = True
    return record


@answer.register
def inject_fault(request: InjectFault, context: Context, identity: str) -> Why:
    """Set or clear a fault code on a simulated device; its agent reports it like a real one."""
    if len(request.code) > CODE_CHARACTERS_MAX:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"code is longer than {CODE_CHARACTERS_MAX} characters."
        )
    node = context.cluster.node_of_subject(request.subject)
    key = keys.injections(node)
    old = context.state.records.get(key) or Injections(node=node)
    same = [f for f in old.faults if (f.subject, f.code) == (request.subject, request.code)]
    kept = tuple(f for f in old.faults if f not in same)
    if request.clear:
        faults = kept
    else:
        level = context.cluster.level_of_subject(request.subject)
        fault = ActiveFault(
            code=request.code, subject_kind=level, subject=request.subject, level=request.level
        )
        faults = (*kept, fault)
    if len(faults) > INJECTIONS_A_NODE_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"{node} has {INJECTIONS_A_NODE_MAX} injected faults: clear some first.",
        )
    context.state.put(key, Injections(node=node, faults=faults))
    verb = "cleared" if request.clear else "set"
    message = f"{request.code} {verb} on {request.subject}"
    note(context, "FAULT_INJECTED", request.subject, message, identity=identity)
    return Why(reason=Decision.FAULT_INJECTED, message=message)
