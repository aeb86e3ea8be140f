"""Cordons and drains: each comes and goes by itself, whoever else holds the same part."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.machine import Machine
from raddle.core.requests import (
    CancelMaintenance,
    Cordon,
    CreateMaintenance,
    Uncordon,
)
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import Hold
from raddle.model.incident import Maintenance, MaintenanceState
from raddle.model.kinds import HoldKind
from raddle.model.types import Why
from tests.core.world import World, ready_world, submit

NODE = "sn0/n05"
DIE = f"{NODE}/npu0/die0"


def drain(world: World, name: str, subject: str = NODE, timeout_s: float = 600.0) -> Maintenance:
    record: Maintenance = world.ask(
        CreateMaintenance(maintenance_id=name, subject=subject, timeout_s=timeout_s)
    )
    return record


def is_held(world: World, die: str = DIE) -> bool:
    return world.machine.context.cluster.is_held(die)


def kinds(world: World, subject: str = NODE) -> set[HoldKind]:
    """Kinds of holds on exactly this subject, in the store."""
    found = [v for k, v in world.store.items() if k.startswith(keys.HOLDS)]
    return {hold.kind for hold in found if hold.subject == subject}


def test_an_uncordon_leaves_the_drain(world: World) -> None:
    """A drained node that is cordoned and uncordoned stays drained, and the answer says so."""
    drain(world, "m-1")
    world.settle()
    world.ask(Cordon(subject=NODE))
    assert kinds(world) == {HoldKind.CORDON, HoldKind.DRAIN}
    left = world.ask(Uncordon(subject=NODE))
    assert [(hold.kind, hold.subject) for hold in left] == [(HoldKind.DRAIN, NODE)]
    assert kinds(world) == {HoldKind.DRAIN}
    assert is_held(world)
    assert world.store[keys.maintenance("m-1")].state is MaintenanceState.DRAINED
    with pytest.raises(PermanentError, match="m-1 --cancel") as refused:
        world.ask(Uncordon(subject=NODE))
    assert refused.value.reason is Reason.MANAGED_BY_OTHER


def test_a_cancelled_drain_leaves_the_cordon(world: World) -> None:
    """What an operator cordoned stays cordoned when a drain of it is cancelled or expires."""
    world.ask(Cordon(subject=NODE, message="fan noise"))
    drain(world, "m-1")
    world.ask(CancelMaintenance(maintenance_id="m-1"))
    assert kinds(world) == {HoldKind.CORDON}
    assert is_held(world)
    assert world.ask(Uncordon(subject=NODE)) == ()
    assert not is_held(world)


def test_an_expired_drain_leaves_the_cordon(world: World) -> None:
    """A drain that runs out of time takes its own hold with it and no other."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    for other in world.machine.context.cluster.node_names:
        world.ask(Cordon(subject=other))
    drain(world, "m-1", node, timeout_s=0.3)
    world.settle()
    assert world.store[keys.maintenance("m-1")].state is MaintenanceState.EXPIRED
    assert kinds(world, node) == {HoldKind.CORDON}
    world.ask(CancelMaintenance(maintenance_id="m-1"))
    assert world.store[keys.maintenance("m-1")].state is MaintenanceState.EXPIRED
    assert kinds(world, node) == {HoldKind.CORDON}


