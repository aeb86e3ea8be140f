"""One node's agent: events in, exact instructions out, `validate()` after each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from raddle.agent.core.faults import OCCURRENCES_KEPT, FaultLog
from raddle.agent.core.machine import ATTEMPTS_MAX, SUSPICIONS_MAX, AgentMachine
from raddle.model.health import (
    ActiveFault,
    AgentAcks,
    AgentHealth,
    FaultLevel,
    PeerSuspicion,
    RankStage,
    RankStatus,
)
from raddle.model.job import Assignment, AssignmentStage, JobAssignment, RankAssignment
from raddle.model.kinds import RoleKind
from raddle.model.types import RankKey

NODE = "sn0/n07"
JOB = "job-a"
START, PREPARE, LIVE = AssignmentStage.START, AssignmentStage.PREPARE, AssignmentStage.LIVE
STARTED, FENCED, REPAIRED = RankStage.STARTED, RankStage.FENCED, RankStage.REPAIRED
SERVES, EXITED, FAILED = RankStage.LIVE, RankStage.EXITED, RankStage.FAILED


class Agent:
    """A machine whose every step is validated; called with events, it answers instructions."""

    def __init__(self) -> None:
        self.machine = AgentMachine(NODE)

    def __call__(self, *events: Event) -> list[Instruction]:
        out = self.machine.handle(events)
        self.machine.validate()
        return out


@pytest.fixture
def agent() -> Agent:
    return Agent()


def key(rank: int = 0) -> RankKey:
    return RankKey(role="decode", instance=0, rank=rank)


def die(rank: int) -> str:
    return f"{NODE}/npu{rank}/die0"


def want(rank: int = 0, start: int = 1) -> RankAssignment:
    return RankAssignment(rank=key(rank), kind=RoleKind.DECODE, die=die(rank), start_count=start)


def job(
    *ranks: RankAssignment, epoch: int = 1, stage: AssignmentStage = START, uid: str = JOB
) -> JobAssignment:
    return JobAssignment(job_uid=uid, epoch=epoch, stage=stage, ranks=ranks or (want(),))


def assigned(*jobs: JobAssignment) -> AssignmentChanged:
    return AssignmentChanged(Assignment(node=NODE, jobs=jobs))


def started(rank: int = 0, start: int = 1, *, epoch: int = 0, uid: str = JOB) -> RankStarted:
    """A process is up; a fresh one is at the epoch that it was started at."""
    words = (f"incarnation-{rank}-{start}", f"engine-{rank}", f"data-{rank}")
    return RankStarted(uid, key(rank), start, die(rank), *words, epoch or start)


def exited(rank: int = 0, start: int = 1, code: int = 0) -> RankExited:
    return RankExited(JOB, key(rank), start, code, "gone")


def driven(
    epoch: int, stage: RankStage, *, last: bool = True, start: int = 1, experts: int = 0
) -> Driven:
    return Driven(JOB, key(), start, epoch, stage, last=last, experts_loaded=experts)


def failed(*, final: bool = False, start: int = 1, epoch: int = 1) -> DriveFailed:
    return DriveFailed(JOB, key(), start, epoch, "no answer", final=final)


def suspicion(peer: int, epoch: int = 1) -> PeerSuspicion:
    return PeerSuspicion(role="decode", rank=peer, incarnation=f"peer-{peer}", epoch=epoch)


def suspected(peer: int, epoch: int = 1, *, start: int = 1) -> PeerSuspected:
    return PeerSuspected(JOB, key(), start, suspicion(peer, epoch))


def silent(start: int = 1) -> RankSilent:
    return RankSilent(JOB, key(), start, "no answer")


def status(
    rank: int = 0, start: int = 1, *, epoch: int = 0, stage: RankStage = STARTED, **more: Any
) -> RankStatus:
    """What is told of a process that said where it listens."""
    return RankStatus(
        role="decode",
        rank=rank,
        die=die(rank),
        incarnation=f"incarnation-{rank}-{start}",
        engine_address=f"engine-{rank}",
        data_address=f"data-{rank}",
        epoch=epoch or start,
        stage=stage,
        start_count=start,
        **more,
    )


def never_up(stage: RankStage, message: str, code: int = 0) -> RankStatus:
    """What is told of a rank whose process never said where it listens."""
    return RankStatus(
        role="decode", die=die(0), stage=stage, exit_code=code, message=message, start_count=1
    )


def acks(*ranks: RankStatus, uid: str = JOB) -> WriteAcks:
    return WriteAcks(uid, AgentAcks(node=NODE, job_uid=uid, ranks=ranks))


def stop(rank: int = 0, start: int = 1) -> StopRank:
    return StopRank(JOB, key(rank), start)


# --- processes ---------------------------------------------------------------------------------


def test_assigned_ranks_are_started_once(agent: Agent) -> None:
    """Every assigned rank is started, and not again while it comes up or is up."""
    both = job(want(0), want(1))
    assert agent(assigned(both)) == [StartRank(both, want(0)), StartRank(both, want(1))]
    assert agent(assigned(both)) == []
    assert agent(started(0)) == [acks(status(0))]
    assert agent(started(1)) == [acks(status(0), status(1))]
    assert agent(assigned(both)) == []


def test_a_rank_not_listed_any_more_is_stopped(agent: Agent) -> None:
    """A rank that the newest assignment leaves out is told to end, its neighbour runs on."""
    agent(assigned(job(want(0), want(1))), started(0), started(1))
    assert agent(assigned(job(want(0)))) == [stop(1), acks(status(0))]
    assert agent(exited(1)) == [acks(status(0))]


def test_a_rank_not_up_yet_is_stopped_too(agent: Agent) -> None:
    """A rank that is dropped while it comes up is told to end and never acknowledged as up."""
    agent(assigned(job()))
    assert agent(assigned()) == [stop(), acks()]
    assert agent(started()) == []
    assert agent(exited()) == [WriteAcks(JOB, None)]


def test_a_new_start_count_is_another_process(agent: Agent) -> None:
    """A new start_count stops the old process, and starts the new one when that has ended."""
    agent(assigned(job()), started())
    again = job(want(start=2), epoch=2)
    assert agent(assigned(again)) == [stop(start=1), acks()]
    assert agent(exited(start=1)) == [StartRank(again, want(start=2)), acks()]
    assert agent(started(start=2)) == [acks(status(start=2))]


def test_a_die_has_one_process_at_a_time(agent: Agent) -> None:
    """A job on a die whose last process is still ending is started when that is gone."""
    agent(assigned(job()), started())
    other = job(uid="job-b")
    assert agent(assigned(other)) == [stop(), acks()]
    assert agent(assigned(other)) == []
    assert agent(exited()) == [StartRank(other, want()), WriteAcks(JOB, None)]


def test_an_ending_process_is_not_taken_for_the_new_one(agent: Agent) -> None:
    """The old process that comes up late or ends says nothing about the new one."""
    agent(assigned(job()))
    agent(assigned(job(want(start=2), epoch=2)))
    assert agent(started(start=1)) == []
    again = StartRank(job(want(start=2), epoch=2), want(start=2))
    assert agent(exited(start=1, code=7)) == [again, acks()]
    assert agent(started(start=2)) == [acks(status(start=2))]


def test_adopted_ranks_are_kept_until_an_assignment_is_known(agent: Agent) -> None:
    """Without an assignment ranks are told and nothing is started, driven or ended."""
    assert agent(started(0, epoch=3), started(1, epoch=3)) == [
        acks(status(0, epoch=3), status(1, epoch=3))
    ]
    assert agent(suspected(9)) == [
        acks(status(0, epoch=3, suspicions=(suspicion(9),)), status(1, epoch=3))
    ]
    assert agent(exited(1, code=2)) == [
        acks(
            status(0, epoch=3, suspicions=(suspicion(9),)),
            status(1, epoch=3, stage=EXITED, exit_code=2, message="gone"),
        )
    ]


def test_an_adopted_rank_that_is_assigned_goes_on(agent: Agent) -> None:
    """An adopted process is brought to its job's stage, not started anew."""
    agent(started(epoch=3))
    live = job(epoch=3, stage=LIVE)
    assert agent(assigned(live)) == [Drive(live, want(), status(epoch=3), 0)]


