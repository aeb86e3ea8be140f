"""What must hold of the store's history, whoever wrote it; and faults of the store itself."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

from raddle.model import keys
from raddle.model.errors import PermanentError
from raddle.model.incident import Incident, Maintenance
from raddle.model.job import Assignment, Job, JobExpertMaps, JobState, Placement
from raddle.model.routes import Routes, RouteState
from raddle.model.types import ExpertMap
from raddle.sim.findings import Findings
from raddle.sim.ranks import Hosts
from raddle.store.memory import MemoryBackend
from raddle.store.protocol import Change, Changes, CommitResult, Delete, Record, Transaction
from raddle.wire import records as codec

ENDED = (JobState.CANCELLED, JobState.FAILED)
_FREE = (keys.AGENTS, keys.LEADER, keys.OPERATIONS)
# States of the past that a store can be restored to.
_SNAPSHOTS_MAX = 400
# No record begins with a field of this kind.
GARBAGE = b"\xff\xff\xff\xff"


class CheckedBackend(MemoryBackend):
    """A store that asserts, at every commit, one fenced writer and epochs that only grow.

    And at every publication that all living ranks are repaired at that epoch, know each other and
    hold the experts that the map gives them.
    """

    def __init__(self, findings: Findings, hosts: Hosts) -> None:
        super().__init__()
        self._findings = findings
        self._hosts = hosts
        self._epochs: dict[tuple[str, str], int] = {}
        self._jobs: dict[str, JobState] = {}
        self._ttls: dict[int, float] = {}
        #: What each record was when it was last decoded: it is asked for often.
        self._read: dict[str, tuple[Record, Any]] = {}
        self._past: deque[tuple[int, dict[str, Record]]] = deque(maxlen=_SNAPSHOTS_MAX)
        self.is_away = False
        self.commits = 0

    # --- checks --------------------------------------------------------------------------------

    def commit(self, transaction: Transaction) -> CommitResult:
        leader = self.records.get(keys.LEADER)
        before = self.revision
        result = super().commit(transaction)
        if not result.succeeded:
            return result
        self.commits += 1
        require = self._findings.require
        fences = [c.mod_revision for c in transaction.compares if c.key == keys.LEADER]
        for write in transaction.writes:
            if not write.key.startswith(_FREE):
                fenced = leader is not None and fences == [leader.mod_revision]
                require(fenced, f"{write.key} was written without the leader's fence")
            if isinstance(write, Delete) and write.key.startswith(keys.JOBS):
                require(self._jobs.get(write.key) in ENDED, f"{write.key} was lost")
        for change in self.history[-1].changes if self.revision > before else ():
            self._look(change)
        return result

    def _look(self, change: Change) -> None:
        data = change.record.value if change.record is not None else b""
        digest = hashlib.sha256(data).hexdigest()[:12] if data else "-"
        self._findings.say(f"{self.revision} {change.key} {digest}")
        if change.record is None:
            return
        value = self._decoded(change.record)
        match value:
            case Job() | Placement():
                self._grows(change.key, "", value.epoch)
            case Routes():
                self._grows(change.key, "", value.epoch)
                if value.state is RouteState.LIVE:
                    self._published(value)
            case Assignment():
                for item in value.jobs:
                    self._grows(change.key, item.job_uid, item.epoch)
            case _:
                pass
        if isinstance(value, Job):
            self._jobs[change.key] = value.state

    def _grows(self, key: str, part: str, epoch: int) -> None:
        old = self._epochs.get((key, part), 0)
        self._findings.require(epoch >= old, f"{key} {part}: epoch {epoch} after {old}")
        self._epochs[key, part] = epoch

    def _published(self, routes: Routes) -> None:
        story = f"{routes.job_uid} goes live at epoch {routes.epoch}, but"
        require = self._findings.require
        maps = self._maps(routes)
        names = {member.incarnation for member in routes.members}
        for member in routes.members:
            require(
                member.incarnation and member.engine_address,
                f"{story} {member.rank} has no address",
            )
            rank = self._hosts.living(member.incarnation)
            if rank is None:
                continue
            require(
                rank.is_repaired and rank.epoch == routes.epoch,
                f"{story} {rank.incarnation} is {rank.stage} at epoch {rank.epoch}",
            )
            known = {other.incarnation for other in rank.members}
            require(known == names, f"{story} {rank.incarnation} knows {sorted(known ^ names)}")
            expert_map = maps.get((member.rank.role, member.rank.instance))
            missing = rank.wanted(expert_map) - rank.held if expert_map is not None else ()
            require(not missing, f"{story} {rank.incarnation} lacks experts {sorted(missing)[:4]}")

    def _maps(self, routes: Routes) -> dict[tuple[str, int], ExpertMap]:
        record = self.records.get(keys.expert_maps(routes.job_uid, routes.epoch))
        value = self._decoded(record) if record is not None else None
        parts = value.instances if isinstance(value, JobExpertMaps) else ()
        return {(part.role, part.instance): part.expert_map for part in parts}

    # --- reads ---------------------------------------------------------------------------------

    def _decoded(self, record: Record) -> Any:
        """None for a record that cannot be read."""
        known = self._read.get(record.key)
        if known is None or known[0] is not record:
            try:
                value = codec.decode(record.key, record.value)
            except PermanentError:
                value = None
            self._read[record.key] = known = (record, value)
        return known[1]

    def value(self, key: str) -> Any:
        record = self.records.get(key)
        return self._decoded(record) if record is not None else None

    def values(self, prefix: str) -> list[Any]:
        """Decoded records under a prefix, without those that cannot be read."""
        found = [self._decoded(record) for record in self.read(prefix).records]
        return [value for value in found if value is not None]

    def jobs(self) -> list[Job]:
        return self.values(keys.JOBS)

    def incidents(self) -> list[Incident]:
        return self.values(keys.INCIDENTS)

    def maintenances(self) -> list[Maintenance]:
        return self.values(keys.MAINTENANCE)

    # --- faults --------------------------------------------------------------------------------

    def corrupt(self, key: str) -> bytes:
        """A record's bytes rot; gives what they were."""
        old = self.records[key]
        self.overwrite(key, GARBAGE)
        return old.value

    def overwrite(self, key: str, data: bytes | None) -> None:
        """Write past every rule, as a bad disk or an operator's hand does; None deletes."""
        old = self.records.pop(key)
        revision = self.revision + 1
        record = None
        if data is not None:
            record = Record(key, data, revision, old.create_revision, old.lease_id)
            self.records[key] = record
        self._append(Changes(revision, (Change(key, record, revision),), self.term))

    def _append(self, changes: Changes) -> None:
        super()._append(changes)
        self._past.append((self.revision, dict(self.records)))

    def forget_past(self) -> None:
        """No state of before now is ever restored."""
        self._past.clear()
        self._past.append((self.revision, dict(self.records)))

    def set_back(self, changes: int) -> int:
        """Restore the state of so many changes ago, or the oldest; gives how many are forgotten.

        What was under a lease that has ended since stays gone. Epochs in the store go back too.
        """
        was = self.revision
        revision, records = self._past[max(0, len(self._past) - 1 - changes)]
        alive = {0, *self.leases}
        self.records = {key: r for key, r in records.items() if r.lease_id in alive}
        self.revision = self.compact_revision = revision
        self.history.clear()
        self.forget_past()
        self._epochs.clear()
        jobs = {keys.job(job.uid): job.state for job in self.jobs()}
        self._jobs.clear()
        self._jobs.update(jobs)
        for wake in tuple(self._changed):
            wake()
        return was - revision

    def _end_after(self, lease_id: int, ttl_s: float) -> None:
        self._ttls[lease_id] = ttl_s
        super()._end_after(lease_id, ttl_s)

    def go_away(self) -> None:
        """No quorum: whoever cuts the clients off calls this too. No lease ends meanwhile."""
        self.is_away = True
        for timer in self.leases.values():
            timer.cancel()

    def come_back(self) -> None:
        """A new leader of the store gives every lease its whole time again."""
        if not self.is_away:
            return
        self.is_away = False
        self.term += 1
        for lease_id in list(self.leases):
            self._end_after(lease_id, self._ttls[lease_id])
