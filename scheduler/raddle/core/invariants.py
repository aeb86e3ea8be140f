"""Design invariants as assertions over one machine's state; each failure tells its story.

`check` looks at a state, `check_step` at what one decision made of the state before. Run after
every test of the core and every simulated step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np

from raddle.core.context import Context, active_ranks, active_seats, is_ahead, is_ended, role_of
from raddle.core.experts.layout import IntArray
from raddle.core.experts.maps import to_array
from raddle.core.state import State
from raddle.model.incident import Incident, IncidentPhase
from raddle.model.job import AssignmentStage, Job, JobAssignment, JobState, Placement
from raddle.model.kinds import NodeState, RoleKind, SeatState
from raddle.model.routes import RouteState
from raddle.model.types import ExpertMap

_PLACED = (JobState.STARTING, JobState.READY, JobState.RECOVERING, JobState.STOPPING)
_RUNNING = (JobState.STARTING, JobState.READY, JobState.RECOVERING)
_OWNED = (SeatState.ACTIVE, SeatState.SPARE)


def check(context: Context) -> None:
    """Raise AssertionError with a story at the first broken invariant."""
    _dies_have_their_owner(context)
    for job in context.state.jobs():
        _job_is_consistent(context.state, job)
        _ranks_may_run(context, job)
        _members_are_reachable(context.state, job)
    _assignments_are_of_jobs(context)
    for incident in context.state.incidents():
        _incident_is_consistent(context.state, incident)
    _nothing_of_a_deleted_job_is_kept(context)
    context.cluster.validate()


def placements(context: Context) -> dict[str, Placement]:
    """What `check_step` wants to know of the state before a decision."""
    found = ((job.uid, context.state.placement(job.uid)) for job in context.state.jobs())
    return {job_uid: placement for job_uid, placement in found if placement is not None}


def check_step(context: Context, before: Mapping[str, Placement]) -> None:
    """Raise AssertionError where a decision put a new process on what may not take new work."""
    for job in context.state.jobs():
        placement, old = context.state.placement(job.uid), before.get(job.uid)
        if placement is None or placement is old:
            continue
        running = active_seats(context, job, old) if old is not None else []
        known = {(seat.key, seat.placement) for seat in running}
        for seat in active_seats(context, job, placement):
            if (seat.key, seat.placement) in known:
                continue
            where = seat.placement.die or seat.placement.node
            story = f"job {job.uid} epoch {job.epoch} starts {seat.key} on {where}, which"
            state = context.nodes.node(seat.placement.node).state
            assert state is NodeState.READY, f"{story} is on a node that is {state}"
            if seat.placement.die:
                assert not context.cluster.is_held(where), f"{story} is held"
                fault = context.cluster.fault_of(where)
                assert fault is None, f"{story} reports {fault}"


def _dies_have_their_owner(context: Context) -> None:
    """A die belongs to at most one instance, and the cluster knows it of all and no other dies."""
    owners: dict[str, str] = {}
    # Of every placement: a job whose own record cannot be read keeps its dies.
    for placement in context.state.records.values():
        if not isinstance(placement, Placement):
            continue
        for rank in (rank for part in placement.instances for rank in part.ranks):
            if rank.die and rank.state in _OWNED:
                story = f"{rank.die}: {owners.get(rank.die)} and {placement.job_uid}"
                assert rank.die not in owners, story
                owners[rank.die] = placement.job_uid
    cluster = context.cluster
    for die in cluster.positions:
        owner = cluster.owner_of(die)
        assert owner == owners.get(die), f"{die} is {owners.get(die)}'s, the cluster says {owner!r}"


def _job_is_consistent(state: State, job: Job) -> None:
    assert job.why.reason, f"job {job.uid} ({job.state}) has no reason"
    assert job.why.message, f"job {job.uid} ({job.state}) has no sentence"
    assert job.live_epoch <= job.epoch, f"job {job.uid}: live {job.live_epoch} > {job.epoch}"
    placement = state.placement(job.uid)
    assert (placement is not None) == (job.state in _PLACED), f"job {job.uid}: {job.state}"
    if is_ended(job):
        assert job.end_time > 0, f"job {job.uid} ended without a time"
        assert state.routes(job.uid) is None, f"job {job.uid} ended and has routes"
    if placement is None or job.state is JobState.STOPPING:
        nodes = state.nodes_assigned(job.uid)
        assert not nodes, f"job {job.uid} is {job.state} and assigned to {nodes}"
        return
    assert placement.epoch == job.epoch, f"job {job.uid}: {placement.epoch} != {job.epoch}"
    _gang_is_whole(job, placement)
    _experts_are_covered(state, job, placement)


def _gang_is_whole(job: Job, placement: Placement) -> None:
    """Every instance that the spec asks for is there, none is larger, and each can work."""
    placed = {(part.role, part.instance): part for part in placement.instances}
    asked = {(role.name, n): role for role in job.spec.roles for n in range(role.instances)}
    story = f"job {job.uid} epoch {job.epoch}"
    assert placed.keys() == asked.keys(), f"{story}: {sorted(placed)} placed, {sorted(asked)} asked"
    for name, role in asked.items():
        active = [r.rank for r in placed[name].ranks if r.state is SeatState.ACTIVE]
        assert len(active) == len(set(active)), f"{story} {name}: a rank sits twice: {active}"
        assert len(active) <= role.ranks, f"{story} {name}: {len(active)} of {role.ranks} ranks"
        # A pool without members is a miss for every block, and nothing worse.
        assert active or role.kind is RoleKind.CACHE, f"{story} {name} runs without a rank"


def _ranks_may_run(context: Context, job: Job) -> None:
    """No rank of an active epoch sits where no work may run, once the loss has been gathered."""
    placement = context.state.placement(job.uid)
    if placement is None or job.state not in _RUNNING or job.uid in context.touched:
        return
    for seat, status in active_ranks(context, job, placement):
        story = f"job {job.uid} epoch {job.epoch}: {seat.key} goes on at"
        ahead = status is not None and is_ahead(job, status)
        assert not ahead, f"{story} {status}, ahead of the job's epoch"
        node = context.nodes.node(seat.placement.node)
        assert node.state is not NodeState.LOST, f"{story} {node.name}, which is lost"
        fault = context.cluster.fault_of(seat.placement.die) if seat.placement.die else None
        assert fault is None, f"{story} {seat.placement.die}, which reports {fault}"


def _members_are_reachable(state: State, job: Job) -> None:
    """Once members are told to each other, each has the address of a process."""
    routes = state.routes(job.uid)
    _, stage = state.stages.get(job.uid, (0, AssignmentStage.UNSPECIFIED))
    if routes is None or job.state not in _RUNNING:
        return
    assert routes.epoch == job.epoch, f"job {job.uid}: routes of {routes.epoch} at {job.epoch}"
    is_live = job.live_epoch == job.epoch
    assert (routes.state is RouteState.LIVE) == is_live, f"job {job.uid}: routes {routes.state}"
    if stage not in (AssignmentStage.PREPARE, AssignmentStage.LIVE):
        return
    for member in routes.members:
        story = f"job {job.uid} epoch {job.epoch} {stage}: {member.rank}"
        assert member.incarnation, f"{story} is no process"
        assert member.engine_address, f"{story} has no address"


def _assignments_are_of_jobs(context: Context) -> None:
    state = context.state
    for node in context.cluster.node_names:
        for item in state.assignment(node).jobs:
            story = f"{node} is told to run {item.job_uid} at epoch {item.epoch}"
            job = state.job(item.job_uid)
            if job is None:
                readable = state.placement(item.job_uid) is not None
                assert readable, f"{story}, which is no job and has no placement"
                continue
            assert item.epoch <= job.epoch, f"{story}, which is at {job.epoch}"
            _assignment_is_of_the_placement(context, node, job, item, story)


def _assignment_is_of_the_placement(
    context: Context, node: str, job: Job, item: JobAssignment, story: str
) -> None:
    """Dies are the job's; at its newest epoch the ranks are those of the placement."""
    for rank in item.ranks:
        owner = context.cluster.owner_of(rank.die) if rank.die else job.uid
        assert owner in (None, job.uid), f"{story} on {rank.die}, which is {owner}'s"
    placement = context.state.placement(job.uid)
    if placement is None or item.epoch != job.epoch:
        # A large decision's last part may be missing after a change of leaders.
        return
    told = {(rank.rank, rank.die, rank.start_count) for rank in item.ranks}
    here = [s for s in active_seats(context, job, placement) if s.placement.node == node]
    placed = {(s.key, s.placement.die, s.placement.start_count) for s in here}
    assert told == placed, f"{story}: told {_sorted(told - placed)}, not {_sorted(placed - told)}"