def test_an_adopted_rank_of_an_ended_job_is_stopped(agent: Agent) -> None:
    """The first assignment ends adopted processes that it does not list."""
    agent(started())
    assert agent(assigned()) == [stop(), acks()]


def test_a_batch_is_taken_in_before_anything_is_decided(agent: Agent) -> None:
    """Events that come together are decided on together, by the last assignment among them."""
    assert agent(started(), assigned(job()), exited(), assigned()) == [WriteAcks(JOB, None)]
    assert agent(assigned(job()), assigned()) == []


@pytest.mark.parametrize(
    "late",
    [job(stage=PREPARE), job(stage=LIVE), job(epoch=2, stage=START)],
    ids=["prepare", "live", "later"],
)
def test_a_rank_that_should_have_run_before_is_told_as_ended(
    agent: Agent, late: JobAssignment
) -> None:
    """A process that was gone when the agent came back is not replaced by an empty one."""
    gone = never_up(EXITED, "the process was gone when the agent came back", -1)
    assert agent(assigned(late)) == [acks(gone)]
    assert agent(assigned(late)) == []


@pytest.mark.parametrize("stage", [START, PREPARE, LIVE])
def test_an_exit_is_acknowledged(agent: Agent, stage: AssignmentStage) -> None:
    """A process that ended is told with its code and is neither started nor driven again."""
    agent(assigned(job()), started())
    agent(assigned(job(stage=stage)))
    over = acks(status(stage=EXITED, exit_code=-9, message="gone"))
    assert agent(exited(code=-9)) == [over]
    assert agent(driven(1, SERVES), failed(final=True), suspected(9)) == []
    assert agent(assigned(job(epoch=2, stage=stage))) == []


