"""How long a recovery waits for agents that are silent, and what a host has to do with it."""

from __future__ import annotations

from typing import Any

import pytest

from raddle.core.detection import CONTROL_LOST_S, UNKNOWN_LOST_S
from raddle.core.events import AgentStreamBroken, NodeProbed, Woken
from raddle.model import keys
from raddle.model.health import AgentHealth, AgentRegistration
from raddle.model.incident import IncidentPhase
from raddle.model.job import Job, JobState
from raddle.model.kinds import NodeState
from tests.core.world import World, ready_world, submit


def recovering_behind_the_brake(world: World) -> tuple[str, str]:
    """(job, node): a die failed while another node of the job is unknown."""
    world.machine.context.nodes.storm_nodes_max = 0
    uid = submit(world)
    ranks = world.store[keys.placement(uid)].instances[0].ranks
    silent = ranks[0].node
    world.node_down(silent)
    world.settle()
    assert job_of(world, uid).epoch == 1
    world.fault(next(seat.die for seat in ranks if seat.node != silent), present=True)
    world.now += 0.1
    world.handle(Woken())
    assert state_of(world, silent) is NodeState.UNKNOWN
    assert job_of(world, uid).state is JobState.RECOVERING
    return uid, silent


def job_of(world: World, uid: str) -> Job:
    found: Any = world.store[keys.job(uid)]
    assert isinstance(found, Job)
    return found


def state_of(world: World, node: str) -> NodeState:
    return world.machine.context.nodes.node(node).state


def come_back(world: World, node: str) -> None:
    world.dead.discard(node)
    world.observe(keys.health(node), AgentHealth(node=node, boot_id="b2"))


def test_a_recovery_does_not_wait_for_ever_for_a_node_behind_the_storm_brake(
    world: World,
) -> None:
    """A die fails while a node of the job is unknown: that is waited for, then left behind."""
    uid, silent = recovering_behind_the_brake(world)
    world.settle()
    waiting = job_of(world, uid)
    assert (waiting.state, waiting.epoch) == (JobState.RECOVERING, 2)
    assert state_of(world, silent) is NodeState.UNKNOWN
    began = world.now
    world.now = began + UNKNOWN_LOST_S - 1.3
    world.handle(Woken())
    assert job_of(world, uid).epoch == 2
    world.now = began + UNKNOWN_LOST_S
    world.settle()
    job, incident = job_of(world, uid), world.store[keys.incident("i-000001")]
    assert (job.state, job.live_epoch, incident.phase) == (JobState.READY, 3, IncidentPhase.CLOSED)
    assert {fault.code for fault in incident.faults} == {"80E18005", "AGENT_SILENT"}
    assert silent not in {seat.node for seat in world.store[keys.placement(uid)].instances[0].ranks}


def test_an_unknown_node_that_returns_in_time_takes_part(world: World) -> None:
    """Ten seconds behind the storm brake, then back: the recovery goes on with all its ranks."""
    uid, silent = recovering_behind_the_brake(world)
    world.now += 10.0
    world.handle(Woken())
    assert job_of(world, uid).epoch == 2
    come_back(world, silent)
    world.settle()
    job = job_of(world, uid)
    assert (job.state, job.live_epoch) == (JobState.READY, 2)
    assert silent in {s.node for s in world.store[keys.placement(uid)].instances[0].ranks}


def test_an_unknown_node_that_answers_is_not_judged_sooner(world: World) -> None:
    """After six seconds its ranks answer: it has the rest of the time that it had before."""
    uid, silent = recovering_behind_the_brake(world)
    began = world.now
    world.now = began + 6.0
    world.handle(NodeProbed(silent, answered=True))
    assert state_of(world, silent) is NodeState.SUSPECT
    assert job_of(world, uid).epoch == 2
    world.now = began + UNKNOWN_LOST_S - 0.5
    world.handle(Woken())
    assert job_of(world, uid).epoch == 2
    world.now = began + UNKNOWN_LOST_S + 0.1
    world.handle(Woken())
    world.settle()
    assert job_of(world, uid).live_epoch == 3