def _sorted(values: Iterable[object]) -> list[object]:
    return sorted(values, key=str)


def _incident_is_consistent(state: State, incident: Incident) -> None:
    assert incident.faults, f"{incident.id} has no fault"
    if incident.phase is IncidentPhase.CLOSED:
        assert incident.end_time > 0, f"{incident.id} is closed without an end"
        return
    jobs = [state.job(plan.job_uid) for plan in incident.plans]
    goes_on = [job for job in jobs if job is not None and not is_ended(job)]
    assert goes_on or not jobs, f"{incident.id} is {incident.phase} and all its jobs have ended"


def _nothing_of_a_deleted_job_is_kept(context: Context) -> None:
    """Memory beside the records; what nodes that are away said of a job stays until they return."""
    state = context.state
    memories: dict[str, Iterable[str]] = {
        "sequences": state.sequences,
        "KV tokens": state.kv_tokens,
        "stage": state.stages,
        "seats": context.seats,
        "suspicions": context.suspicions,
        "lives": context.lives,
        "loads": context.loads_reported,
        "restart": context.restart_due,
        "reconnect": context.to_reconnect,
        "waits": context.waits,
        "due time": context.control_due,
        "blocked drain": context.drain_blocked,
    }
    for name, memory in memories.items():
        for job_uid in memory:
            known = state.job(job_uid) is not None or state.placement(job_uid) is not None
            assert known, f"{job_uid} is deleted, its {name} is kept"


