"""Design invariants as assertions over one machine's state; each failure tells its story.

Run after every test of the core and every simulated step.
"""

from __future__ import annotations

from raddle.core.context import Context, is_ended, role_of, seats
from raddle.core.state import State
from raddle.model.incident import IncidentPhase
from raddle.model.job import Job, JobState, Placement
from raddle.model.kinds import RoleKind, SeatState

_PLACED = (JobState.STARTING, JobState.READY, JobState.RECOVERING, JobState.STOPPING)


def check(context: Context) -> None:
    """Raise AssertionError with a story at the first broken invariant."""
    _one_owner_a_die(context)
    for job in context.state.jobs():
        _job_is_consistent(context.state, job)
    for incident in context.state.incidents():
        assert incident.faults, f"{incident.id} has no fault"
        if incident.phase is IncidentPhase.CLOSED:
            assert incident.end_time > 0, f"{incident.id} is closed without an end"
    context.cluster.validate()


def _one_owner_a_die(context: Context) -> None:
    owners: dict[str, str] = {}
    for job in context.state.jobs():
        placement = context.state.placement(job.uid)
        for part in placement.instances if placement else ():
            for rank in part.ranks:
                if not rank.die or rank.state not in (SeatState.ACTIVE, SeatState.SPARE):
                    continue
                assert rank.die not in owners, f"{rank.die}: {owners.get(rank.die)} and {job.uid}"
                owners[rank.die] = job.uid
                owner = context.cluster.owner_of(rank.die)
                assert owner == job.uid, f"{rank.die} is {job.uid}'s, the cluster says {owner!r}"


def _job_is_consistent(state: State, job: Job) -> None:
    assert job.why.reason, f"job {job.uid} ({job.state}) has no reason"
    assert job.live_epoch <= job.epoch, f"job {job.uid}: live {job.live_epoch} > {job.epoch}"
    placement = state.placement(job.uid)
    assert (placement is not None) == (job.state in _PLACED), f"job {job.uid}: {job.state}"
    if is_ended(job):
        assert job.end_time > 0, f"job {job.uid} ended without a time"
    if placement is None or job.state is JobState.STOPPING:
        return
    assert placement.epoch == job.epoch, f"job {job.uid}: {placement.epoch} != {job.epoch}"
    active = [s for s in seats(job, placement) if s.placement.state is SeatState.ACTIVE]
    assert active, f"job {job.uid} runs without a rank"
    _experts_are_covered(state, job, placement)


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
        active = {rank.rank for rank in part.ranks if rank.state is SeatState.ACTIVE}
        width = expert_map.slots_per_rank
        for number, layer in enumerate(expert_map.layers):
            slots = layer.physical_to_logical
            live = [e for s, e in enumerate(slots) if e >= 0 and s // width in active]
            missing = set(range(expert_map.experts)) - set(live)
            story = f"{job.uid} {part.role}/{part.instance} epoch {job.epoch} layer {number}"
            assert not missing, f"{story}: experts without a copy: {sorted(missing)[:8]}"
            for rank in active:
                own = [e for e in slots[rank * width : (rank + 1) * width] if e >= 0]
                assert len(own) == len(set(own)), f"{story}: rank {rank} holds one expert twice"
