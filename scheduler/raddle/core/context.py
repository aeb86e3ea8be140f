"""What every part of the machine works on: the state, the dies, the nodes, and the time.

Also the few sentences that several parts write: events of the history, changes of jobs, and the
assignments of a job to its nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

from raddle.core.cluster import Cluster
from raddle.core.expert_loads import ExpertLoads
from raddle.core.kvcache.figures import KV_REPLICAS
from raddle.core.nodes import NodeTracker
from raddle.core.state import State
from raddle.model import keys
from raddle.model.health import AgentHealth, AgentRegistration, Hold, RankStage, RankStatus
from raddle.model.incident import Event
from raddle.model.job import (
    Assignment,
    AssignmentStage,
    InstancePlacement,
    Job,
    JobAssignment,
    JobExpertMaps,
    JobSpec,
    JobState,
    Placement,
    RankAssignment,
    RankPlacement,
    RoleSpec,
)
from raddle.model.kinds import HoldKind, NodeState, RoleKind, SeatState
from raddle.model.routes import Routes, RouteState
from raddle.model.types import ExpertMove, Member, RankKey, SequenceRestore, Why


@dataclass(frozen=True, slots=True)
class Wait:
    """What an epoch bears of one agent's silence, however many times it falls silent."""

    patience_s: float
    #: None while it is heard.
    since_s: float | None = None
    #: Silent for so long before.
    spent_s: float = 0.0

    @property
    def due_s(self) -> float:
        """When it will have been silent for too long."""
        if self.since_s is None:
            return math.inf
        return self.since_s + self.patience_s - self.spent_s

    def silent(self, now: float, patience_s: float) -> Wait:
        """One that was unknown on the way is waited for as an unknown one, whatever it is now."""
        since_s = now if self.since_s is None else self.since_s
        return replace(self, since_s=since_s, patience_s=max(self.patience_s, patience_s))

    def heard(self, now: float) -> Wait:
        if self.since_s is None:
            return self
        return replace(self, since_s=None, spent_s=self.spent_s + now - self.since_s)