def test_a_failed_start_is_acknowledged(agent: Agent) -> None:
    """A rank that could not start is told with the reason and is not tried again."""
    agent(assigned(job()))
    assert agent(StartFailed(JOB, key(), 1, "no memory")) == [acks(never_up(FAILED, "no memory"))]
    assert agent(assigned(job())) == []


def test_the_end_of_another_process_is_not_this_ones(agent: Agent) -> None:
    """An exit or a failed start of another start_count leaves the present process as it is."""
    agent(assigned(job(want(start=2), epoch=2)), started(start=2))
    assert agent(exited(start=1)) == [acks(status(start=2))]
    assert agent(StartFailed(JOB, key(), 3, "no")) == [acks(status(start=2))]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_two_adopted_processes_the_assigned_one_is_kept(
    agent: Agent, order: tuple[int, int]
) -> None:
    """Of two processes of one rank the one that is assigned is kept and the other stopped."""
    agent(*(started(start=start) for start in order))
    live = job(want(start=2), epoch=2, stage=LIVE)
    out = agent(assigned(live))
    assert stop(start=1) in out
    assert Drive(live, want(start=2), status(start=2), 0) in out


# --- drives ------------------------------------------------------------------------------------


def test_a_new_epoch_is_driven_stage_by_stage(agent: Agent) -> None:
    """A survivor is fenced, repaired and made live, each told before the next is asked for."""
    agent(assigned(job()), started())
    fence, prepare, live = (job(epoch=2, stage=stage) for stage in (START, PREPARE, LIVE))
    assert agent(assigned(fence)) == [Drive(fence, want(), status(), 0)]
    fenced = status(epoch=2, stage=FENCED)
    assert agent(driven(2, FENCED)) == [acks(fenced)]
    assert agent(assigned(prepare)) == [Drive(prepare, want(), fenced, 0)]
    repaired = status(epoch=2, stage=REPAIRED, experts_loaded=5)
    assert agent(driven(2, REPAIRED, experts=5)) == [acks(repaired)]
    assert agent(assigned(live)) == [Drive(live, want(), repaired, 0)]
    assert agent(driven(2, SERVES)) == [acks(status(epoch=2, stage=SERVES, experts_loaded=5))]
    assert agent(assigned(live)) == []


