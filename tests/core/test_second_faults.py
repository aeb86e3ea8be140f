"""Faults and wishes that come while a recovery is under way: stimuli in, records out."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from typing import Any

import pytest

from raddle.core.events import AgentStreamBroken, RankProbed, SequencesReported, Woken
from raddle.core.requests import CancelJob, Cordon, DeleteJob, ScaleJob, SubmitJob, Uncordon
from raddle.model import keys
from raddle.model.health import AgentAcks, AgentHealth, PeerSuspicion, RankStage, RankStatus
from raddle.model.incident import Incident, IncidentPhase
from raddle.model.job import AssignmentStage, Job, JobState
from raddle.model.kinds import NodeState, RoleKind, SeatState
from raddle.model.routes import SequenceReport
from raddle.model.types import ExpertMove, RankKey, WeightSource
from tests.core.world import World, spec, submit


def job_of(world: World, uid: str) -> Job:
    found: Job = world.store[keys.job(uid)]
    return found


def incidents(world: World) -> list[Incident]:
    return [v for k, v in sorted(world.store.items()) if k.startswith(keys.INCIDENTS)]


def accuse(world: World, uid: str) -> str:
    """Rank 0 says that it lost rank 1; gives the accused one's incarnation."""
    accuser, accused = world.store[keys.placement(uid)].instances[0].ranks[:2]
    target = next(
        status
        for status in world.store[keys.acks(accused.node, uid)].ranks
        if (status.role, status.rank) == ("decode", accused.rank)
    )
    suspicion = PeerSuspicion(
        incarnation=target.incarnation, epoch=job_of(world, uid).epoch, reason="CONNECTION_BROKEN"
    )
    key = keys.acks(accuser.node, uid)
    acks = world.store[key]
    ranks = tuple(
        replace(s, suspicions=(suspicion,)) if (s.role, s.rank) == ("decode", 0) else s
        for s in acks.ranks
    )
    world.observe(key, replace(acks, ranks=ranks))
    return str(target.incarnation)


def with_prefill(ranks: int = 8) -> Any:
    """A job whose single prefill rank can only be started anew."""
    found = spec("x", ranks=ranks)
    prefill = replace(
        found.roles[0],
        name="prefill",
        kind=RoleKind.PREFILL,
        ranks=1,
        slots_per_rank=32,
        spread_nodes=0,
    )
    return replace(found, roles=(prefill, *found.roles))


def tight(world: World) -> str:
    """A job without a slot to spare on a machine without a die to spare: it can only start over."""
    found = spec("tight", ranks=32)
    roles = tuple(replace(r, slots_per_rank=min(1, r.slots_per_rank)) for r in found.roles)
    world.ask(SubmitJob(spec=replace(found, roles=roles), job_uid="j-tight", spec_digest="d"))
    world.settle()
    for number in range(18):
        world.ask(Cordon(subject=f"sn0/n{number:02d}"))
    return "j-tight"


def test_a_second_loss_while_a_replacement_starts_waits_for_it(world: World) -> None:
    """The next epoch is prepared only when the first loss's new process has told its address."""
    world.ask(SubmitJob(spec=with_prefill(), job_uid="j-x", spec_digest="d"))
    world.settle()
    world.starting.add(("j-x", "prefill", 0, 0, 2))
    world.exited.add(("j-x", "prefill", 0, 0, 1))
    world.settle()
    assert (job_of(world, "j-x").epoch, job_of(world, "j-x").state) == (2, JobState.RECOVERING)
    world.exited.add(("j-x", "decode", 0, 3, 1))
    world.settle()
    assert job_of(world, "j-x").epoch == 3
    stages = {
        item.stage
        for key, assignment in world.store.items()
        if key.startswith(keys.ASSIGNMENTS)
        for item in assignment.jobs
    }
    assert stages == {AssignmentStage.START}
    world.starting.clear()
    world.settle()
    assert job_of(world, "j-x").state is JobState.READY
    assert all(member.engine_address for member in world.store[keys.routes("j-x")].members)


def test_the_sequences_of_a_first_loss_are_planned_again_with_a_second(world: World) -> None:
    """A plan that gives way before it was carried out takes no sequence's new home with it."""
    uid = submit(world)
    reports = tuple(
        SequenceReport(
            sequence_id=f"s{rank}",
            rank=RankKey(role="decode", instance=0, rank=rank),
            prompt_tokens=64,
            sent_tokens=8,
        )
        for rank in range(8)
    )
    world.handle(SequencesReported("door", uid, True, reports, ()))
    for rank, planned in ((0, {"s0"}), (5, {"s0", "s5"})):
        exits(world, uid, rank)
        assert {r.sequence_id for r in world.store[keys.routes(uid)].restores} == planned


