"""The machine's working copy of the store: records by key, staged writes, and small indexes.

In go decoded records; out come the writes of one `handle` call. Reads see staged writes at once
("assume"): if the commit fails, the shell throws the whole machine away. What ranks and front
doors say at a high rate (sequences, pool blocks) lives beside the records and is never stored.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from raddle.core.instructions import Commit, Reply, Write
from raddle.core.kvcache.index import BlockIndex
from raddle.core.kvcache.recoveries import Recoveries
from raddle.core.sizes import CommitSize
from raddle.core.waiting import WaitingJobs
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import AgentAcks, AgentHealth, AgentRegistration, RankStatus
from raddle.model.incident import Event, Incident, IncidentPhase, Maintenance
from raddle.model.job import (
    Assignment,
    AssignmentStage,
    Job,
    JobExpertMaps,
    JobState,
    Placement,
)
from raddle.model.routes import Routes, SequenceReport
from raddle.model.stats import KvRepair, RankStats
from raddle.model.topology import SuperNode
from raddle.model.types import RankKey

EVENTS_MAX = 10_000
INCIDENTS_MAX = 1_000
# Below etcd's 128 operations a transaction, with room for what one more decision adds.
WRITES_A_COMMIT_MAX = 120
# Below the 1.5 MB a transaction that etcd takes, by the estimates of `raddle.core.sizes`.
BYTES_A_COMMIT_MAX = 1_400_000
# An assignment carries its job's model and launch command: below 80 KB, see admission.
ASSIGNMENTS_A_PART = 16
# A store that was set back does not know epochs that ranks are at, as many as were decided since: a
# decision each second for a week are fewer than this. What is further ahead no leader ever decided,
# and the next epoch would have to be above it: near 2^63 there is none.
EPOCHS_AHEAD_MAX = 1_000_000
_INDEXED = (
    keys.JOBS,
    keys.INCIDENTS,
    keys.ASSIGNMENTS,
    keys.TOPOLOGY,
    keys.MAINTENANCE,
    keys.EXPERT_MAPS,
)


class State:
    """Records, staged writes and the indexes that decisions need."""

    def __init__(self, records: Mapping[str, Any]) -> None:
        self.records: dict[str, Any] = dict(sorted(records.items()))
        self._writes: dict[str, Any] = {}
        self._bytes_announced = 0
        self._replies: list[Reply] = []
        self._stimulus: dict[str, None] = {}
        #: Commits of decisions that are complete, before what is staged now.
        self._sealed: list[Commit | Reply] = []
        #: Job uids in the order of their keys, then of their arrival.
        self.job_uids: dict[str, None] = {}
        self.waiting = WaitingJobs()
        #: Keys under prefixes with few records that are asked for often.
        self._few: dict[str, dict[str, None]] = {keys.TOPOLOGY: {}, keys.MAINTENANCE: {}}
        #: acks[job_uid][node]
        self.acks: dict[str, dict[str, AgentAcks]] = {}
        #: The same by rank: statuses[job_uid][node][rank key]
        self._statuses: dict[str, dict[str, dict[RankKey, RankStatus]]] = {}
        #: Acknowledgements that are not believed, by key, with the reason.
        self.set_aside: dict[str, str] = {}
        #: sequences[job_uid][front_door_id][sequence_id]
        self.sequences: dict[str, dict[str, dict[str, SequenceReport]]] = {}
        #: Which member holds which KV block, of all jobs.
        self.index = BlockIndex()
        self.recoveries = Recoveries()
        #: Events of members that could not be read.
        self.kv_events_refused = 0
        #: Tokens of prompts that ranks found in the pool, and that they computed, by job.
        self.kv_tokens: dict[str, tuple[int, int]] = {}
        #: What pool members last said of their repair: process, epoch and where it stands.
        self.kv_repairs: dict[tuple[str, RankKey], tuple[str, int, KvRepair]] = {}
        self.idempotency: dict[tuple[str, str], str] = {}
        self._event_ids: list[str] = []
        self._incident_ids: list[str] = []
        self._open_incidents: dict[str, None] = {}
        #: Epochs whose expert maps are stored, in order, by job.
        self._map_epochs: dict[str, list[int]] = {}
        self._assigned_at: dict[str, tuple[str, ...]] = {}
        self._nodes_of: dict[str, dict[str, None]] = {}
        #: Stage and epoch that a job's assignments ask for.
        self.stages: dict[str, tuple[int, AssignmentStage]] = {}
        for key, value in self.records.items():
            self._index(key, value)
        self._next_event = _next_number(self._event_ids)
        self._next_incident = _next_number(self._incident_ids)

    def _index(self, key: str, value: Any) -> None:
        few = self._few.get(key[: key.find("/") + 1])
        if few is not None:
            few[key] = None
        if key.startswith(keys.JOBS):
            self.job_uids[value.uid] = None
            if value.state is JobState.PENDING:
                self.waiting.put(value)
            else:
                self.waiting.drop(value.uid)
            if value.idempotency_key:
                self.idempotency[value.created_by, value.idempotency_key] = value.uid
        elif key.startswith(keys.AGENTS) and isinstance(value, AgentAcks):
            self._index_acks(value)
        elif key.startswith(keys.AUDIT):
            self._event_ids.append(value.id)
        elif key.startswith(keys.INCIDENTS):
            if value.id not in self._incident_ids:
                self._incident_ids.append(value.id)
            if value.phase is IncidentPhase.CLOSED:
                self._open_incidents.pop(value.id, None)
            else:
                self._open_incidents[value.id] = None
        elif key.startswith(keys.ASSIGNMENTS):
            self._index_assignment(value)
        elif key.startswith(keys.EXPERT_MAPS):
            epochs = self._map_epochs.setdefault(value.job_uid, [])
            if value.epoch not in epochs:
                insort(epochs, value.epoch)

    def _index_acks(self, acks: AgentAcks) -> None:
        key = keys.acks(acks.node, acks.job_uid)
        why = self._disbelief(acks)
        if why:
            self._forget_acks(acks)
            self.set_aside[key] = why
            return
        self.set_aside.pop(key, None)
        self.acks.setdefault(acks.job_uid, {})[acks.node] = acks
        self._statuses.setdefault(acks.job_uid, {})[acks.node] = {
            RankKey(role=s.role, instance=s.instance, rank=s.rank): s for s in acks.ranks
        }

    def _disbelief(self, acks: AgentAcks) -> str:
        """Why this record cannot be true; empty if it can."""
        job = self.job(acks.job_uid)
        epoch = job.epoch if job is not None else 0
        newest = max((status.epoch for status in acks.ranks), default=0)
        if newest <= epoch + EPOCHS_AHEAD_MAX:
            return ""
        return f"{acks.node} acknowledges epoch {newest} of {acks.job_uid}, which is at {epoch}"

    def _forget_acks(self, acks: AgentAcks) -> None:
        for by_job in (self.acks, self._statuses):
            by_job.get(acks.job_uid, {}).pop(acks.node, None)
            if not by_job.get(acks.job_uid):
                by_job.pop(acks.job_uid, None)

    def _index_assignment(self, assignment: Assignment) -> None:
        now_here = {item.job_uid for item in assignment.jobs}
        for job_uid in self._assigned_at.get(assignment.node, ()):
            if job_uid not in now_here:
                self._nodes_of[job_uid].pop(assignment.node, None)
        self._assigned_at[assignment.node] = tuple(sorted(now_here))
        for item in assignment.jobs:
            self.stages[item.job_uid] = (item.epoch, item.stage)
            self._nodes_of.setdefault(item.job_uid, {})[assignment.node] = None

    def drop_maps(self, job_uid: str, *, but: int) -> None:
        """Stage the deletion of a job's expert maps, except those of its newest epochs."""
        epochs = self._map_epochs.get(job_uid, [])
        for epoch in epochs[: max(0, len(epochs) - but)]:
            self.delete(keys.expert_maps(job_uid, epoch))
        self._map_epochs[job_uid] = epochs[max(0, len(epochs) - but) :]
        if not but:
            self._map_epochs.pop(job_uid, None)

    def nodes_assigned(self, job_uid: str) -> list[str]:
        """Nodes whose assignment lists the job."""
        return list(self._nodes_of.get(job_uid, ()))

    # --- staged writes -------------------------------------------------------------------------

    def put(self, key: str, value: Any) -> None:
        """Stage a write of the leader; the machine sees it from now on."""
        if self.records.get(key) == value:
            return
        self.records[key] = value
        self._writes[key] = value
        if key.startswith(_INDEXED):
            self._index(key, value)

    def delete(self, key: str) -> None:
        value = self.records.pop(key, None)
        if value is None:
            return
        self._writes[key] = None
        self._few.get(key[: key.find("/") + 1], {}).pop(key, None)
        if isinstance(value, Job):
            self.job_uids.pop(value.uid, None)
            self.waiting.drop(value.uid)
            self.idempotency.pop((value.created_by, value.idempotency_key), None)

    def reply(self, reply: Reply) -> None:
        """Answer a request; sent after what is staged now has been committed."""
        self._replies.append(reply)

    def stimulus(self, name: str) -> None:
        self._stimulus[name] = None

    @property
    def staged(self) -> int:
        return len(self._writes)

    def has_room(self, size: CommitSize) -> bool:
        """Would a decision of this size fit into one commit with what is staged?"""
        return not self._writes or (
            len(self._writes) + size.writes <= WRITES_A_COMMIT_MAX
            and self._bytes_announced + size.bytes <= BYTES_A_COMMIT_MAX
        )

    def make_room(self, size: CommitSize) -> None:
        """Begin a commit of its own for a decision that does not fit beside what is staged.

        So a decision is committed whole or not at all, whatever others were taken with it.
        """
        if not self.has_room(size):
            self._seal()
        self._bytes_announced += size.bytes

    def flush(self) -> list[Commit | Reply]:
        """The commits of what was staged since the last flush, each within the store's limits."""
        self._seal()
        sealed, self._sealed = self._sealed, []
        return sealed

    def _seal(self) -> None:
        writes = [Write(key, value) for key, value in self._writes.items()]
        replies, stimulus = tuple(self._replies), tuple(self._stimulus)
        large = self._bytes_announced > BYTES_A_COMMIT_MAX
        self._writes, self._replies, self._stimulus = {}, [], {}
        self._bytes_announced = 0
        if not writes:
            self._sealed += replies
            return
        # Assignments last: an agent must find the records that its assignment speaks of.
        parts = _parts(writes, apart=large)
        self._sealed += [Commit(part) for part in parts[:-1]]
        self._sealed.append(Commit(parts[-1], replies=replies, stimulus=stimulus))

    # --- ends ----------------------------------------------------------------------------------

    def forget(self, job_uid: str) -> None:
        """Drop what is kept beside the records of a job that has ended."""
        self.index.forget(job_uid)
        self.recoveries.forget(job_uid)
        self.kv_tokens.pop(job_uid, None)
        self.kv_repairs = {key: said for key, said in self.kv_repairs.items() if key[0] != job_uid}
        self.sequences.pop(job_uid, None)
        self.stages.pop(job_uid, None)
        if not self._nodes_of.get(job_uid):
            self._nodes_of.pop(job_uid, None)

    # --- what agents write ---------------------------------------------------------------------

    def observe(self, key: str, value: Any) -> None:
        """Take over an agent's record as the store has it."""
        if value is None:
            old = self.records.pop(key, None)
            self.set_aside.pop(key, None)
            if isinstance(old, AgentAcks):
                self._forget_acks(old)
            return
        self.records[key] = value
        if isinstance(value, AgentAcks):
            self._index_acks(value)

    # --- typed reads ---------------------------------------------------------------------------

    def job(self, job_uid: str) -> Job | None:
        found: Job | None = self.records.get(keys.job(job_uid))
        return found

    def require_job(self, job_uid: str) -> Job:
        found = self.job(job_uid)
        if found is None:
            raise PermanentError(
                Reason.NOT_FOUND, f"There is no job {job_uid!r}; `raddle status` lists jobs."
            )
        return found

    def jobs(self) -> Iterator[Job]:
        for job_uid in tuple(self.job_uids):
            yield self.records[keys.job(job_uid)]

    def placement(self, job_uid: str) -> Placement | None:
        found: Placement | None = self.records.get(keys.placement(job_uid))
        return found

    def expert_maps(self, job_uid: str, epoch: int) -> JobExpertMaps | None:
        found: JobExpertMaps | None = self.records.get(keys.expert_maps(job_uid, epoch))
        return found

    def routes(self, job_uid: str) -> Routes | None:
        found: Routes | None = self.records.get(keys.routes(job_uid))
        return found

    def assignment(self, node: str) -> Assignment:
        found: Assignment | None = self.records.get(keys.assignment(node))
        return found or Assignment(node=node)

    def registration(self, node: str) -> AgentRegistration | None:
        found: AgentRegistration | None = self.records.get(keys.registration(node))
        return found

    def health(self, node: str) -> AgentHealth | None:
        found: AgentHealth | None = self.records.get(keys.health(node))
        return found

    def supernodes(self) -> list[SuperNode]:
        return [self.records[key] for key in sorted(self._few[keys.TOPOLOGY])]

    def maintenances(self) -> list[Maintenance]:
        return [self.records[key] for key in sorted(self._few[keys.MAINTENANCE])]

    def incidents(self) -> list[Incident]:
        return [self.records[keys.incident(name)] for name in self._incident_ids]

    def open_incidents(self) -> list[Incident]:
        return [self.records[keys.incident(name)] for name in self._open_incidents]

    def rank_status(self, job_uid: str, node: str, key: RankKey) -> RankStatus | None:
        return self._statuses.get(job_uid, {}).get(node, {}).get(key)

    def take_reports(self, other: State) -> None:
        """Keep what ranks and front doors said to the machine before this one, of the same term.

        They do not say it again unless the leader changes; no decision of ours is part of it.
        """
        self.sequences = other.sequences
        self.index = other.index
        self.recoveries = other.recoveries
        self.kv_events_refused = other.kv_events_refused
        self.kv_tokens = other.kv_tokens
        self.kv_repairs = other.kv_repairs

    def count_kv(self, job_uid: str, report: RankStats) -> None:
        """Add what a rank restored and computed."""
        if report.kv_tokens_restored or report.kv_tokens_recomputed:
            restored, computed = self.kv_tokens.get(job_uid, (0, 0))
            self.kv_tokens[job_uid] = (
                restored + report.kv_tokens_restored,
                computed + report.kv_tokens_recomputed,
            )

    def all_sequences(self, job_uid: str) -> list[SequenceReport]:
        doors = self.sequences.get(job_uid, {})
        return [door[name] for _, door in sorted(doors.items()) for name in sorted(door)]

    # --- history -------------------------------------------------------------------------------

    def new_incident_id(self) -> str:
        name = f"i-{self._next_incident:06d}"
        self._next_incident += 1
        if len(self._incident_ids) > INCIDENTS_MAX:
            self._drop_oldest_incident()
        return name

    def _drop_oldest_incident(self) -> None:
        for name in self._incident_ids:
            record = self.records.get(keys.incident(name))
            if record is not None and record.phase is IncidentPhase.CLOSED:
                self.delete(keys.incident(name))
                self._incident_ids.remove(name)
                return

    def record(self, event: Event) -> None:
        """Append one line of history under the next number; the oldest beyond the limit goes."""
        name = f"e-{self._next_event:09d}"
        self._next_event += 1
        self._event_ids.append(name)
        self.put(keys.event(name), replace(event, id=name))
        if len(self._event_ids) > EVENTS_MAX:
            self.delete(keys.event(self._event_ids.pop(0)))


def _parts(writes: list[Write], *, apart: bool) -> list[tuple[Write, ...]]:
    """Within the store's number of writes; with `apart`, assignments in small parts of their own.

    A leader that dies between two parts leaves assignments of an older epoch, or none, and the
    next one writes them anew.
    """
    assignments = [w for w in writes if w.key.startswith(keys.ASSIGNMENTS)]
    others = [w for w in writes if not w.key.startswith(keys.ASSIGNMENTS)]
    lists = [others, assignments] if apart else [[*others, *assignments]]
    size = ASSIGNMENTS_A_PART if apart else WRITES_A_COMMIT_MAX
    return [
        tuple(part[start : start + size]) for part in lists for start in range(0, len(part), size)
    ]


def _next_number(names: list[str]) -> int:
    return max((int(name.rsplit("-", 1)[1]) for name in names), default=0) + 1
