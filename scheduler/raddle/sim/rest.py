"""What must hold at rest: after the faults stopped, everything has converged and nothing leaked."""

from __future__ import annotations

from collections.abc import Iterator

from raddle.core.machine import Machine
from raddle.core.placement.gang import PlacedJob, place_job
from raddle.model import keys
from raddle.model.health import RankStage
from raddle.model.incident import IncidentPhase, MaintenanceState
from raddle.model.job import Job, JobState, Placement
from raddle.model.kinds import SeatState
from raddle.model.types import RankKey
from raddle.sim.checks import ENDED, CheckedBackend
from raddle.sim.ranks import Hosts

# The running epoch's and the one before.
_MAPS_A_JOB_MAX = 2
_OF_A_JOB = (keys.PLACEMENTS, keys.ROUTES, keys.EXPERT_MAPS, keys.AGENTS)


def not_at_rest(backend: CheckedBackend, hosts: Hosts, machine: Machine | None) -> list[str]:
    """What has not converged yet, as sentences; empty once everything has.

    `machine` is the one of the scheduler that leads.
    """
    if machine is None:
        return ["no scheduler leads"]
    found = [
        f"incident {incident.id} is {incident.phase}: {incident.why.message}"
        for incident in backend.incidents()
        if incident.phase is not IncidentPhase.CLOSED
    ]
    found += [
        f"maintenance {maintenance.id} goes on: {maintenance.why.message}"
        for maintenance in backend.maintenances()
        if maintenance.state is MaintenanceState.DRAINING
    ]
    seats: set[tuple[object, ...]] = set()
    dies: dict[str, str] = {}
    for job in backend.jobs():
        placement = backend.value(keys.placement(job.uid))
        found += _job(job, machine)
        if placement is not None:
            seats |= set(_seats(job, placement))
            dies |= _dies(placement)
    processes = {(r.job_uid, r.key, r.start_count, r.node, r.epoch) for r in hosts.all()}
    found += [f"no process for {seat}" for seat in sorted(seats - processes, key=str)]
    found += [f"a process that nobody wants: {p}" for p in sorted(processes - seats, key=str)]
    return [*found, *_ranks(hosts), *_left_over(backend), *_leaked(machine, dies)]


def _job(job: Job, machine: Machine) -> Iterator[str]:
    why = f"{job.why.reason}: {job.why.message}"
    if job.state in ENDED:
        return
    if job.state is JobState.PENDING:
        if isinstance(place_job(job.spec, machine.context.cluster), PlacedJob):
            yield f"job {job.uid} fits and waits: {why}"
    elif job.state is not JobState.READY or job.live_epoch != job.epoch:
        yield f"job {job.uid} is {job.state} at epoch {job.epoch}: {why}"


def _seats(job: Job, placement: Placement) -> Iterator[tuple[object, ...]]:
    for part in placement.instances:
        for rank in part.ranks:
            if rank.state is SeatState.ACTIVE:
                key = RankKey(role=part.role, instance=part.instance, rank=rank.rank)
                yield (job.uid, key, rank.start_count, rank.node, job.epoch)


def _dies(placement: Placement) -> dict[str, str]:
    return {
        rank.die: placement.job_uid
        for part in placement.instances
        for rank in part.ranks
        if rank.die and rank.state in (SeatState.ACTIVE, SeatState.SPARE)
    }


def _ranks(hosts: Hosts) -> Iterator[str]:
    for rank in hosts.all():
        if rank.stage is not RankStage.LIVE:
            yield f"rank {rank.incarnation} is {rank.stage} at epoch {rank.epoch}"
        for peer in rank.peers():
            if hosts.at(peer.engine_address) is None:
                yield f"rank {rank.incarnation} does not reach {peer.incarnation or peer.rank}"


def _left_over(backend: CheckedBackend) -> Iterator[str]:
    """Records of jobs that ended or are gone, and those that nobody can read."""
    running = {job.uid for job in backend.jobs() if job.state not in ENDED}
    for key in sorted(backend.records):
        parts = key.split("/")
        if key.startswith(keys.AGENTS) and "acks" not in parts:
            continue
        uid = parts[-1] if not key.startswith(keys.EXPERT_MAPS) else parts[1]
        if key.startswith(_OF_A_JOB) and uid not in running:
            yield f"{key} is left of a job that ended"
    for assignment in backend.values(keys.ASSIGNMENTS):
        for item in assignment.jobs:
            if item.job_uid not in running:
                yield f"{assignment.node} still has an assignment of {item.job_uid}"
    maps = [key.split("/") for key in backend.records if key.startswith(keys.EXPERT_MAPS)]
    for uid in sorted(running):
        mine = [epoch for _, owner, epoch in maps if owner == uid]
        if len(mine) > _MAPS_A_JOB_MAX:
            yield f"job {uid} has expert maps of epochs {mine}"


def _leaked(machine: Machine, dies: dict[str, str]) -> Iterator[str]:
    """Dies in use are the dies of running jobs, no more and no less."""
    cluster = machine.context.cluster
    for die in cluster.positions:
        owner = cluster.owner_of(die)
        if owner != dies.get(die):
            yield f"{die} is {owner}'s in the leader's mind, {dies.get(die)}'s in the store"