def experts_by_rank(world: World, uid: str, epoch: int) -> set[tuple[int, int, int]]:
    """(rank, layer, expert) of the decode instance's map at an epoch."""
    found = world.store[keys.expert_maps(uid, epoch)].instances[0].expert_map
    return {
        (slot // found.slots_per_rank, number, expert)
        for number, layer in enumerate(found.layers)
        for slot, expert in enumerate(layer.physical_to_logical)
        if expert >= 0
    }


def moves_of(world: World, uid: str) -> dict[tuple[int, int, int], ExpertMove]:
    """What decode ranks are told to load: by (rank, layer, expert)."""
    return {
        (rank.rank.rank, move.layer, move.expert): move
        for key, assignment in world.store.items()
        if key.startswith(keys.ASSIGNMENTS)
        for item in assignment.jobs
        if item.job_uid == uid
        for rank in item.ranks
        if rank.rank.role == "decode"
        for move in rank.moves
    }


def exits(world: World, uid: str, rank: int, **said: Any) -> None:
    """One process ends, before any other rank acts on what it was told; `said` of its end."""
    end = {"stage": RankStage.EXITED, **said}
    seat = world.store[keys.placement(uid)].instances[0].ranks[rank]
    key = keys.acks(seat.node, uid)
    acks = world.store[key]
    told = tuple(
        replace(s, **end) if (s.role, s.rank) == ("decode", rank) else s for s in acks.ranks
    )
    world.observe(key, replace(acks, ranks=told))
    world.now += 0.02
    world.handle(Woken())


def test_loads_of_an_overtaken_epoch_are_planned_again(world: World) -> None:
    """A second loss before the first plan's loads were done: they are named again.

    And no rank is told to read an expert from one that has not loaded it.
    """
    uid = submit(world)
    had = experts_by_rank(world, uid, 1)
    exits(world, uid, 0)
    exits(world, uid, 1)
    assert job_of(world, uid).epoch == 3
    seats = world.store[keys.placement(uid)].instances[0].ranks
    fresh = {seat.rank for seat in seats if seat.start_count > 1}
    wanted = {item for item in experts_by_rank(world, uid, 3) - had if item[0] not in fresh}
    moves = moves_of(world, uid)
    assert wanted
    assert wanted <= set(moves)
    for (_, layer, expert), move in moves.items():
        if move.source is WeightSource.PEER:
            assert (move.source_rank, layer, expert) in had


def test_a_probe_that_answers_late_brings_no_cancelled_job_back(world: World) -> None:
    """A suspected rank that answers after its job was cancelled changes nothing."""
    uid = submit(world)
    incarnation = accuse(world, uid)
    world.ask(CancelJob(job_uid=uid))
    world.handle(RankProbed(uid, incarnation, answered=True))
    assert job_of(world, uid).state is JobState.STOPPING
    world.settle()
    assert job_of(world, uid).state is JobState.CANCELLED


def test_a_probe_that_answers_late_leaves_a_waiting_job_alone(world: World) -> None:
    """A suspected rank that answers after its job went back to the queue changes nothing."""
    uid = submit(world)
    incarnation = accuse(world, uid)
    for number in range(18):
        world.ask(Cordon(subject=f"sn0/n{number:02d}"))
    world.ask(ScaleJob(job_uid=uid, role="decode", ranks=10))
    world.handle(RankProbed(uid, incarnation, answered=True))
    assert job_of(world, uid).state is JobState.PENDING


def test_rare_hiccups_make_no_rank_a_bad_one(world: World) -> None:
    """A rank that answers after each broken connection is kept if these are months apart."""
    uid = submit(world)
    for _ in range(4):
        incarnation = accuse(world, uid)
        world.handle(RankProbed(uid, incarnation, answered=True))
        world.settle()
        world.now += 30 * 86_400
    seats = world.store[keys.placement(uid)].instances[0].ranks
    assert {(seat.state, seat.start_count) for seat in seats} == {(SeatState.ACTIVE, 1)}


def test_a_rank_that_peers_keep_losing_is_lost_and_the_reason_is_true(world: World) -> None:
    """Three broken connections within minutes: the rank is left, though it answers."""
    uid = submit(world)
    for _ in range(3):
        incarnation = accuse(world, uid)
        world.handle(RankProbed(uid, incarnation, answered=True))
        world.settle()
    last = incidents(world)[-1]
    assert last.faults[-1].code == "CONNECTION_UNRELIABLE"
    assert "it answers, but peers lost their connections to it 3 times" in last.why.message


def test_a_host_that_goes_after_its_agent_is_lost(world: World) -> None:
    """A silent node whose ranks answered is asked again, and lost when they do not any more."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    world.handle(AgentStreamBroken(node))
    world.observe(keys.health(node), None)
    world.settle()
    tracked = world.machine.context.nodes.node(node)
    assert (tracked.state, tracked.why.reason) == (NodeState.SUSPECT, "RANKS_ANSWER")
    assert job_of(world, uid).epoch == 1
    world.now += 60
    world.node_down(node)
    for _ in range(3):
        world.settle()
    assert tracked.state is NodeState.LOST
    assert (job_of(world, uid).state, job_of(world, uid).epoch) == (JobState.READY, 2)


def test_an_incident_ends_with_a_job_that_is_cancelled_while_it_waits(world: World) -> None:
    """A job that started over and is cancelled in the queue leaves no open incident."""
    uid = tight(world)
    world.fault(world.store[keys.placement(uid)].instances[0].ranks[0].die, present=True)
    world.settle()
    assert job_of(world, uid).state is JobState.PENDING
    assert [i.phase for i in incidents(world)] != [IncidentPhase.CLOSED]
    world.ask(CancelJob(job_uid=uid))
    assert [i.phase for i in incidents(world)] == [IncidentPhase.CLOSED]


def test_an_incident_of_two_jobs_ends_without_the_one_that_is_cancelled(world: World) -> None:
    """One of two jobs of an incident is cancelled: it closes when the other one is live."""
    first, second = submit(world, "a"), submit(world, "b")
    for uid in (first, second):
        die = world.store[keys.placement(uid)].instances[0].ranks[0].die
        node = "/".join(die.split("/")[:2])
        old = world.store[keys.health(node)].active_faults
        world.fault(die, present=True)
        new = world.store[keys.health(node)].active_faults
        world.observe(
            keys.health(node),
            AgentHealth(node=node, boot_id="b", sequence=9, active_faults=(*old, *new)),
        )
    world.now += 0.02
    world.handle(Woken())
    (incident,) = incidents(world)
    assert {plan.job_uid for plan in incident.plans} == {first, second}
    world.ask(CancelJob(job_uid=first))
    world.settle()
    assert job_of(world, second).state is JobState.READY
    assert [i.phase for i in incidents(world)] == [IncidentPhase.CLOSED]


def test_a_job_is_placed_above_every_epoch_that_an_agent_knows(world: World) -> None:
    """Ranks of a forgotten placement live at epoch 5: the next one begins at 6."""
    status = RankStatus(
        role="decode", instance=0, rank=3, incarnation="i", epoch=5, stage=RankStage.LIVE
    )
    acks = AgentAcks(node="sn0/n05", job_uid="j-small", ranks=(status,))
    world.observe(keys.acks("sn0/n05", "j-small"), acks)
    world.ask(SubmitJob(spec=spec(), job_uid="j-small", spec_digest="d"))
    assert job_of(world, "j-small").epoch == 6


@pytest.mark.parametrize("deleted", [False, True], ids=["ended", "deleted"])
def test_nothing_is_remembered_of_jobs_that_ended(world: World, *, deleted: bool) -> None:
    """What is kept beside the records goes with the job, and late reports bring none of it back."""
    context = world.machine.context
    for number in range(5):
        uid = submit(world, f"n{number}")
        accuse(world, uid)
        world.handle(SequencesReported("door", uid, True, (), ()))
        world.ask(CancelJob(job_uid=uid))
        world.settle()
        if deleted:
            world.ask(DeleteJob(job_uid=uid))
            world.handle(SequencesReported("door", uid, True, (), ()))
    state = context.state
    memories: list[Sized] = [
        state.kv_tokens,
        state.acks,
        context.seats,
        context.suspicions,
        context.lives,
    ]
    memories += [state.stages, state.sequences if deleted else {}, context.seen_since]
    assert [len(memory) for memory in memories] == [0] * len(memories)


def test_waiting_jobs_that_fit_are_not_held_up_by_one_that_cannot(world: World) -> None:
    """Room is kept only for a job that the machine could take once others have ended."""
    for number in range(3):
        world.ask(Cordon(subject=f"sn0/n{number:02d}"))
    world.ask(SubmitJob(spec=spec("big", ranks=64), job_uid="j-big", spec_digest="d"))
    world.now += 61
    world.settle()
    small = submit(world)
    assert job_of(world, "j-big").state is JobState.PENDING
    assert job_of(world, small).state is JobState.READY


def test_a_job_that_waited_long_is_next_and_the_others_are_told(world: World) -> None:
    """What becomes free is kept for the job that has waited for a minute; others wait behind it."""
    running = submit(world)
    world.ask(SubmitJob(spec=spec("big", ranks=72), job_uid="j-big", spec_digest="d"))
    world.now += 61
    world.settle()
    small = submit(world, "late")
    assert job_of(world, small).why.reason == "WAITS_FOR_TURN"
    assert "default/big" in job_of(world, small).why.message
    world.ask(CancelJob(job_uid=running))
    world.settle()
    assert job_of(world, "j-big").state is JobState.READY
    assert job_of(world, small).why.reason == "WAITS_FOR_DIES"
    for number in range(18):
        world.ask(Cordon(subject=f"sn0/n{number:02d}"))
        world.ask(Uncordon(subject=f"sn0/n{number:02d}"))
    assert job_of(world, small).state is JobState.PENDING
