"""Pool members of a job: their slots, and how they hand their blocks on before they end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raddle.core.events import StatsReported
from raddle.core.kvcache.slots import unpack_slots
from raddle.core.requests import CancelMaintenance, CreateMaintenance, SubmitJob
from raddle.model import keys
from raddle.model.health import AgentHealth, AgentRegistration
from raddle.model.incident import MaintenanceState
from raddle.model.job import EngineSpec, JobState
from raddle.model.kinds import RoleKind, SeatState
from raddle.model.stats import KvRepair, RankStats
from raddle.model.types import RankKey
from tests.core.world import World, spec, submit

UID = "j-pooled"
DONE = KvRepair(is_handed_on=True, copies_made=5)


def cache_seats(world: World, uid: str = UID) -> list[Any]:
    placement = world.store[keys.placement(uid)]
    return [
        rank
        for part in placement.instances
        if part.role == "cache"
        for rank in part.ranks
        if rank.state is SeatState.ACTIVE
    ]


def members(world: World, uid: str = UID) -> list[Any]:
    return [m for m in world.store[keys.routes(uid)].members if m.kind is RoleKind.CACHE]


def submit_pool(world: World, ranks: int = 3) -> None:
    """A job whose pool members are the reference engine's."""
    for node in world.machine.context.cluster.node_names:
        registration = AgentRegistration(
            node=node, drivers=("reference", "simulated"), host_memory_bytes=10**12
        )
        world.observe(keys.registration(node), registration)
        world.observe(keys.health(node), AgentHealth(node=node, boot_id="b"))
    job = spec("pooled")
    roles = tuple(
        replace(role, ranks=ranks, engine=EngineSpec(driver="reference"))
        if role.kind is RoleKind.CACHE
        else role
        for role in job.roles
    )
    request = SubmitJob(
        spec=replace(job, roles=roles), job_uid=UID, spec_digest="d", idempotency_key=""
    )
    world.ask(request)
    world.settle()


def drain(world: World, node: str, timeout_s: float = 600.0) -> None:
    request = CreateMaintenance(maintenance_id="m-1", subject=node, timeout_s=timeout_s)
    world.ask(request)
    world.settle()


def say(world: World, seat: Any, repair: KvRepair, epoch: int | None = None) -> None:
    """The member in the seat tells where its repair stands."""
    key = RankKey(role="cache", instance=0, rank=seat.rank)
    status = world.machine.context.state.rank_status(UID, seat.node, key)
    assert status is not None
    told = epoch if epoch is not None else world.store[keys.job(UID)].epoch
    stats = RankStats(rank=key, incarnation=status.incarnation, epoch=told, kv_repair=repair)
    world.handle(StatsReported(seat.node, UID, (stats,)))
    world.settle()


def maintenance(world: World) -> Any:
    return world.store[keys.maintenance("m-1")]


def test_every_slot_has_its_keepers(world: World) -> None:
    """The placement names each member's slots, the routes tell them to ranks."""
    submit_pool(world)
    slots = [slot for seat in cache_seats(world) for slot in unpack_slots(seat.kv_slots)]
    assert sorted(slots) == sorted([*range(256)] * 2)
    assert [m.kv_slots for m in members(world)] == [s.kv_slots for s in cache_seats(world)]
    assert {m.start_epoch for m in members(world)} == {1}


def test_a_lost_member_moves_no_slots_of_others(world: World) -> None:
    """The others keep what they kept, and share what it kept."""
    submit_pool(world, ranks=4)
    before = {seat.rank: set(unpack_slots(seat.kv_slots)) for seat in cache_seats(world)}
    world.exited.add((UID, "cache", 0, 0, 1))
    world.settle()
    assert world.store[keys.job(UID)].epoch == 2
    after = {seat.rank: set(unpack_slots(seat.kv_slots)) for seat in cache_seats(world)}
    assert sorted(after) == [1, 2, 3]
    assert all(len(before[rank] - after[rank]) <= 4 for rank in after)
    assert sum(map(len, after.values())) == 2 * 256


