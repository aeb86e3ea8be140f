"""The budget of restarts: how often a process that keeps ending is started again."""

from __future__ import annotations

from itertools import pairwise

from raddle.core.events import Woken
from raddle.core.restarts import BACKOFF_S, SETTLED_S, STARTS_AT_ONCE, STARTS_MAX
from raddle.model import keys
from raddle.model.job import JobState
from raddle.model.kinds import SeatState
from tests.core.world import World, submit


def end_all(world: World, uid: str) -> None:
    """Every decode process that runs ends; a moment later agents have acted."""
    for seat in world.store[keys.placement(uid)].instances[0].ranks:
        if seat.state is SeatState.ACTIVE:
            world.exited.add((uid, "decode", 0, seat.rank, seat.start_count))
    world.now += 0.02
    world.agents()
    world.now += 0.02
    world.handle(Woken())


def test_a_process_that_keeps_ending_is_started_ever_later_and_at_last_not_at_all(
    world: World,
) -> None:
    """Three starts at once, then longer and longer waits, then the job fails with the reason."""
    uid = submit(world)
    epochs: dict[int, float] = {}
    for _ in range(20_000):
        end_all(world, uid)
        job = world.store[keys.job(uid)]
        epochs.setdefault(job.epoch, world.now)
        if job.state is not JobState.RECOVERING:
            break
    moments = list(epochs.values())
    gaps = [after - before for before, after in pairwise(moments)]
    assert len(moments) == STARTS_MAX
    assert all(gap < BACKOFF_S for gap in gaps[: STARTS_AT_ONCE - 1])
    waits = gaps[STARTS_AT_ONCE - 1 :]
    assert waits == sorted(waits)
    assert waits[-1] > 8 * BACKOFF_S
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.why.reason) == (JobState.FAILED, "RESTART_BUDGET")
    assert "read its log" in job.why.message
    assert uid not in {item.job_uid for item in world.store[keys.assignment("sn0/n00")].jobs}


def test_a_job_that_waits_to_start_again_says_so(world: World) -> None:
    """The reason names how often its process was started, and when it will be again."""
    uid = submit(world)
    while world.store[keys.job(uid)].why.reason != "RESTART_BACKOFF":
        end_all(world, uid)
    message = world.store[keys.job(uid)].why.message
    assert f"started {STARTS_AT_ONCE} times in a row, again in 0.5 s" in message


def test_processes_that_lived_for_a_while_use_nothing_up(world: World) -> None:
    """Ends that are minutes apart are recovered from at once, however many they are."""
    uid = submit(world)
    for round_number in range(2 * STARTS_MAX):
        end_all(world, uid)
        world.settle()
        job = world.store[keys.job(uid)]
        assert (job.state, job.epoch) == (JobState.READY, 2 + round_number)
        world.now += SETTLED_S
