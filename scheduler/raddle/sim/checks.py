"""What must hold of the store's history, whoever wrote it, and at rest after the faults."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

from raddle.model import keys
from raddle.model.incident import Incident, IncidentPhase
from raddle.model.job import Job, JobState, Placement
from raddle.model.kinds import SeatState
from raddle.model.types import RankKey
from raddle.sim.ranks import Hosts
from raddle.store.memory import MemoryBackend
from raddle.store.protocol import Change, CommitResult, Delete, Transaction
from raddle.wire import records as codec

_FREE = (keys.AGENTS, keys.LEADER, keys.OPERATIONS)


class CheckedBackend(MemoryBackend):
    """A store that asserts, at every commit, one fenced writer and epochs that only grow."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say
        self._epochs: dict[str, int] = {}
        self._jobs: dict[str, JobState] = {}
        self.commits = 0

    def commit(self, transaction: Transaction) -> CommitResult:
        leader = self.records.get(keys.LEADER)
        result = super().commit(transaction)
        if not result.succeeded:
            return result
        self.commits += 1
        fences = [c.mod_revision for c in transaction.compares if c.key == keys.LEADER]
        for write in transaction.writes:
            if not write.key.startswith(_FREE):
                fenced = leader is not None and fences == [leader.mod_revision]
                assert fenced, f"{write.key} was written without the leader's fence"
            if isinstance(write, Delete) and write.key.startswith(keys.JOBS):
                ended = self._jobs.get(write.key) in (JobState.CANCELLED, JobState.FAILED)
                assert ended, f"{write.key} was lost"
        for change in self.history[-1].changes if transaction.writes else ():
            self._look(change)
        return result

    def _look(self, change: Change) -> None:
        if change.record is None:
            self._tell(change.key, b"")
            return
        self._tell(change.key, change.record.value)
        if change.key.startswith((keys.JOBS, keys.PLACEMENTS, keys.ROUTES)):
            value = codec.decode(change.key, change.record.value)
            old = self._epochs.get(change.key, 0)
            assert value.epoch >= old, f"{change.key}: epoch {value.epoch} after {old}"
            self._epochs[change.key] = value.epoch
            if isinstance(value, Job):
                self._jobs[change.key] = value.state

    def _tell(self, key: str, value: bytes) -> None:
        now = asyncio.get_running_loop().time()
        digest = hashlib.sha256(value).hexdigest()[:12] if value else "-"
        self._say(f"{now:.6f} {self.revision} {key} {digest}")

    def values(self, prefix: str) -> list[object]:
        """Decoded records under a prefix."""
        return [codec.decode(r.key, r.value) for r in self.read(prefix).records]

    def jobs(self) -> list[Job]:
        return [value for value in self.values(keys.JOBS) if isinstance(value, Job)]

    def incidents(self) -> list[Incident]:
        return [value for value in self.values(keys.INCIDENTS) if isinstance(value, Incident)]


def not_at_rest(backend: CheckedBackend, hosts: Hosts) -> list[str]:
    """What has not converged yet, as sentences; empty once everything has."""
    found = [
        f"incident {incident.id} is {incident.phase}: {incident.why.message}"
        for incident in backend.incidents()
        if incident.phase is not IncidentPhase.CLOSED
    ]
    seats = set()
    for job in backend.jobs():
        if job.state in (JobState.CANCELLED, JobState.FAILED):
            continue
        if job.state is not JobState.READY or job.live_epoch != job.epoch:
            why = f"{job.why.reason}: {job.why.message}"
            found.append(f"job {job.uid} is {job.state} at epoch {job.epoch}: {why}")
        record = backend.records.get(keys.placement(job.uid))
        if record is not None:
            seats |= _seats(job, codec.decode(record.key, record.value))
    processes = {(r.job_uid, r.key, r.start_count, r.node, r.epoch) for r in hosts.all()}
    found += [f"no process for {seat}" for seat in sorted(seats - processes, key=str)]
    found += [f"a process that nobody wants: {p}" for p in sorted(processes - seats, key=str)]
    return found


def _seats(job: Job, placement: Placement) -> set[tuple[object, ...]]:
    found: set[tuple[object, ...]] = set()
    for part in placement.instances:
        for rank in part.ranks:
            if rank.state is SeatState.ACTIVE:
                key = RankKey(role=part.role, instance=part.instance, rank=rank.rank)
                found.add((job.uid, key, rank.start_count, rank.node, job.epoch))
    return found
