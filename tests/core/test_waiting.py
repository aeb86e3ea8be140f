"""What waiting jobs are told: every job a reason, the first of a kind the newest numbers."""

from __future__ import annotations

from dataclasses import replace

from raddle.core.lifecycle import HEADS_TOLD_MAX
from raddle.core.requests import Cordon, SubmitJob, Uncordon
from raddle.core.waiting import WaitingJobs
from raddle.model import keys
from raddle.model.job import Job, JobState
from raddle.model.types import Why
from tests.core.machines import make_role, make_spec
from tests.core.world import World, spec

DIES = "WAITS_FOR_DIES"


def waiting_jobs(*uids: str) -> WaitingJobs:
    found = WaitingJobs()
    for number, uid in enumerate(uids):
        told = Why(reason=DIES, message="needs 8, 4 are free")
        found.put(Job(uid=uid, spec=make_spec(make_role()), create_time=float(number), why=told))
    return found


def test_new_numbers_are_told_to_the_first_alone() -> None:
    """A sentence with other numbers goes to the first job of a shape, a new reason to all."""
    waiting = waiting_jobs("j-1", "j-2", "j-3")
    shape = waiting.shape_of("j-1")
    waiting.waits_for(shape, Why(reason=DIES, message="needs 8, 5 are free"), tell_head=True)
    assert list(waiting.untold) == ["j-1"]
    waiting.untold.clear()
    waiting.waits_for(shape, Why(reason=DIES, message="needs 8, 5 are free"), tell_head=True)
    assert not waiting.untold
    waiting.waits_for(shape, Why(reason=DIES, message="needs 8, 6 are free"), tell_head=False)
    assert not waiting.untold
    hosts = Why(reason="WAITS_FOR_HOSTS", message="needs 2 hosts, 1 is free")
    waiting.waits_for(shape, hosts, tell_head=False)
    assert list(waiting.untold) == ["j-1", "j-2", "j-3"]


def test_what_all_wait_for_is_known() -> None:
    """The newest sentence is known of every job of the shape, and of no other job."""
    waiting = waiting_jobs("j-1", "j-2")
    assert waiting.why("j-2") is None
    now = Why(reason=DIES, message="needs 8, 7 are free")
    waiting.waits_for(waiting.shape_of("j-1"), now, tell_head=False)
    assert waiting.why("j-1") == waiting.why("j-2") == now
    waiting.drop("j-2")
    assert waiting.why("j-2") is None


def test_the_reason_keeps_up_with_the_machine(world: World) -> None:
    """A job that waits is told how many dies are free now; those behind it are left alone."""
    whole = spec("first", ranks=72)
    roles = tuple(replace(r, slots_per_rank=min(1, r.slots_per_rank)) for r in whole.roles)
    world.ask(Cordon(subject="sn0/n00"))
    for name in ("first", "second"):
        request = SubmitJob(
            spec=replace(whole, name=name, roles=roles), job_uid=f"j-{name}", spec_digest=name
        )
        world.ask(request)
    world.settle()
    first, second = (world.store[keys.job(f"j-{name}")] for name in ("first", "second"))
    assert (first.state, first.why.reason) == (JobState.PENDING, DIES)
    world.ask(Cordon(subject="sn0/n01"))
    world.settle()
    again = world.store[keys.job("j-first")]
    assert again.why.reason == DIES
    assert again.why.message != first.why.message
    assert world.store[keys.job("j-second")] == second
    assert world.machine.context.state.waiting.why("j-second") == again.why
    world.ask(Uncordon(subject="sn0/n01"))
    world.settle()
    assert world.store[keys.job("j-first")].why == first.why


def test_few_records_follow_the_numbers(world: World) -> None:
    """However many kinds of jobs wait, a change of numbers rewrites a bounded number of jobs."""
    world.ask(Cordon(subject="sn0/n00"))
    whole = spec("many", ranks=72)
    for number in range(HEADS_TOLD_MAX + 4):
        roles = tuple(
            replace(r, slots_per_rank=min(1, r.slots_per_rank), max_sequences_per_rank=number + 1)
            for r in whole.roles
        )
        name = f"many-{number:02d}"
        request = SubmitJob(
            spec=replace(whole, name=name, roles=roles), job_uid=f"j-{name}", spec_digest=name
        )
        world.ask(request)
    world.settle()
    before = {k: v for k, v in world.store.items() if k.startswith(keys.JOBS)}
    assert {job.why.reason for job in before.values()} == {DIES}
    world.ask(Cordon(subject="sn0/n01"))
    world.settle()
    changed = [key for key, job in before.items() if world.store[key] != job]
    assert len(changed) == HEADS_TOLD_MAX
