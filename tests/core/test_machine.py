"""The machine from submit to recovery: stimuli in, records out, `validate()` after each."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from raddle.core.events import (
    AgentStreamBroken,
    Woken,
)
from raddle.core.requests import (
    CancelJob,
    Cordon,
    CreateMaintenance,
    DeclareNodeLost,
    SubmitJob,
    Uncordon,
)
from raddle.model import keys
from raddle.model.errors import RaddleError, Reason
from raddle.model.incident import IncidentPhase, MaintenanceState
from raddle.model.job import JobState
from raddle.model.kinds import NodeState
from tests.core.world import World, spec, submit


def test_a_job_is_placed_started_and_ready(world: World) -> None:
    """A submitted job goes to READY at epoch 1 once all agents acknowledged."""
    uid = submit(world)
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch, job.live_epoch) == (JobState.READY, 1, 1)


def test_the_same_idempotency_key_gives_the_same_job(world: World) -> None:
    """A retry with the same key is answered with the first job, another body is refused."""
    uid = submit(world, key="k")
    again, _ = world.ask(
        SubmitJob(spec=spec(), job_uid="j-other", spec_digest="d", idempotency_key="k")
    )
    assert again.uid == uid
    with pytest.raises(RaddleError) as caught:
        world.ask(SubmitJob(spec=spec(), job_uid="j-3", spec_digest="x", idempotency_key="k"))
    assert caught.value.reason is Reason.IDEMPOTENCY_KEY_REUSED


def test_a_name_is_given_once(world: World) -> None:
    """A second job of the same name is refused and changes nothing."""
    submit(world)
    before = dict(world.store)
    with pytest.raises(RaddleError) as caught:
        world.ask(SubmitJob(spec=spec(), job_uid="j-2", spec_digest="d"))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert world.store == before


def test_a_faulty_die_is_one_incident_and_one_epoch(world: World) -> None:
    """A severe die fault moves its rank's experts: one closed incident, epoch 2 is live."""
    uid = submit(world)
    seat = world.store[keys.placement(uid)].instances[0].ranks[0]
    world.fault(seat.die, present=True)
    world.settle()
    job = world.store[keys.job(uid)]
    incident = world.store[keys.incident("i-000001")]
    assert (job.state, job.live_epoch) == (JobState.READY, 2)
    assert (incident.phase, incident.subject) == (IncidentPhase.CLOSED, seat.die)
    assert incident.timeline[0].phase is IncidentPhase.DETECT


def test_a_lost_node_takes_all_its_ranks_at_once(world: World) -> None:
    """A silent node whose ranks do not answer is lost: one incident for all its ranks."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    world.node_down(node)
    world.settle()
    incident = world.store[keys.incident("i-000001")]
    assert incident.subject == node
    assert len(incident.faults) > 1
    assert world.store[keys.job(uid)].state is JobState.READY


def test_a_silent_agent_whose_ranks_answer_moves_nothing(world: World) -> None:
    """An agent lost while its ranks answer changes no epoch."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    world.handle(AgentStreamBroken(node))
    world.settle()
    assert world.store[keys.job(uid)].epoch == 1
    assert world.machine.context.nodes.node(node).state is NodeState.SUSPECT


def test_the_storm_brake_moves_nothing(world: World) -> None:
    """More nodes silent together than a failure domain explains: unknown, nothing moves."""
    world.machine.context.nodes.storm_nodes_max = 4
    uid = submit(world)
    for number in range(8):
        world.node_down(f"sn0/n{number:02d}")
    world.settle()
    assert world.store[keys.job(uid)].epoch == 1
    states = {world.machine.context.nodes.node(f"sn0/n{n:02d}").state for n in range(8)}
    assert states == {NodeState.UNKNOWN}


def test_the_storm_brake_knows_a_machine_that_was_described_in_this_term(world: World) -> None:
    """Two nodes of one rack fell silent together: one failure, and both are recovered from."""
    uid = submit(world)
    lost = {f"sn0/n{number:02d}" for number in range(2)}
    for node in sorted(lost):
        world.node_down(node)
    world.settle()
    assert {world.machine.context.nodes.node(node).state for node in lost} == {NodeState.LOST}
    job = world.store[keys.job(uid)]
    assert (job.state, job.live_epoch > 1) == (JobState.READY, True)


def test_a_drain_with_nowhere_to_go_takes_no_job_down(world: World) -> None:
    """Ranks that a drain cannot move stay, with a reason; they move once there is room."""
    tight = spec("tight", ranks=32)
    roles = tuple(replace(r, slots_per_rank=min(1, r.slots_per_rank)) for r in tight.roles)
    request = SubmitJob(spec=replace(tight, roles=roles), job_uid="j-tight", spec_digest="d")
    world.ask(request)
    world.settle()
    for number in range(18):
        world.ask(Cordon(subject=f"sn0/n{number:02d}"))
    die = world.store[keys.placement("j-tight")].instances[0].ranks[0].die
    world.ask(CreateMaintenance(maintenance_id="m-1", subject=die, timeout_s=600.0))
    world.settle()
    job, drain = world.store[keys.job("j-tight")], world.store[keys.maintenance("m-1")]
    assert (job.state, job.epoch, drain.why.reason) == (JobState.READY, 1, "NO_ROOM")
    assert not [key for key in world.store if key.startswith(keys.INCIDENTS)]
    for number in range(18):
        world.ask(Uncordon(subject=f"sn0/n{number:02d}"))
    world.settle()
    job, drain = world.store[keys.job("j-tight")], world.store[keys.maintenance("m-1")]
    assert (job.state, drain.state) == (JobState.READY, MaintenanceState.DRAINED)
    assert job.live_epoch > 1