@pytest.mark.parametrize(
    ("epoch", "reached", "goal", "is_driven"),
    [
        (1, STARTED, START, False),  # a process of this very epoch has nothing to be fenced from
        (1, STARTED, PREPARE, True),
        (1, FENCED, PREPARE, True),
        (1, REPAIRED, PREPARE, False),
        (1, REPAIRED, LIVE, True),
        (1, SERVES, LIVE, False),
        (1, SERVES, PREPARE, False),
        (2, STARTED, START, True),
        (2, FENCED, START, False),
        (3, FENCED, LIVE, True),
    ],
)
def test_a_rank_is_driven_if_it_is_below_its_goal(
    agent: Agent, epoch: int, reached: RankStage, goal: AssignmentStage, *, is_driven: bool
) -> None:
    """A command is given exactly when the rank is short of what the stage asks for."""
    agent(started(epoch=epoch), driven(epoch, reached))
    task = job(epoch=epoch, stage=goal)
    expected = [Drive(task, want(), status(epoch=epoch, stage=reached), 0)] if is_driven else []
    assert agent(assigned(task)) == expected


def test_a_rank_ahead_of_its_assignment_is_told_and_left_alone(agent: Agent) -> None:
    """An older epoch than the rank's drives nothing back; a store that was set back is told all."""
    agent(started(epoch=3))
    assert agent(assigned(job(epoch=2, stage=LIVE))) == []
    assert agent(AcksFound(("j-9",))) == [WriteAcks("j-9", None), acks(status(epoch=3))]


def test_an_epoch_of_another_term_drives_nothing(agent: Agent) -> None:
    """A number that was decided twice, in two terms: the rank stays at the first, which is told."""
    first, second = (replace(job(epoch=2, stage=PREPARE), epoch_term=term) for term in (5, 6))
    agent(started())
    assert agent(assigned(first)) == [Drive(first, want(), status(), 0)]
    told = acks(status(epoch=2, stage=FENCED, epoch_term=5))
    assert agent(driven(2, FENCED)) == [told]
    assert agent(assigned(second)) == []
    assert agent(AcksFound((JOB,))) == [told]
    above = replace(second, epoch=3)
    was = status(epoch=2, stage=FENCED, epoch_term=5)
    assert agent(assigned(above)) == [Drive(above, want(), was, 0)]


def test_a_new_process_is_of_the_term_that_started_it(agent: Agent) -> None:
    """Its first acknowledgement names the decision that it comes from."""
    task = replace(job(), epoch_term=5)
    assert agent(assigned(task)) == [StartRank(task, want())]
    assert agent(started()) == [acks(status(epoch_term=5))]


def test_one_command_at_a_time_for_a_target(agent: Agent) -> None:
    """A command under way is not repeated, and one of a newer epoch is given at once."""
    agent(assigned(job(stage=PREPARE)), started())
    assert agent(assigned(job(stage=PREPARE))) == []
    newer = job(epoch=2, stage=START)
    assert agent(assigned(newer)) == [Drive(newer, want(), status(), 0)]


def test_progress_within_a_command_is_told(agent: Agent) -> None:
    """A stage on the way is acknowledged, the command goes on, and its counts add up."""
    agent(assigned(job()), started())
    agent(assigned(job(stage=PREPARE)))
    assert agent(driven(1, FENCED, last=False, experts=2)) == [
        acks(status(stage=FENCED, experts_loaded=2))
    ]
    assert agent(driven(1, REPAIRED, experts=3)) == [acks(status(stage=REPAIRED, experts_loaded=5))]


@pytest.mark.parametrize(
    "stale",
    [
        driven(1, SERVES, last=False, experts=9),
        driven(2, STARTED, last=False, experts=9),
        driven(2, FENCED, last=False, experts=9),
        driven(3, SERVES, start=2, experts=9),
        failed(start=2, final=True),
        suspected(9, start=2),
        silent(start=2),
    ],
    ids=["epoch", "passed", "same", "process", "failure", "suspicion", "silence"],
)
def test_stale_words_are_ignored(agent: Agent, stale: Event) -> None:
    """Words of an older epoch, a stage passed or another process change nothing."""
    prepare = job(epoch=2, stage=PREPARE)
    agent(started(), assigned(prepare))
    agent(driven(2, FENCED, last=False))
    assert agent(stale) == []
    assert agent(assigned(prepare)) == []
    assert agent(driven(2, REPAIRED)) == [acks(status(epoch=2, stage=REPAIRED))]


@pytest.mark.parametrize("known", [1, 3])
def test_the_end_of_an_older_command_is_not_the_newer_ones(agent: Agent, known: int) -> None:
    """A command that ends at an older epoch does not have the newer one given twice."""
    agent(started(), assigned(job(epoch=2)))
    agent(assigned(job(epoch=3, stage=PREPARE)))
    agent(driven(known, FENCED, last=False))
    out = agent(driven(2, FENCED))
    assert not any(isinstance(instruction, Drive) for instruction in out)