def _experts_are_covered(state: State, job: Job, placement: Placement) -> None:
    """Every expert has a copy on an active rank, and no rank holds one twice."""
    maps = state.expert_maps(job.uid, job.epoch)
    by_instance = {(m.role, m.instance): m.expert_map for m in (maps.instances if maps else ())}
    for part in placement.instances:
        role = role_of(job, part.role)
        if role.kind is RoleKind.CACHE or role.slots_per_rank == 0:
            continue
        expert_map = by_instance.get((part.role, part.instance))
        assert expert_map is not None, f"{job.uid} {part.role}/{part.instance} has no expert map"
        active = tuple(r.rank for r in part.ranks if r.state is SeatState.ACTIVE)
        defect = _defect(_Same(expert_map), active)
        assert not defect, f"{job.uid} {part.role}/{part.instance} epoch {job.epoch}: {defect}"


class _Same:
    """A large value that is looked at once for as long as it is this very one."""

    __slots__ = ("value",)

    def __init__(self, value: ExpertMap) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=64)
def _defect(same: _Same, active: tuple[int, ...]) -> str:
    """What is wrong with a map on these ranks; empty if nothing is."""
    experts, table = same.value.experts, to_array(same.value)
    layers, slots = table.shape
    ranks: IntArray = np.arange(slots, dtype=np.int64) // same.value.slots_per_rank
    counted = (table >= 0) & np.isin(ranks, active)
    layer, slot = np.nonzero(counted)
    copies = np.bincount(layer * experts + table[counted], minlength=layers * experts)
    missing = [divmod(int(place), experts) for place in np.flatnonzero(copies == 0)]
    if missing:
        return f"(layer, expert) without a copy: {missing[:8]}"
    seats: IntArray = (layer * slots + ranks[slot]) * experts + table[counted]
    return "" if len(np.unique(seats)) == len(seats) else "a rank holds one expert twice"