@dataclass(slots=True)
class Context:
    """One machine's insides. `now` is set at the door and nowhere else."""

    state: State
    cluster: Cluster
    nodes: NodeTracker
    now: float
    #: Names this term beside every epoch decided in it; 0: not known.
    term: int = 0
    #: Jobs whose ranks, nodes or records changed since they were last advanced.
    touched: dict[str, None] = field(default_factory=dict[str, None])
    #: When the running phase of an incident began, if in this term: other leaders' entries were
    #: timed by another host's clock, and clocks of two hosts are never compared.
    phase_began: dict[str, float] = field(default_factory=dict[str, float])
    #: Since when this leader sees a job wait, or a drain under way.
    seen_since: dict[str, float] = field(default_factory=dict[str, float])
    #: Something became free or waits anew: the queue is worth a look.
    queue_dirty: bool = True
    #: A maintenance may have made progress.
    drains_dirty: bool = False
    #: Subjects being drained and their maintenance.
    draining: dict[str, str] = field(default_factory=dict[str, str])
    #: Holds by subject.
    #: By subject and kind: those of several kinds on one subject are independent.
    holds: dict[tuple[str, HoldKind], Hold] = field(
        default_factory=dict[tuple[str, HoldKind], Hold]
    )
    #: What peers say of each job's ranks.
    suspicions: dict[str, Suspicions] = field(default_factory=dict[str, "Suspicions"])
    #: What Kubernetes says of the pods of each job's ranks, of their newest starts.
    pod_words: dict[str, dict[RankKey, PodWord]] = field(
        default_factory=dict[str, dict[RankKey, "PodWord"]]
    )
    #: The last process that a recovery started in each seat of each job.
    lives: dict[str, dict[RankKey, Life]] = field(default_factory=dict[str, dict[RankKey, "Life"]])
    #: When a job whose processes keep ending may start them again.
    restart_due: dict[str, float] = field(default_factory=dict[str, float])
    #: Jobs that a drain would take down: nothing moves until something becomes free.
    drain_blocked: dict[str, None] = field(default_factory=dict[str, None])
    #: Agents that each job's epoch waits or waited for, by epoch and node.
    waits: dict[str, dict[tuple[int, str], Wait]] = field(
        default_factory=dict[str, dict[tuple[int, str], Wait]]
    )
    #: When a job stops waiting for a silent agent.
    control_due: dict[str, float] = field(default_factory=dict[str, float])
    #: Active seats of each job, with the placement and the spec that they are of.
    seats: dict[str, tuple[Placement, JobSpec, list[Seat]]] = field(
        default_factory=dict[str, tuple[Placement, JobSpec, list["Seat"]]]
    )
    #: What ranks report of their experts' loads.
    expert_loads: ExpertLoads = field(default_factory=ExpertLoads)
    #: Jobs with new reports of loads since the last decision.
    loads_reported: dict[str, None] = field(default_factory=dict[str, None])
    #: Jobs whose members are to be told that a pool member's node is drained, or no more.
    to_tell: dict[str, None] = field(default_factory=dict[str, None])
    #: Jobs that start a new epoch with the same members, and the rank that caused it.
    to_reconnect: dict[str, str] = field(default_factory=dict[str, str])

    def rebuild_cluster(self) -> None:
        """Build the dies anew from the supernodes, placements, holds and nodes."""
        state = self.state
        supernodes = state.supernodes()
        self.cluster = Cluster(supernodes)
        self.nodes.storm_nodes_max = max((s.nodes_per_rack for s in supernodes), default=1)
        for value in state.records.values():
            if isinstance(value, Placement):
                occupy(self, value)
            elif isinstance(value, Hold):
                self.set_hold(value)
            elif isinstance(value, AgentRegistration) and self.cluster.has_node(value.node):
                ready = self.nodes.node(value.node).state is NodeState.READY
                self.cluster.set_node(
                    value.node,
                    ready=ready,
                    drivers=value.drivers,
                    host_memory_bytes=value.host_memory_bytes,
                )
            elif isinstance(value, AgentHealth):
                self.cluster.set_faults(value.node, value.active_faults)
        self.queue_dirty = True

    def set_hold(self, hold: Hold) -> None:
        self.holds[hold.subject, hold.kind] = hold
        self.cluster.set_hold(hold.subject, held=True)

    def lift_hold(self, subject: str, kind: HoldKind) -> None:
        """Lift one hold; dies that another hold covers stay held."""
        self.holds.pop((subject, kind), None)
        held = any(other == subject for other, _ in self.holds)
        self.cluster.set_hold(subject, held=held)

    def is_draining(self, position: str) -> bool:
        return any(self.is_under(position, subject) for subject in self.draining)

    @staticmethod
    def is_under(position: str, subject: str) -> bool:
        """Is the position the subject, or part of it?"""
        return position == subject or position.startswith(f"{subject}/")

    def seen_for_s(self, name: str) -> float:
        """How long this leader has seen a thing; its own clock alone counts."""
        return self.now - self.seen_since.setdefault(name, self.now)

    def suspicions_of(self, job_uid: str) -> Suspicions:
        return self.suspicions.setdefault(job_uid, Suspicions())

    def forget(self, job_uid: str) -> None:
        """Drop what is remembered beside the records of a job that has ended."""
        for memory in (
            self.seen_since,
            self.suspicions,
            self.pod_words,
            self.lives,
            self.restart_due,
            self.drain_blocked,
            self.waits,
            self.control_due,
            self.seats,
            self.to_reconnect,
            self.to_tell,
            self.loads_reported,
        ):
            memory.pop(job_uid, None)
        self.expert_loads.forget(job_uid)
        self.state.forget(job_uid)

    def take_to_tell(self) -> list[str]:
        found, self.to_tell = list(self.to_tell), {}
        return found

    def take_reconnects(self) -> list[tuple[str, str]]:
        found, self.to_reconnect = list(self.to_reconnect.items()), {}
        return found

    def reseat(self, old: Placement, new: Placement) -> None:
        """Free the dies that the new placement leaves and take those that it adds."""
        release(self, old)
        occupy(self, new)