def test_a_drained_member_hands_its_blocks_on_before_it_ends(world: World) -> None:
    """First all learn that it takes none any more; it ends when it says that others have all."""
    submit_pool(world)
    seat = cache_seats(world)[0]
    drain(world, seat.node)
    job = world.store[keys.job(UID)]
    assert (job.state, maintenance(world).state) == (JobState.READY, MaintenanceState.DRAINING)
    assert maintenance(world).why.reason == "HANDING_ON"
    there = cache_seats(world)[0]
    assert (there.node, there.start_count) == (seat.node, seat.start_count)
    assert (there.kv_draining, there.kv_slots) == (True, b"")
    assert [m.kv_draining for m in members(world)] == [True, False, False]
    others = [slot for s in cache_seats(world)[1:] for slot in unpack_slots(s.kv_slots)]
    assert sorted(others) == sorted([*range(256)] * 2)
    say(world, there, KvRepair(copies_left=7))
    assert "7 copies" in maintenance(world).why.message
    assert cache_seats(world)[0].node == seat.node
    say(world, there, DONE)
    assert maintenance(world).state is MaintenanceState.DRAINED
    left = cache_seats(world)
    assert all(s.node != seat.node and not s.kv_draining for s in left)
    assert sum(len(unpack_slots(s.kv_slots)) for s in left) == 2 * 256


def test_what_was_said_of_another_epoch_or_process_ends_nothing(world: World) -> None:
    """Only a word of the running process at the epoch that told the drain counts."""
    submit_pool(world)
    seat = cache_seats(world)[0]
    say(world, seat, DONE)
    drain(world, seat.node)
    assert maintenance(world).state is MaintenanceState.DRAINING
    say(world, seat, DONE, epoch=1)
    key = RankKey(role="cache", instance=0, rank=seat.rank)
    epoch = world.store[keys.job(UID)].epoch
    stats = RankStats(rank=key, incarnation="another", epoch=epoch, kv_repair=DONE)
    world.handle(StatsReported(seat.node, UID, (stats,)))
    world.settle()
    assert maintenance(world).state is MaintenanceState.DRAINING
    assert cache_seats(world)[0].node == seat.node


def test_a_new_leader_goes_on_with_a_drain(world: World) -> None:
    """It knows from the placement who hands on, and waits for the member's word."""
    submit_pool(world)
    seat = cache_seats(world)[0]
    drain(world, seat.node)
    world.new_leader()
    world.settle()
    assert cache_seats(world)[0].node == seat.node
    say(world, cache_seats(world)[0], DONE)
    assert maintenance(world).state is MaintenanceState.DRAINED


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_a_drain_that_ends_gives_the_member_its_slots_back(world: World, how: str) -> None:
    """Cancelled or out of time: the process was never stopped, and it takes blocks again."""
    submit_pool(world)
    seat = cache_seats(world)[0]
    drain(world, seat.node, timeout_s=600.0 if how == "cancelled" else 5.0)
    assert cache_seats(world)[0].kv_draining
    if how == "cancelled":
        world.ask(CancelMaintenance(maintenance_id="m-1"))
    else:
        world.now += 5.0
    world.settle()
    back = cache_seats(world)[0]
    assert (back.node, back.start_count) == (seat.node, seat.start_count)
    assert not back.kv_draining
    assert len(unpack_slots(back.kv_slots)) == pytest.approx(2 * 256 / 3, abs=2)
    assert world.store[keys.job(UID)].state is JobState.READY


def test_a_member_that_dies_while_it_hands_on_is_lost_like_any(world: World) -> None:
    """Nobody waits for its word any more: it is started elsewhere, and the drain is done."""
    submit_pool(world)
    seat = cache_seats(world)[0]
    drain(world, seat.node)
    world.exited.add((UID, "cache", 0, seat.rank, seat.start_count))
    world.settle()
    assert maintenance(world).state is MaintenanceState.DRAINED
    assert all(s.node != seat.node for s in cache_seats(world))


def test_members_of_other_engines_move_at_once(world: World) -> None:
    """Where nobody can hand blocks on, a drain waits for nobody."""
    uid = submit(world)
    seat = cache_seats(world, uid)[0]
    drain(world, seat.node)
    assert maintenance(world).state is MaintenanceState.DRAINED
    assert all(s.node != seat.node for s in cache_seats(world, uid))