def test_an_operators_word_lifts_the_storm_brake_for_a_node(world: World) -> None:
    """A silent node that is declared lost is recovered from; a ready one can't be declared lost."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    with pytest.raises(RaddleError, match="only a silent node"):
        world.ask(DeclareNodeLost(node=node))
    world.machine.context.nodes.storm_nodes_max = 0
    world.node_down(node)
    world.settle()
    assert world.machine.context.nodes.node(node).state is NodeState.UNKNOWN
    assert world.store[keys.job(uid)].epoch == 1
    world.ask(DeclareNodeLost(node=node, message="no power"))
    world.settle()
    assert world.machine.context.nodes.node(node).why.message == "no power, says client/test"
    job = world.store[keys.job(uid)]
    assert (job.state, job.live_epoch > 1) == (JobState.READY, True)


@pytest.mark.parametrize("steps", range(6))
def test_the_next_leader_continues_from_any_phase(world: World, steps: int) -> None:
    """A leader that dies after any step of a recovery is followed by one that ends it."""
    uid = submit(world)
    seat = world.store[keys.placement(uid)].instances[0].ranks[0]
    world.fault(seat.die, present=True)
    for _ in range(steps):
        world.now += 0.02
        world.handle(Woken())
        if steps % 2:
            world.agents()
    world.new_leader()
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.live_epoch) == (JobState.READY, job.epoch)
    assert world.store[keys.incident("i-000001")].phase is IncidentPhase.CLOSED


@pytest.mark.parametrize("lost", ["die", "node", "rank"])
def test_a_leader_that_dies_while_a_loss_is_gathered_is_followed(world: World, lost: str) -> None:
    """It had seen the loss and decided nothing: the next one sees it again, once, and recovers."""
    uid = submit(world)
    seat = world.store[keys.placement(uid)].instances[0].ranks[0]
    match lost:
        case "die":
            world.fault(seat.die, present=True)
        case "node":
            world.node_down(seat.node)
        case _:
            world.exited.add((uid, "decode", 0, seat.rank, seat.start_count))
            world.agents()
    assert not [key for key in world.store if key.startswith(keys.INCIDENTS)]
    assert world.store[keys.job(uid)].epoch == 1
    world.new_leader()
    world.now += 10
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch, job.live_epoch) == (JobState.READY, 2, 2)
    incidents = [v for k, v in world.store.items() if k.startswith(keys.INCIDENTS)]
    assert [incident.phase for incident in incidents] == [IncidentPhase.CLOSED]


def test_a_cancelled_job_gives_its_dies_back(world: World) -> None:
    """A cancelled job ends once agents ended its ranks, and its dies are free again."""
    uid = submit(world)
    world.ask(CancelJob(job_uid=uid))
    world.settle()
    assert world.store[keys.job(uid)].state is JobState.CANCELLED
    assert keys.placement(uid) not in world.store
    assert world.machine.context.cluster.count_states()["busy"] == 0


def _storm(world: World, seed: int) -> list[str]:
    """Random faults from one seed, then calm; gives the trace of what the store held."""
    rng = random.Random(seed)
    dies = [f"sn0/n{n:02d}/npu{p}/die0" for n in range(18) for p in range(4)]
    trace = []
    for number in range(2):
        submit(world, f"job{number}")
    for _ in range(25):
        match rng.choice(["die", "heal", "down", "up", "rank", "leader", "time"]):
            case "die":
                world.fault(rng.choice(dies), present=True)
            case "heal":
                world.fault(rng.choice(dies), present=False)
            case "down":
                world.node_down(f"sn0/n{rng.randrange(18):02d}")
            case "up":
                for node in sorted(world.dead):
                    world.node_up(node)
            case "rank":
                world.exited.add(
                    (f"j-job{rng.randrange(2)}", "decode", 0, rng.randrange(8), rng.randrange(1, 4))
                )
                world.agents()
            case "leader":
                world.new_leader()
            case _:
                world.settle()
        trace.append(repr(sorted(world.store.items())))
    world.exited.clear()
    for node in sorted(world.dead):
        world.node_up(node)
    for die in dies:
        world.fault(die, present=False)
    for _ in range(6):
        world.now += 10
        world.settle()
    return [*trace, repr(sorted(world.store.items()))]


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_keep_the_invariants_and_converge(world: World, seed: int) -> None:
    """Invariants hold after every step; after the faults stop every job runs, incidents close."""
    _storm(world, seed)
    for number in range(2):
        job = world.store[keys.job(f"j-job{number}")]
        assert job.state is JobState.READY, (job.state, job.why)
    incidents = [v for k, v in world.store.items() if k.startswith(keys.INCIDENTS)]
    assert all(incident.phase is IncidentPhase.CLOSED for incident in incidents)