def test_a_failed_command_is_tried_again(agent: Agent) -> None:
    """A failure is followed by another try that knows how many failed since the last progress."""
    prepare = job(stage=PREPARE)
    agent(started(), assigned(prepare))
    assert agent(failed()) == [Drive(prepare, want(), status(), 1)]
    assert agent(failed()) == [Drive(prepare, want(), status(), 2)]
    fenced = status(stage=FENCED)
    assert agent(driven(1, FENCED, last=False)) == [acks(fenced)]
    assert agent(failed()) == [Drive(prepare, want(), fenced, 1)]


def test_a_final_failure_is_acknowledged(agent: Agent) -> None:
    """A command that can't succeed fails its rank, which is driven no further."""
    agent(started(), assigned(job(stage=PREPARE)))
    assert agent(failed(final=True)) == [acks(status(stage=FAILED, message="no answer"))]
    assert agent(driven(1, REPAIRED), failed()) == []
    assert agent(assigned(job(epoch=2, stage=START))) == []


def test_attempts_are_bounded(agent: Agent) -> None:
    """The last of ATTEMPTS_MAX failures in a row fails the rank."""
    prepare = job(stage=PREPARE)
    agent(started(), assigned(prepare))
    for attempts in range(1, ATTEMPTS_MAX):
        assert agent(failed()) == [Drive(prepare, want(), status(), attempts)]
    assert agent(failed()) == [acks(status(stage=FAILED, message="no answer"))]


@pytest.mark.parametrize(
    "after", [assigned(), assigned(job(want(start=2), epoch=2))], ids=["unlisted", "replaced"]
)
def test_a_rank_that_failed_while_up_is_stopped(agent: Agent, after: AssignmentChanged) -> None:
    """The process of a rank whose command failed for good is ended, at the latest when unlisted."""
    agent(started(), assigned(job(stage=PREPARE)))
    out = agent(failed(final=True)) + agent(after)
    assert out.count(stop()) == 1


# --- acknowledgements --------------------------------------------------------------------------


def test_acks_stay_until_the_last_process_has_ended(agent: Agent) -> None:
    """The record goes with the last ending process, and not before."""
    agent(assigned(job(want(0), want(1))), started(0), started(1))
    assert agent(assigned()) == [stop(0), stop(1), acks()]
    assert agent(exited(0)) == [acks()]
    assert agent(exited(1)) == [WriteAcks(JOB, None)]


@pytest.mark.parametrize("end", [exited(), StartFailed(JOB, key(), 1, "no memory")])
def test_acks_of_ranks_that_are_over_go_at_once(agent: Agent, end: Event) -> None:
    """Nothing is stopped or waited for when all ranks of a dropped job had ended before."""
    agent(assigned(job()))
    agent(end)
    assert agent(assigned()) == [WriteAcks(JOB, None)]


def test_acks_are_a_jobs_own_in_the_order_of_its_ranks(agent: Agent) -> None:
    """Jobs are acknowledged apart, their ranks by role, instance and rank."""
    out = agent(started(2), started(0, uid="job-b"), started(10), started(1))
    assert out == [acks(status(1), status(2), status(10)), acks(status(0), uid="job-b")]


def test_a_silent_rank_is_given_up_where_nobody_drives_it(agent: Agent) -> None:
    """A process that does not answer is told as failed once; while it is driven, that decides."""
    agent(assigned(job()), started())
    agent(assigned(job(stage=LIVE)))
    assert agent(silent()) == []
    agent(driven(1, SERVES))
    assert agent(silent()) == [acks(status(stage=FAILED, message="no answer"))]
    assert agent(silent()) == []


# --- suspicions --------------------------------------------------------------------------------


def test_a_suspicion_is_told_once(agent: Agent) -> None:
    """The same word about the same peer is acknowledged once, another is added."""
    agent(started())
    assert agent(suspected(1)) == [acks(status(suspicions=(suspicion(1),)))]
    assert agent(suspected(1)) == []
    assert agent(suspected(2)) == [acks(status(suspicions=(suspicion(1), suspicion(2))))]


