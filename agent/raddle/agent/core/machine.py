"""What one node's agent does with its ranks: events in, instructions out.

In go the node's assignment and what became of ranks and commands; out come ranks to start, to
stop, to drive, and the acknowledgements to write. Pure: no IO, clock or randomness; the simulator
runs this same machine. Work is never ended because the store is away: only an assignment that no
longer lists it ends a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatchmethod
from typing import Any

from raddle.agent.core.events import (
    AcksFound,
    AssignmentChanged,
    Drive,
    DriveFailed,
    Driven,
    Event,
    Instruction,
    PeerSuspected,
    RankExited,
    RankSilent,
    RankStarted,
    StartFailed,
    StartRank,
    StopRank,
    WriteAcks,
)
from raddle.model.health import (
    EXIT_CODE_UNKNOWN,
    AgentAcks,
    PeerSuspicion,
    RankStage,
    RankStatus,
)
from raddle.model.job import Assignment, AssignmentStage, JobAssignment, RankAssignment
from raddle.model.types import RankKey

ATTEMPTS_MAX = 20
SUSPICIONS_MAX = 64
_ORDER = [RankStage.UNSPECIFIED, RankStage.STARTED, RankStage.FENCED, RankStage.REPAIRED]
_ORDER += [RankStage.LIVE]
_GOAL = {
    AssignmentStage.START: RankStage.FENCED,
    AssignmentStage.PREPARE: RankStage.REPAIRED,
    AssignmentStage.LIVE: RankStage.LIVE,
}
Slot = tuple[str, RankKey]
#: Epoch, the term in which it was decided, and the stage to reach.
Target = tuple[int, int, AssignmentStage]


@dataclass(slots=True)
class Rank:
    """One rank process (or its remains) as the agent knows it."""

    start_count: int
    status: RankStatus
    #: What it is being driven to, or None.
    driving: Target | None = None
    #: What it was last driven to, and how often that failed.
    target: Target | None = None
    attempts: int = 0
    suspicions: list[PeerSuspicion] = field(default_factory=list)
    #: Its process has ended, or never was. A rank that failed may still have one.
    is_gone: bool = False

    @property
    def is_up(self) -> bool:
        return self.status.stage in _ORDER[1:]

    @property
    def is_over(self) -> bool:
        return self.status.stage in (RankStage.EXITED, RankStage.FAILED)

    def term_of(self, epoch: int) -> int:
        """In which term the epoch was decided to which it was driven; 0 if it was to another."""
        return self.target[1] if self.target is not None and self.target[0] == epoch else 0

    def is_driven_to(self, epoch: int, stage: RankStage) -> bool:
        """Is this the last word of the command under way, not of an older one?"""
        return self.driving is not None and (epoch, stage) == (
            self.driving[0],
            _GOAL[self.driving[2]],
        )


class AgentMachine:
    """Ranks of one node against its newest assignment."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.assignment: Assignment | None = None
        self.ranks: dict[Slot, Rank] = {}
        #: Processes that were told to end and have not yet, by (slot, start_count): their dies.
        self.ending: dict[tuple[Slot, int], str] = {}
        self._dirty: dict[str, None] = {}
        #: Processes in whose place another one is known, to be told to end: their dies.
        self._strays: dict[tuple[Slot, int], str] = {}

    def handle(self, events: Sequence[Event]) -> list[Instruction]:
        """Take in all events, then say what is to be done."""
        out: list[Instruction] = []
        for event in events:
            self._take(event)
        if self.assignment is not None:
            out += self._stop_strays()
            out += self._reconcile(self.assignment)
        out += self._acks()
        return out

    def validate(self) -> None:
        """Assert that what is known of ranks is consistent."""
        for (job_uid, key), rank in self.ranks.items():
            assert rank.status.start_count == rank.start_count, (job_uid, key, rank)
            if rank.is_over:
                assert rank.driving is None, (job_uid, key, rank)

    # --- taking in -----------------------------------------------------------------------------

    @singledispatchmethod
    def _take(self, event: Any) -> None:
        raise TypeError(f"no agent takes {event!r}")

    @_take.register
    def _(self, event: AssignmentChanged) -> None:
        self.assignment = event.assignment

    @_take.register
    def _(self, event: RankStarted) -> None:
        slot = (event.job_uid, event.key)
        if (slot, event.start_count) in self.ending:
            return
        known = self.ranks.get(slot)
        if known is not None and known.start_count > event.start_count:
            self._strays[slot, event.start_count] = event.die
            return
        if known is not None and known.start_count < event.start_count and not known.is_gone:
            self._strays[slot, known.start_count] = known.status.die
        status = RankStatus(
            role=event.key.role,
            instance=event.key.instance,
            rank=event.key.rank,
            die=event.die,
            incarnation=event.incarnation,
            engine_address=event.engine_address,
            data_address=event.data_address,
            epoch=event.epoch,
            stage=RankStage.STARTED,
            start_count=event.start_count,
            epoch_term=self._term_of(event),
        )
        self.ranks[slot] = Rank(event.start_count, status)
        self._dirty[event.job_uid] = None

    def _term_of(self, event: RankStarted) -> int:
        """In which term the epoch was decided that a new process came up in; 0 if none knows."""
        jobs = self.assignment.jobs if self.assignment is not None else ()
        started = (event.job_uid, event.epoch)
        return next((j.epoch_term for j in jobs if (j.job_uid, j.epoch) == started), 0)

    @_take.register
    def _(self, event: StartFailed) -> None:
        self._over(event.job_uid, event.key, event.start_count, RankStage.FAILED, 0, event.message)

    @_take.register
    def _(self, event: RankExited) -> None:
        stage, code, message = RankStage.EXITED, event.exit_code, event.message
        self._over(event.job_uid, event.key, event.start_count, stage, code, message)

    def _over(
        self,
        job_uid: str,
        key: RankKey,
        start_count: int,
        stage: RankStage,
        exit_code: int,
        message: str,
    ) -> None:
        slot = (job_uid, key)
        self.ending.pop((slot, start_count), None)
        self._strays.pop((slot, start_count), None)
        self._dirty[job_uid] = None
        rank = self.ranks.get(slot)
        if rank is None or rank.start_count != start_count:
            return
        rank.driving = None
        rank.is_gone = True
        rank.status = replace(rank.status, stage=stage, exit_code=exit_code, message=message)

    @_take.register
    def _(self, event: Driven) -> None:
        rank = self._running(event.job_uid, event.key, event.start_count)
        if rank is None:
            return
        if event.last and rank.is_driven_to(event.epoch, event.stage):
            rank.driving = None
        newer = (event.epoch, _ORDER.index(event.stage))
        if newer <= (rank.status.epoch, _ORDER.index(rank.status.stage)):
            return
        rank.status = replace(
            rank.status,
            epoch=event.epoch,
            epoch_term=rank.term_of(event.epoch),
            stage=event.stage,
            experts_loaded=rank.status.experts_loaded + event.experts_loaded,
            kv_tokens_restored=rank.status.kv_tokens_restored + event.kv_tokens_restored,
        )
        rank.suspicions = [s for s in rank.suspicions if s.epoch >= event.epoch]
        rank.attempts = 0
        self._dirty[event.job_uid] = None

    @_take.register
    def _(self, event: DriveFailed) -> None:
        rank = self._running(event.job_uid, event.key, event.start_count)
        if rank is None or rank.driving is None or rank.driving[0] != event.epoch:
            return
        rank.driving = None
        rank.attempts += 1
        if event.final or rank.attempts >= ATTEMPTS_MAX:
            rank.status = replace(rank.status, stage=RankStage.FAILED, message=event.message)
            self._dirty[event.job_uid] = None

    @_take.register
    def _(self, event: PeerSuspected) -> None:
        rank = self._running(event.job_uid, event.key, event.start_count)
        if rank is None or event.suspicion in rank.suspicions:
            return
        rank.suspicions = [*rank.suspicions, event.suspicion][-SUSPICIONS_MAX:]
        self._dirty[event.job_uid] = None

    @_take.register
    def _(self, event: RankSilent) -> None:
        """While it is driven, what drives it says whether it hangs."""
        rank = self._running(event.job_uid, event.key, event.start_count)
        if rank is None or rank.driving is not None:
            return
        rank.status = replace(rank.status, stage=RankStage.FAILED, message=event.message)
        self._dirty[event.job_uid] = None

    def _running(self, job_uid: str, key: RankKey, start_count: int) -> Rank | None:
        rank = self.ranks.get((job_uid, key))
        return rank if rank and rank.start_count == start_count and rank.is_up else None

    @_take.register
    def _(self, event: AcksFound) -> None:
        known = (slot[0] for slot in (*self.ranks, *(slot for slot, _ in self.ending)))
        self._dirty.update(dict.fromkeys((*event.job_uids, *known)))

    # --- deciding ------------------------------------------------------------------------------

    def _reconcile(self, assignment: Assignment) -> list[Instruction]:
        out: list[Instruction] = []
        wanted: dict[Slot, tuple[JobAssignment, RankAssignment]] = {}
        for job in assignment.jobs:
            for rank in job.ranks:
                wanted[job.job_uid, rank.rank] = (job, rank)
        for slot in list(self.ranks):
            have = self.ranks[slot]
            if slot not in wanted or wanted[slot][1].start_count != have.start_count:
                out += self._end(slot, have)
        for slot, (job, want) in wanted.items():
            known = self.ranks.get(slot)
            if known is None and not self._is_occupied(want.die):
                out += self._begin(job, want)
            elif known is None:
                # Looked at again when the process on the die has ended.
                continue
            elif known.is_up:
                out += self._drive(known, job, want)
        return out

    def _is_occupied(self, die: str) -> bool:
        """Is a process on the die, perhaps one that is ending? The next one waits for its end."""
        if not die:
            return False
        return die in self.ending.values() or any(
            rank.status.die == die and not rank.is_gone for rank in self.ranks.values()
        )

    def _stop_strays(self) -> list[Instruction]:
        strays, self._strays = self._strays, {}
        self.ending.update(strays)
        return [StopRank(slot[0], slot[1], start_count) for slot, start_count in strays]

    def _end(self, slot: Slot, rank: Rank) -> list[Instruction]:
        del self.ranks[slot]
        self._dirty[slot[0]] = None
        if rank.is_gone:
            return []
        self.ending[slot, rank.start_count] = rank.status.die
        return [StopRank(slot[0], slot[1], rank.start_count)]

    def _begin(self, job: JobAssignment, want: RankAssignment) -> list[Instruction]:
        """Start the rank; a place is kept for it until it is up or failed.

        Only a rank of this very epoch may be started. One that should have run before and was not
        found (it ended while no agent watched) is told as ended: a fresh process in its place
        would hold neither its experts nor its sequences.
        """
        status = RankStatus(
            role=want.rank.role,
            instance=want.rank.instance,
            rank=want.rank.rank,
            die=want.die,
            start_count=want.start_count,
        )
        known = self.ranks[job.job_uid, want.rank] = Rank(want.start_count, status)
        if job.stage is AssignmentStage.START and want.start_count == job.epoch:
            return [StartRank(job, want)]
        message = "the process was gone when the agent came back"
        known.status = replace(
            status, stage=RankStage.EXITED, exit_code=EXIT_CODE_UNKNOWN, message=message
        )
        known.is_gone = True
        self._dirty[job.job_uid] = None
        return []

    def _drive(self, rank: Rank, job: JobAssignment, want: RankAssignment) -> list[Instruction]:
        goal = _GOAL.get(job.stage)
        if goal is None:
            # A stage of a newer scheduler: nothing that this agent could do.
            return []
        if job.stage is AssignmentStage.START and rank.start_count == job.epoch:
            # A process of this very epoch has nothing to be fenced from.
            goal = RankStage.STARTED
        if rank.status.is_of_another_decision(job.epoch, job.epoch_term):
            # The leader hears of it, and goes above both.
            return []
        reached = (rank.status.epoch, _ORDER.index(rank.status.stage))
        target = (job.epoch, job.epoch_term, job.stage)
        if reached >= (job.epoch, _ORDER.index(goal)) or rank.driving == target:
            return []
        if rank.target != target:
            rank.attempts = 0
        rank.driving = rank.target = target
        return [Drive(job, want, rank.status, rank.attempts)]

    # --- telling -------------------------------------------------------------------------------

    def _acks(self) -> list[Instruction]:
        dirty, self._dirty = list(self._dirty), {}
        return [WriteAcks(job_uid, self._acks_of(job_uid)) for job_uid in dirty]

    def _acks_of(self, job_uid: str) -> AgentAcks | None:
        """None once nothing of the job is left here: the record goes."""
        mine = sorted(
            ((slot[1], rank) for slot, rank in self.ranks.items() if slot[0] == job_uid),
            key=lambda item: (item[0].role, item[0].instance, item[0].rank),
        )
        ending = any(slot[0] == job_uid for slot, _ in self.ending)
        if not mine and not ending:
            return None
        told = [
            replace(rank.status, suspicions=tuple(rank.suspicions))
            for _, rank in mine
            if rank.status.stage is not RankStage.UNSPECIFIED
        ]
        return AgentAcks(node=self.node, job_uid=job_uid, ranks=tuple(told))