@dataclass(slots=True)
class Suspicions:
    """What peers say of one job's ranks, by incarnation."""

    #: (incarnation, epoch) that were probed.
    asked: dict[tuple[str, int], None] = field(default_factory=dict[tuple[str, int], None])
    #: What the first accuser said: its name and its reason.
    accusations: dict[str, str] = field(default_factory=dict[str, str])
    #: When an answering rank was reconnected, lately.
    reconnects: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    #: Those that are believed lost: code and sentence.
    dead: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])


@dataclass(frozen=True, slots=True)
class PodWord:
    """What Kubernetes says of the pod of one start of a rank."""

    rank: RankKey
    start_count: int
    #: The rank's container is over, or will never be.
    has_ended: bool
    reason: str
    message: str

    @property
    def sentence(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(slots=True)
class Life:
    """One process of a seat: when it was started, how many before it in a row had short lives."""

    started_s: float
    starts: int
    ended_s: float | None = None

    def is_shorter_than(self, seconds: float) -> bool:
        return self.ended_s is not None and self.ended_s - self.started_s < seconds


@dataclass(frozen=True, slots=True)
class Seat:
    """One rank of one job with where it sits."""

    key: RankKey
    role: RoleSpec
    placement: RankPlacement


def role_of(job: Job, name: str) -> RoleSpec:
    return next(role for role in job.spec.roles if role.name == name)


def seats(job: Job, placement: Placement) -> Iterator[Seat]:
    """All seats in order of role, instance and rank."""
    for instance in placement.instances:
        role = role_of(job, instance.role)
        for rank in instance.ranks:
            key = RankKey(role=instance.role, instance=instance.instance, rank=rank.rank)
            yield Seat(key, role, rank)


def active_seats(context: Context, job: Job, placement: Placement) -> list[Seat]:
    """The seats of ranks that take part; remembered, since every acknowledgement asks for them."""
    known = context.seats.get(job.uid)
    if known is None or known[0] is not placement or known[1] is not job.spec:
        active = [s for s in seats(job, placement) if s.placement.state is SeatState.ACTIVE]
        context.seats[job.uid] = known = (placement, job.spec, active)
    return known[2]


def ranks_under(context: Context, subject: str) -> dict[str, int]:
    """How many active ranks each job has on a part of the machine; jobs without one are left out.

    A rank without a die counts where its host is.
    """
    found: dict[str, int] = {}
    for job in context.state.jobs():
        placement = context.state.placement(job.uid)
        if placement is None:
            continue
        places = [
            s.placement.die or s.placement.node for s in active_seats(context, job, placement)
        ]
        count = sum(1 for place in places if context.is_under(place, subject))
        if count:
            found[job.uid] = count
    return found


def active_ranks(
    context: Context, job: Job, placement: Placement
) -> list[tuple[Seat, RankStatus | None]]:
    """Each active seat with what its agent says of the process in it."""
    return [(s, status_of(context, job, s)) for s in active_seats(context, job, placement)]


def status_of(context: Context, job: Job, seat: Seat) -> RankStatus | None:
    """What its agent says of the process in this seat; None if it speaks of another process."""
    status = context.state.rank_status(job.uid, seat.placement.node, seat.key)
    if status is None or status.start_count != seat.placement.start_count:
        return None
    return status


def is_ahead(job: Job, status: RankStatus) -> bool:
    """Does a rank live at an epoch that this job's record does not know? The store was set back."""
    return status.epoch > job.epoch or status.is_of_another_decision(job.epoch, job.epoch_term)


FENCED_OR_LATER = (RankStage.FENCED, RankStage.REPAIRED, RankStage.LIVE)
#: What ranks acknowledge when they have done what a stage asks of them.
DONE_BY_STAGE = {
    AssignmentStage.START: (RankStage.STARTED, *FENCED_OR_LATER),
    AssignmentStage.PREPARE: (RankStage.REPAIRED, RankStage.LIVE),
    AssignmentStage.LIVE: (RankStage.LIVE,),
}


def has_done(context: Context, job: Job, status: RankStatus | None) -> bool:
    """Did a rank acknowledge all that the stage under way asks of it?"""
    _, stage = context.state.stages.get(job.uid, (0, AssignmentStage.UNSPECIFIED))
    return stage not in DONE_BY_STAGE or has_reached(job, status, DONE_BY_STAGE[stage])


def has_reached(job: Job, status: RankStatus | None, stages: Collection[RankStage]) -> bool:
    """Did a rank acknowledge one of these stages of the job's very epoch?"""
    if status is None or is_ahead(job, status):
        return False
    return status.epoch == job.epoch and status.stage in stages


def at_next_epoch(context: Context, job: Job) -> Job:
    """The job at an epoch above everything that the store or any live agent knows of it."""
    known = [
        status.epoch
        for acks in context.state.acks.get(job.uid, {}).values()
        for status in acks.ranks
    ]
    return replace(job, epoch=max([job.epoch, *known]) + 1, epoch_term=context.term)


def note(context: Context, kind: str, subject: str, message: str, **more: object) -> None:
    """Append one line of history."""
    event = Event(time=context.now, kind=kind, subject=subject, message=message)
    context.state.record(replace(event, **more))  # type: ignore[arg-type]


def put_job(context: Context, job: Job) -> None:
    context.state.put(keys.job(job.uid), job)


def set_why(context: Context, job: Job, why: Why) -> Job:
    if job.why != why:
        job = replace(job, why=why)
        put_job(context, job)
    return job


def members(context: Context, job: Job, placement: Placement) -> tuple[Member, ...]:
    """The active ranks with the addresses that their agents reported for these processes."""
    found: list[Member] = []
    for seat in active_seats(context, job, placement):
        status = status_of(context, job, seat)
        is_cache = seat.role.kind is RoleKind.CACHE
        found.append(
            Member(
                rank=seat.key,
                kind=seat.role.kind,
                die=seat.placement.die,
                node=seat.placement.node,
                engine_address=status.engine_address if status else "",
                data_address=status.data_address if status else "",
                incarnation=status.incarnation if status else "",
                rack=context.cluster.rack_name(seat.placement.node),
                kv_replicas=kv_replicas(seat.role) if is_cache else 0,
                dram_bytes=seat.role.dram_bytes if is_cache else 0,
                start_epoch=seat.placement.start_count,
                kv_slots=seat.placement.kv_slots,
                kv_draining=seat.placement.kv_draining,
            )
        )
    return tuple(found)


def kv_replicas(role: RoleSpec) -> int:
    """Copies that a cache role's pool keeps of each block."""
    return role.kv_replicas or KV_REPLICAS


def put_routes(
    context: Context,
    job: Job,
    placement: Placement,
    state: RouteState,
    restores: tuple[SequenceRestore, ...] | None = None,
) -> None:
    """Publish who serves the job at its epoch. `restores` None keeps those of this epoch."""
    old = context.state.routes(job.uid)
    if restores is None:
        restores = old.restores if old is not None and old.epoch == job.epoch else ()
    context.state.put(
        keys.routes(job.uid),
        Routes(
            job_uid=job.uid,
            namespace=job.spec.namespace,
            name=job.spec.name,
            epoch=job.epoch,
            state=state,
            model=job.spec.model.name,
            kv_block_tokens=job.spec.model.kv_block_tokens,
            members=members(context, job, placement),
            restores=restores,
        ),
    )


def put_assignments(
    context: Context,
    job: Job,
    placement: Placement,
    stage: AssignmentStage,
    *,
    incident_id: str = "",
    moves: Callable[[RankKey], tuple[ExpertMove, ...]] = lambda _: (),
    restores: tuple[SequenceRestore, ...] = (),
) -> None:
    """Tell every node what its ranks of this job have to reach, merged with its other jobs."""
    by_node: dict[str, list[Seat]] = {}
    for seat in active_seats(context, job, placement):
        by_node.setdefault(seat.placement.node, []).append(seat)
    for node in _nodes_with(context, job.uid, placement):
        if node not in by_node:
            _replace_job(context, node, job.uid, None)
            continue
        ranks = tuple(
            RankAssignment(
                rank=seat.key,
                kind=seat.role.kind,
                die=seat.placement.die,
                moves=moves(seat.key),
                restores=tuple(r for r in restores if r.target == seat.key),
                start_count=seat.placement.start_count,
            )
            for seat in by_node[node]
        )
        here = {seat.role.name: seat.role for seat in by_node[node]}
        item = JobAssignment(
            job_uid=job.uid,
            namespace=job.spec.namespace,
            name=job.spec.name,
            epoch=job.epoch,
            stage=stage,
            model=job.spec.model,
            roles=tuple(here.values()),
            ranks=ranks,
            incident_id=incident_id,
            epoch_term=job.epoch_term,
        )
        _replace_job(context, node, job.uid, item)
    context.state.stages[job.uid] = (job.epoch, stage)


def promote_assignments(context: Context, job: Job, placement: Placement) -> None:
    """The same ranks, moves and restores, one stage further (LIVE)."""
    for node in _nodes_with(context, job.uid, placement):
        for item in context.state.assignment(node).jobs:
            if item.job_uid == job.uid:
                live = replace(item, epoch=job.epoch, stage=AssignmentStage.LIVE)
                _replace_job(context, node, job.uid, live)
    context.state.stages[job.uid] = (job.epoch, AssignmentStage.LIVE)


def clear_assignments(context: Context, job_uid: str, placement: Placement) -> None:
    """No node has ranks of this job any more: agents end them."""
    for node in _nodes_with(context, job_uid, placement):
        _replace_job(context, node, job_uid, None)
    context.state.stages.pop(job_uid, None)


def drop_assignment(context: Context, node: str, job_uid: str) -> None:
    """The node has no ranks of this job any more: its agent ends them."""
    _replace_job(context, node, job_uid, None)


def _nodes_with(context: Context, job_uid: str, placement: Placement) -> list[str]:
    """Nodes of the placement and nodes that still have an assignment of the job, in order."""
    found = {rank.node: None for part in placement.instances for rank in part.ranks if rank.node}
    for node in context.state.nodes_assigned(job_uid):
        found[node] = None
    return sorted(found)


def _replace_job(context: Context, node: str, job_uid: str, item: JobAssignment | None) -> None:
    old = context.state.assignment(node)
    jobs = [other for other in old.jobs if other.job_uid != job_uid]
    if item is not None:
        jobs.append(item)
        jobs.sort(key=lambda other: other.job_uid)
    context.state.put(keys.assignment(node), Assignment(node=node, jobs=tuple(jobs)))


def put_expert_maps(context: Context, maps: JobExpertMaps) -> None:
    """Write the maps of an epoch; those of epochs before the last one are gone."""
    context.state.put(keys.expert_maps(maps.job_uid, maps.epoch), maps)
    context.state.drop_maps(maps.job_uid, but=2)


def occupy(context: Context, placement: Placement) -> None:
    """Mark the dies, and the host memory of cache ranks, of all seats as the job's."""
    job = context.state.job(placement.job_uid)
    roles = {role.name: role for role in job.spec.roles} if job is not None else {}
    for instance in placement.instances:
        for rank in instance.ranks:
            if rank.die and rank.state in (SeatState.ACTIVE, SeatState.SPARE):
                context.cluster.occupy([rank.die], placement.job_uid)
            elif rank.state is SeatState.ACTIVE and instance.role in roles:
                memory = roles[instance.role].dram_bytes
                context.cluster.occupy_host(rank.node, placement.job_uid, memory)


def release(context: Context, placement: Placement) -> None:
    """Free all dies of the placement."""
    dies = [
        rank.die
        for instance in placement.instances
        for rank in instance.ranks
        if rank.die and rank.state in (SeatState.ACTIVE, SeatState.SPARE)
    ]
    context.cluster.release(dies)
    context.cluster.release_hosts(placement.job_uid)
    context.queue_dirty = True


def is_ended(job: Job) -> bool:
    return job.state in (JobState.CANCELLED, JobState.FAILED)


def instance_of(placement: Placement, role: str, instance: int) -> InstancePlacement:
    return next(p for p in placement.instances if (p.role, p.instance) == (role, instance))