def test_suspicions_are_bounded(agent: Agent) -> None:
    """Only the newest SUSPICIONS_MAX are kept."""
    agent(started())
    out = agent(*(suspected(peer) for peer in range(SUSPICIONS_MAX + 3)))
    newest = tuple(suspicion(peer) for peer in range(3, SUSPICIONS_MAX + 3))
    assert out == [acks(status(suspicions=newest))]


def test_a_newer_epoch_drops_older_suspicions(agent: Agent) -> None:
    """Reaching an epoch forgets who was suspected before it, and nobody suspected at it."""
    agent(started(), suspected(1, epoch=1), suspected(2, epoch=2))
    both = (suspicion(1, 1), suspicion(2, 2))
    assert agent(driven(1, FENCED)) == [acks(status(stage=FENCED, suspicions=both))]
    assert agent(driven(2, FENCED)) == [acks(status(epoch=2, stage=FENCED, suspicions=both[1:]))]


# --- any sequence ------------------------------------------------------------------------------

_UIDS = st.sampled_from([JOB, "job-b"])
_KEYS = st.integers(0, 1).map(key)
_SMALL = st.integers(1, 3)
_WORDS = st.just("words")
_WHERE = (_UIDS, _KEYS, _SMALL)
_STAGES = st.sampled_from([STARTED, FENCED, REPAIRED, SERVES])


@st.composite
def assignments(draw: st.DrawFn) -> AssignmentChanged:
    jobs = []
    for uid in draw(st.sets(_UIDS)):
        ranks = (want(rank, draw(_SMALL)) for rank in sorted(draw(st.sets(st.integers(0, 1)))))
        stage = draw(st.sampled_from([START, PREPARE, LIVE]))
        jobs.append(JobAssignment(job_uid=uid, epoch=draw(_SMALL), stage=stage, ranks=tuple(ranks)))
    return assigned(*jobs)


_EVENTS: st.SearchStrategy[Event] = st.one_of(
    assignments(),
    st.builds(RankStarted, *_WHERE, _WORDS, _WORDS, _WORDS, _WORDS, _SMALL),
    st.builds(StartFailed, *_WHERE, _WORDS),
    st.builds(RankExited, *_WHERE, st.integers(-9, 1), _WORDS),
    st.builds(Driven, *_WHERE, _SMALL, _STAGES, st.booleans(), st.integers(0, 9)),
    st.builds(DriveFailed, *_WHERE, _WORDS, st.booleans()),
    st.builds(RankSilent, *_WHERE, _WORDS),
    st.builds(PeerSuspected, *_WHERE, st.builds(suspicion, st.integers(0, 99), _SMALL)),
)


def check_step(agent: Agent, out: Sequence[Instruction]) -> None:
    """Work follows the assignment, nothing ends without one, and what is kept is bounded."""
    jobs = agent.machine.assignment.jobs if agent.machine.assignment else ()
    for instruction in out:
        assert jobs or not isinstance(instruction, StartRank | Drive)
        assert agent.machine.assignment or not isinstance(instruction, StopRank)
        if isinstance(instruction, StartRank | Drive):
            assert instruction.job in jobs
            assert instruction.rank in instruction.job.ranks
        if isinstance(instruction, WriteAcks) and instruction.acks is not None:
            assert len(instruction.acks.ranks) <= 2
            assert all(len(r.suspicions) <= SUSPICIONS_MAX for r in instruction.acks.ranks)
    assert len(agent.machine.ranks) <= 4
    assert len(agent.machine.ending) <= 12


def up(told: dict[str, AgentAcks | None]) -> set[Instruction]:
    """What it takes to stop every rank that was told as up."""
    return {
        StopRank(uid, RankKey(role=r.role, instance=r.instance, rank=r.rank), r.start_count)
        for uid, record in told.items()
        for r in (record.ranks if record else ())
        if r.stage not in (EXITED, FAILED)
    }


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(_EVENTS, max_size=4), max_size=30))
def test_any_sequence_ends_when_nothing_is_assigned(batches: list[list[Event]]) -> None:
    """Whatever happens nothing raises, and an empty assignment ends and forgets all ranks."""
    agent = Agent()
    told: dict[str, AgentAcks | None] = {}
    stops: dict[StopRank, None] = {}

    def tell(*events: Event) -> list[Instruction]:
        out = agent(*events)
        check_step(agent, out)
        told.update({i.job_uid: i.acks for i in out if isinstance(i, WriteAcks)})
        stops.update({i: None for i in out if isinstance(i, StopRank)})
        return out

    for batch in batches:
        tell(*batch)
    to_stop = up(told)
    assert to_stop <= set(tell(assigned()))
    assert not agent.machine.ranks
    for ended in list(stops):
        tell(RankExited(ended.job_uid, ended.key, ended.start_count, 0, "ended"))
    assert not agent.machine.ending
    assert set(told.values()) <= {None}, "the records of all jobs are gone"