def test_an_agent_that_falls_silent_late_has_its_own_time(world: World) -> None:
    """A second agent goes silent, its ranks answer: its ten seconds begin then."""
    uid, first = recovering_behind_the_brake(world)
    began = world.now
    seats = world.store[keys.placement(uid)].instances[0].ranks
    second = next(seat.node for seat in seats if seat.node != first)
    world.now = began + 1.0
    world.handle(AgentStreamBroken(second))
    world.observe(keys.health(second), None)
    assert state_of(world, second) is NodeState.SUSPECT
    world.now = began + 1.0 + CONTROL_LOST_S - 0.5
    world.handle(Woken())
    assert job_of(world, uid).epoch == 2
    world.now = began + 1.0 + CONTROL_LOST_S + 0.1
    world.handle(Woken())
    world.now += 0.1
    world.handle(Woken())
    assert job_of(world, uid).epoch == 3


def test_a_wait_goes_on_when_all_else_is_built_anew(world: World) -> None:
    """The store was away: the machine of the same term that follows counts on."""
    uid, _ = recovering_behind_the_brake(world)
    began, before = world.now, world.machine
    world.now = began + 8.0
    world.handle(Woken())
    world.new_leader()
    world.machine.remember(before)
    assert world.machine.context.waits == before.context.waits
    assert job_of(world, uid).epoch == 2


def test_a_host_is_known_from_registrations_old_and_new() -> None:
    """An agent moves to another host; the next leader reads the same from the records."""
    world = ready_world()
    node = "sn0/n00"
    for host in ("worker-1", "worker-2"):
        world.observe(keys.registration(node), AgentRegistration(node=node, host=host))
        assert world.machine.context.nodes.node(node).host == host
    world.new_leader()
    assert world.machine.context.nodes.node(node).host == "worker-2"


@pytest.mark.parametrize("answers", [True, False], ids=["its ranks answer", "behind the brake"])
def test_an_agent_that_falls_silent_after_its_first_word_is_not_waited_for_for_ever(
    world: World, *, answers: bool
) -> None:
    """All ranks are fenced, one agent goes silent in the repair: the job goes on without it."""
    if not answers:
        world.machine.context.nodes.storm_nodes_max = 0
    uid = submit(world)
    ranks = world.store[keys.placement(uid)].instances[0].ranks
    silent = ranks[0].node
    world.repairing.add(uid)
    world.fault(next(seat.die for seat in ranks if seat.node != silent), present=True)
    world.settle()
    assert job_of(world, uid).state is JobState.RECOVERING
    began = world.now
    world.handle(AgentStreamBroken(silent))
    world.observe(keys.health(silent), None)
    world.handle(NodeProbed(silent, answered=answers))
    if not answers:
        world.dead.add(silent)
        world.now += 0.6
        world.handle(Woken())
    patience_s = CONTROL_LOST_S if answers else UNKNOWN_LOST_S
    world.now = began + patience_s - 1.0
    world.handle(Woken())
    assert job_of(world, uid).epoch == 2
    world.dead.add(silent)
    world.repairing.clear()
    world.now = began + patience_s + 1.0
    world.settle()
    job, incident = job_of(world, uid), world.store[keys.incident("i-000001")]
    assert (job.state, job.live_epoch) == (JobState.READY, 3)
    assert "AGENT_SILENT" in {fault.code for fault in incident.faults}


def test_the_silences_of_an_agent_that_comes_and_goes_add_up(world: World) -> None:
    """An agent that crashes again and again before it has said a word is left behind."""
    uid = submit(world)
    ranks = world.store[keys.placement(uid)].instances[0].ranks
    flapping = ranks[0].node
    world.fault(next(seat.die for seat in ranks if seat.node != flapping), present=True)
    world.now += 0.1
    world.handle(Woken())
    for life in range(5):
        assert job_of(world, uid).epoch == 2
        world.handle(AgentStreamBroken(flapping))
        world.observe(keys.health(flapping), None)
        assert state_of(world, flapping) is NodeState.SUSPECT
        world.now += 2.0
        world.handle(Woken())
        world.observe(keys.health(flapping), AgentHealth(node=flapping, boot_id=f"life-{life}"))
        assert state_of(world, flapping) is NodeState.READY
        world.now += 10.0
        world.handle(Woken())
    world.handle(AgentStreamBroken(flapping))
    world.observe(keys.health(flapping), None)
    world.now += 0.1
    world.handle(Woken())
    assert job_of(world, uid).epoch == 3
