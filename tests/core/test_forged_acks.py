"""Acknowledgements that no rank can have given: of epochs that no leader decided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raddle.core.machine import RECORD_SET_ASIDE
from raddle.core.state import EPOCHS_AHEAD_MAX
from raddle.model import keys
from raddle.model.job import JobState
from tests.core.world import World, ready_world, submit

INT64_MAX = 2**63 - 1


@pytest.fixture
def world() -> World:
    return ready_world()


def acknowledge(world: World, uid: str, epoch: int) -> str:
    """An agent says that its ranks are at an epoch; gives the key of its record."""
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    key = keys.acks(node, uid)
    ranks = tuple(replace(status, epoch=epoch) for status in world.store[key].ranks)
    world.observe(key, replace(world.store[key], ranks=ranks))
    return key


def told(world: World) -> list[str]:
    events = [value for key, value in world.store.items() if key.startswith(keys.AUDIT)]
    return [event.message for event in events if event.kind == RECORD_SET_ASIDE]


@pytest.mark.parametrize("forged", [EPOCHS_AHEAD_MAX + 2, 2**62, INT64_MAX - 1, INT64_MAX])
def test_an_epoch_that_nobody_can_have_decided_is_not_believed(world: World, forged: int) -> None:
    """The record is set aside and told with node, job and epoch; the job stays where it is."""
    uid = submit(world)
    key = acknowledge(world, uid, forged)
    (message,) = told(world)
    assert key in message
    assert str(forged) in message
    assert set(world.machine.context.state.set_aside) == {key}
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch) == (JobState.READY, 1)
    # What the agent says next is heard again.
    assert world.machine.context.state.set_aside == {}


def test_the_next_leader_does_not_believe_it_either(world: World) -> None:
    """What is found at the beginning of a term is judged like what comes later."""
    uid = submit(world)
    key = acknowledge(world, uid, INT64_MAX)
    world.new_leader()
    assert set(world.machine.context.state.set_aside) == {key}
    assert len(told(world)) == 2
    world.settle()
    assert world.store[keys.job(uid)].epoch == 1


def test_epochs_that_a_store_set_back_forgot_are_believed(world: World) -> None:
    """As far ahead as a week's decisions: the job goes above what its ranks are at."""
    uid = submit(world)
    acknowledge(world, uid, EPOCHS_AHEAD_MAX + 1)
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch) == (JobState.READY, EPOCHS_AHEAD_MAX + 2)
    assert told(world) == []