# --- the fault log -----------------------------------------------------------------------------


def fault(rank: int = 0, code: str = "80E18005") -> ActiveFault:
    level = FaultLevel.SEPARATE_NPU
    return ActiveFault(code=code, subject_kind="die", subject=die(rank), level=level)


def numbered(report: AgentHealth) -> list[tuple[int, str, str, float]]:
    """What is told of each occurrence: its number, what happened where, and when."""
    assert all(seen.device_time == seen.agent_time for seen in report.occurrences)
    return [
        (seen.sequence, seen.action, seen.subject, seen.agent_time) for seen in report.occurrences
    ]


@pytest.fixture
def faults() -> FaultLog:
    return FaultLog(NODE, "boot-1")


def test_a_healthy_node_reports_nothing(faults: FaultLog) -> None:
    """No fault makes no occurrence and an empty report."""
    assert not faults.update((), now=1.0)
    assert faults.report() == AgentHealth(node=NODE, boot_id="boot-1")


def test_a_fault_occurs_once_and_recovers_once(faults: FaultLog) -> None:
    """A fault is one occurrence however long it lasts, and one more when it is gone."""
    assert faults.update([fault()], now=1.0)
    assert not faults.update([fault()], now=2.0)
    assert faults.report().active_faults == (fault(),)
    assert faults.update([], now=3.0)
    assert not faults.update([], now=4.0)
    report = faults.report()
    assert numbered(report) == [(1, "OCCUR", die(0), 1.0), (2, "RECOVER", die(0), 3.0)]
    assert (report.sequence, report.active_faults) == (2, ())


def test_a_fault_that_comes_back_is_another_occurrence(faults: FaultLog) -> None:
    """Frequency can be counted: each return of a fault has a number of its own."""
    for now, present in enumerate(([fault()], [], [fault()])):
        assert faults.update(present, now=now)
    assert numbered(faults.report()) == [
        (1, "OCCUR", die(0), 0),
        (2, "RECOVER", die(0), 1),
        (3, "OCCUR", die(0), 2),
    ]


def test_faults_are_reported_in_one_order(faults: FaultLog) -> None:
    """Active faults are sorted by subject and code, so that another order is no change."""
    mixed = [fault(1), fault(0, "B"), fault(0, "A")]
    assert faults.update(mixed, now=1.0)
    assert faults.report().active_faults == (fault(0, "A"), fault(0, "B"), fault(1))
    assert not faults.update(mixed[::-1], now=2.0)
    assert faults.update([fault(0, "A"), fault(2)], now=3.0)
    told = [(seen.action, seen.subject, seen.code) for seen in faults.report().occurrences[3:]]
    assert told == [
        ("RECOVER", die(0), "B"),
        ("RECOVER", die(1), "80E18005"),
        ("OCCUR", die(2), "80E18005"),
    ]


def test_the_last_occurrences_are_kept(faults: FaultLog) -> None:
    """The window holds the newest OCCURRENCES_KEPT while the numbers go on."""
    for now in range(OCCURRENCES_KEPT + 6):
        faults.update([] if now % 2 else [fault()], now=now)
    report = faults.report()
    assert OCCURRENCES_KEPT == 64
    assert report.sequence == OCCURRENCES_KEPT + 6
    assert [seen.sequence for seen in report.occurrences] == list(range(7, OCCURRENCES_KEPT + 7))


def test_a_fault_from_two_sources_is_one_occurrence(faults: FaultLog) -> None:
    """The same fault said by two sources occurs once."""
    faults.update([fault(), fault()], now=1.0)
    assert numbered(faults.report()) == [(1, "OCCUR", die(0), 1.0)]