def test_a_second_drain_is_the_first(world: World) -> None:
    """Who drains what is being drained, or is drained, gets the maintenance that there is."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    for name, state in (("m-1", MaintenanceState.DRAINING), ("m-2", MaintenanceState.DRAINED)):
        assert drain(world, name, node).id == "m-1"
        assert world.store[keys.maintenance("m-1")].state is state
        world.settle()
    assert [k for k in world.store if k.startswith(keys.MAINTENANCE)] == [keys.maintenance("m-1")]


def test_two_old_maintenances_of_one_subject(world: World) -> None:
    """Of two maintenances of one subject in the store, only the end of the last lifts the hold."""
    drain(world, "m-1")
    world.settle()
    first = world.store[keys.maintenance("m-1")]
    records = dict(world.store)
    records[keys.maintenance("m-2")] = replace(first, id="m-2")
    world.store = records
    world.machine = Machine(dict(records), now=world.now)
    world.ask(CancelMaintenance(maintenance_id="m-1"))
    assert kinds(world) == {HoldKind.DRAIN}
    world.ask(CancelMaintenance(maintenance_id="m-2"))
    assert kinds(world) == set()
    assert not is_held(world)


@pytest.mark.parametrize("timeout_s", [0.0, -5.0])
def test_a_drain_needs_time(world: World, timeout_s: float) -> None:
    """A drain without a time above zero is refused and holds nothing."""
    with pytest.raises(PermanentError, match="above 0"):
        drain(world, "m-1", timeout_s=timeout_s)
    assert kinds(world) == set()


def test_a_dry_drain_counts_ranks(world: World) -> None:
    """A dry run says how many ranks would have to move, has no id, and writes nothing."""
    uid = submit(world)
    ranks = world.store[keys.placement(uid)].instances[0].ranks
    node = ranks[0].node
    before = dict(world.store)
    record = world.ask(
        CreateMaintenance(maintenance_id="m-1", subject=node, timeout_s=5.0, dry_run=True)
    )
    here = [
        r
        for part in world.store[keys.placement(uid)].instances
        for r in part.ranks
        if r.node == node
    ]
    assert (record.id, record.ranks_total) == ("", len(here))
    assert record.why == Why(reason="DRY_RUN", message=f"{len(here)} ranks would have to move away")
    assert world.store == before


@pytest.mark.parametrize("kind", [HoldKind.CORDON, HoldKind.DRAIN])
def test_holds_of_older_releases(world: World, kind: HoldKind) -> None:
    """A hold under the key that older releases used counts, takes another beside it, and ends."""
    drain(world, "m-1")
    world.settle()
    old = Hold(subject=NODE, kind=kind, reason=kind, message="old", created_by="client/a")
    records = {k: v for k, v in world.store.items() if not k.startswith(keys.HOLDS)}
    records[keys.only_hold(NODE)] = old
    world.store = records
    world.machine = Machine(dict(records), now=world.now)
    assert is_held(world)
    world.ask(Cordon(subject=NODE))
    assert world.store[keys.only_hold(NODE)] == old
    world.ask(Uncordon(subject=NODE))
    assert kinds(world) == {kind} - {HoldKind.CORDON}
    world.ask(CancelMaintenance(maintenance_id="m-1"))
    assert kinds(world) == set()
    assert not is_held(world)


def test_a_cancelled_drain_moves_nothing_any_more(world: World) -> None:
    """Ranks that waited for room to move away stay where they are once the drain is cancelled."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    drain(world, "m-1", node)
    world.ask(CancelMaintenance(maintenance_id="m-1"))
    assert not world.machine.context.is_draining(node)


SUBJECTS = ("sn0", "sn0/n05", "sn0/n05/npu0", DIE)
STEPS = st.lists(st.tuples(st.sampled_from("cudx"), st.sampled_from(SUBJECTS)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_a_part_is_held_while_anything_holds_it(steps: list[tuple[str, str]]) -> None:
    """Whatever the order of cordons, drains and their ends, the die is held if one covers it."""
    world = ready_world()
    cordoned: set[str] = set()
    drained: dict[str, str] = {}
    for number, (step, subject) in enumerate(steps):
        if step == "c":
            world.ask(Cordon(subject=subject))
            cordoned.add(subject)
        elif step == "d":
            drained[subject] = drain(world, f"m-{number}", subject).id
        elif step == "u" and subject in cordoned:
            world.ask(Uncordon(subject=subject))
            cordoned.discard(subject)
        elif step == "x" and subject in drained:
            world.ask(CancelMaintenance(maintenance_id=drained.pop(subject)))
        assert is_held(world) == bool(cordoned or drained)
        assert {s for s in SUBJECTS if HoldKind.CORDON in kinds(world, s)} == cordoned
        assert {s for s in SUBJECTS if HoldKind.DRAIN in kinds(world, s)} == set(drained)
    world.new_leader()
    assert is_held(world) == bool(cordoned or drained)


def reasons(world: World, subject: str = NODE) -> list[str]:
    found = [v for k, v in world.store.items() if k.startswith(keys.HOLDS)]
    return [hold.reason for hold in found if hold.subject == subject]


def test_a_persons_cordon_goes_over_a_programs(world: World) -> None:
    """So it stays when the program takes its own back; the other way round nothing changes."""
    world.ask(Cordon(subject=NODE, reason="HOST_CORDONED"))
    assert reasons(world) == ["HOST_CORDONED"]
    world.ask(Cordon(subject=NODE, message="fan noise"))
    world.ask(Cordon(subject=NODE, reason="HOST_CORDONED"))
    assert reasons(world) == ["CORDON"]
    left = world.ask(Uncordon(subject=NODE, reason="HOST_CORDONED"))
    assert [hold.reason for hold in left] == ["CORDON"]
    world.ask(Uncordon(subject=NODE))
    assert world.ask(Uncordon(subject=NODE, reason="HOST_CORDONED")) == ()
