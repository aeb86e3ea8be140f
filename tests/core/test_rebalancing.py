"""Streamed loads in the machine: gathered, acted on when it pays, used by recoveries."""

from __future__ import annotations

import numpy as np
import pytest

from raddle.core.events import AgentStreamBroken, StatsReported
from raddle.core.expert_loads import HALF_LIFE_S, LOOK_EVERY_S, ExpertLoads
from raddle.core.experts.balance import balancedness
from raddle.core.experts.layout import FloatArray
from raddle.core.experts.maps import to_array
from raddle.core.requests import ApplySuperNode
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.job import JobState
from raddle.model.stats import ExpertLoad, RankStats
from raddle.model.types import RankKey
from tests.core.expert_cases import make_layout
from tests.core.world import World, submit

RANK = RankKey(role="decode", instance=0, rank=0)


@pytest.fixture
def world() -> World:
    world = World()
    machine = load_machine("nvl72")
    world.ask(ApplySuperNode(supernode=machine))
    for node in machine.node_names():
        world.node_up(node)
    world.now += 10
    return world


def rows(tokens: FloatArray) -> tuple[ExpertLoad, ...]:
    return tuple(
        ExpertLoad(layer=layer, tokens=tuple(map(int, row))) for layer, row in enumerate(tokens)
    )


def shape_of(world: World, uid: str) -> tuple[int, int]:
    expert_map = world.store[keys.expert_maps(uid, 1)].instances[0].expert_map
    return len(expert_map.layers), expert_map.experts


def report(world: World, uid: str, tokens: FloatArray, *, epoch: int = 0) -> None:
    """Rank 0's loads, at the epoch in service."""
    stats = RankStats(rank=RANK, epoch=epoch or world.store[keys.job(uid)].epoch)
    stats = RankStats(rank=RANK, epoch=stats.epoch, expert_loads=rows(tokens))
    world.handle(StatsReported("sn0/n00", uid, (stats,)))


def skewed(shape: tuple[int, int], seed: int = 0) -> FloatArray:
    """Half of the experts carry ten times the load of the others."""
    hot = np.random.default_rng(seed).permuted(np.arange(shape[1]) % 2 == 0)
    return np.tile(np.where(hot, 10_000.0, 1_000.0), (shape[0], 1))


def test_a_shift_of_loads_starts_an_epoch_with_a_better_map(world: World) -> None:
    """Due, ready and worth it: the same members fence, load what moves, and go on."""
    uid = submit(world)
    tokens = skewed(shape_of(world, uid))
    report(world, uid, tokens)
    assert world.store[keys.job(uid)].epoch == 1
    world.now += LOOK_EVERY_S + 1
    report(world, uid, tokens)
    job = world.store[keys.job(uid)]
    assert (job.epoch, job.state, job.why.reason) == (2, JobState.RECOVERING, "REBALANCING")
    old, new = (
        to_array(world.store[keys.expert_maps(uid, epoch)].instances[0].expert_map)
        for epoch in (1, 2)
    )
    layout = make_layout(8, 6)
    assert balancedness(new, tokens, layout) > 1.05 * balancedness(old, tokens, layout)
    moves = [
        move
        for key, value in world.store.items()
        if key.startswith(keys.ASSIGNMENTS)
        for assigned in value.jobs
        for rank in assigned.ranks
        for move in rank.moves
    ]
    assert moves
    assert all(new[move.layer, move.slot] == move.expert for move in moves)
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.epoch, job.live_epoch, job.state) == (2, 2, JobState.READY)


def test_no_agent_is_left_behind_for_a_better_map(world: World) -> None:
    """A job keeps its map while one of its agents is silent: a new epoch needs them all."""
    uid = submit(world)
    report(world, uid, skewed(shape_of(world, uid)))
    world.now += LOOK_EVERY_S + 1
    silent = world.store[keys.placement(uid)].instances[0].ranks[-1].node
    world.handle(AgentStreamBroken(silent))
    world.observe(keys.health(silent), None)
    report(world, uid, skewed(shape_of(world, uid)))
    assert world.store[keys.job(uid)].epoch == 1
    world.node_up(silent)
    report(world, uid, skewed(shape_of(world, uid)))
    assert world.store[keys.job(uid)].epoch == 2


def test_the_same_loads_come_to_rest(world: World) -> None:
    """Each step moves a tenth of the slots at most; after a few nothing moves any more."""
    uid = submit(world)
    tokens = skewed(shape_of(world, uid))
    epochs = []
    for _ in range(12):
        report(world, uid, tokens)
        world.now += LOOK_EVERY_S + 1
        world.settle()
        epochs.append(world.store[keys.job(uid)].epoch)
    assert 2 <= epochs[-1] <= 4
    assert epochs[-6:] == [epochs[-1]] * 6


def test_few_tokens_and_even_loads_move_nothing(world: World) -> None:
    """What may be chance, and what is balanced, is left alone."""
    uid = submit(world)
    shape = shape_of(world, uid)
    for tokens in (skewed(shape) / 1_000, np.full(shape, 5_000.0)):
        for _ in range(3):
            report(world, uid, tokens)
            world.now += LOOK_EVERY_S + 1
    assert world.store[keys.job(uid)].epoch == 1


def test_loads_of_an_older_epoch_do_not_count(world: World) -> None:
    """A rank that still counts at another epoch is not listened to."""
    uid = submit(world)
    for _ in range(3):
        report(world, uid, skewed(shape_of(world, uid)), epoch=7)
        world.now += LOOK_EVERY_S + 1
    assert world.machine.context.expert_loads.of(uid, "decode", 0) is None
    assert world.store[keys.job(uid)].epoch == 1


def test_a_recovery_uses_the_loads(world: World) -> None:
    """With known loads a lost rank's experts are placed for balance, not for equal loads."""
    uid = submit(world)
    tokens = skewed(shape_of(world, uid))
    report(world, uid, tokens)
    die = world.store[keys.placement(uid)].instances[0].ranks[3].die
    world.fault(die, present=True)
    world.settle()
    job = world.store[keys.job(uid)]
    assert job.state is JobState.READY
    assert job.epoch > 1
    # The job is whole and sound again: `validate` ran after each step.


def test_an_operator_may_forbid_rebalances() -> None:
    """With 0 s between looks no job is ever looked at; its loads are known all the same."""
    loads = ExpertLoads(look_every_s=0.0)
    assert not any(loads.take_due("job", 1, now) for now in (0.0, 1.0, 1e9))
    loads.take("job", RANK, rows(np.full((1, 4), 500.0)), (1, 4), 0.0)
    assert loads.of("job", "decode", 0) is not None


def test_old_tokens_fade() -> None:
    """After a half-life a token counts half; rows of another shape count nothing."""
    loads = ExpertLoads()
    loads.take("j", RANK, rows(np.full((2, 3), 1_000.0)), (2, 3), 0.0)
    loads.take("j", RANK, (ExpertLoad(layer=0, tokens=(1, 2)),), (2, 3), HALF_LIFE_S)
    loads.take("j", RANK, (ExpertLoad(layer=9, tokens=(1, 2, 3)),), (2, 3), HALF_LIFE_S)
    found = loads.of("j", "decode", 0)
    assert found is not None
    assert found == pytest.approx(np.full((2, 3), 500.0))
    loads.forget("j")
    assert loads.of("j", "decode", 0) is None
