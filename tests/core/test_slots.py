"""Slots of the pool's map: even shares, few moves, copies on different nodes and racks."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raddle.core.kvcache.pool import PoolMap, PoolMember
from raddle.core.kvcache.slots import (
    SPARE,
    SlotMember,
    assign_slots,
    pack_slots,
    slots_for,
    unpack_slots,
)

#: Hosts by name, `r2/0` is in rack r2.
Pool = dict[str, SlotMember]


def hosts(*racks: int) -> Pool:
    """So many hosts in each rack."""
    names = [(f"r{rack}", n) for rack, size in enumerate(racks) for n in range(size)]
    return {f"{rack}/{n}": SlotMember(node=f"{rack}/{n}", rack=rack) for rack, n in names}


def assigned(pool: Pool, slots: int, replicas: int) -> Pool:
    """The pool after a change, checked: each slot has its copies, no node one twice."""
    found = assign_slots(list(pool.values()), slots, replicas)
    after = {
        name: replace(member, slots=mine)
        for (name, member), mine in zip(pool.items(), found, strict=True)
    }
    copies = min(replicas, len({m.node for m in pool.values() if m.weight > 0}))
    for keepers in keepers_of(after, slots):
        assert len(keepers) == copies
        assert len({after[name].node for name in keepers}) == copies
    return after


def keepers_of(pool: Pool, slots: int) -> list[list[str]]:
    keepers: list[list[str]] = [[] for _ in range(slots)]
    for name, member in pool.items():
        for slot in member.slots:
            keepers[slot].append(name)
    return keepers


def moved(before: Pool, after: Pool) -> float:
    """Copies that are where they were not, as a share of all."""
    new = sum(
        len(set(member.slots) - set(before[name].slots if name in before else ()))
        for name, member in after.items()
    )
    return new / sum(len(member.slots) for member in after.values())


def sharing_a_rack(pool: Pool, slots: int) -> float:
    """Share of slots with two copies in one rack."""
    keepers = keepers_of(pool, slots)
    return sum(len({pool[n].rack for n in names}) < len(names) for names in keepers) / slots


def largest(pool: Pool) -> float:
    """The largest member's share, as a multiple of an even one."""
    sizes = [len(member.slots) for member in pool.values()]
    return max(sizes) * len(sizes) / sum(sizes)


SHAPES = [
    (4, 4), (5, 4), (4, 1), (4, 2), (8,), (1, 1, 1, 1), (3, 3, 2), (2, 2, 2), (4, 3, 2, 1),
    (4, 4, 4), (4,) * 6, (4,) * 12,
]  # fmt: skip


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_member_more_or_less_moves_at_most_its_share(
    shape: tuple[int, ...], replicas: int
) -> None:
    """Adding or removing any one of n members moves at most 1.1/n, however racks are filled."""
    slots = slots_for(sum(shape) + 1)
    before = assigned(hosts(*shape), slots, replicas)
    count = len(before)
    for name in list(before)[:: max(1, count // 6)]:
        rest = {other: member for other, member in before.items() if other != name}
        if len(rest) >= replicas:
            assert moved(before, assigned(rest, slots, replicas)) <= 1.1 / count
    for rack in dict.fromkeys(["r0", f"r{len(shape) - 1}", "new"]):
        more = before | {"new": SlotMember(node="new", rack=rack)}
        assert moved(before, assigned(more, slots, replicas)) <= 1.1 / (count + 1)


@settings(max_examples=60, deadline=None)
@given(
    racks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    replicas=st.integers(1, 3),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=12),
)
@example(racks=[1, 2], replicas=3, steps=[(True, 0), (True, 2), (False, 1), (True, 0), (False, 0)])
def test_the_bound_holds_after_any_history(
    racks: list[int], replicas: int, steps: list[tuple[bool, int]]
) -> None:
    """Members come and go in any order: no step moves more, no member ever keeps much more."""
    everybody = hosts(*(4 for _ in racks), 4)
    slots = slots_for(len(everybody))
    pool = assigned(hosts(*racks), slots, replicas)
    for comes, draw in steps:
        absent = [name for name in everybody if name not in pool]
        if comes and absent:
            name = absent[draw % len(absent)]
            after = assigned(pool | {name: everybody[name]}, slots, replicas)
        elif not comes and len(pool) > max(replicas, 1) + 1:
            name = list(pool)[draw % len(pool)]
            rest = {other: member for other, member in pool.items() if other != name}
            after = assigned(rest, slots, replicas)
        else:
            continue
        assert moved(pool, after) <= 1.1 / max(len(pool), len(after))
        assert largest(after) <= 1.1
        pool = after


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (2, 2, 2), (3, 3, 2), (4,) * 12], ids=str)
def test_copies_stand_in_different_racks_where_shares_allow_it(
    shape: tuple[int, ...], replicas: int
) -> None:
    """No rack has more than an n-th of all hosts: a new pool has no slot with two copies there."""
    slots = slots_for(sum(shape))
    pool = assigned(hosts(*shape), slots, replicas)
    possible = max(shape) * replicas <= sum(shape)
    assert (sharing_a_rack(pool, slots) == 0) == possible
    assert largest(pool) <= 1 + SPARE


@pytest.mark.parametrize(("shape", "least"), [((4, 1), 0.6), ((4, 2), 1 / 3), ((5, 4), 1 / 9)])
def test_a_rack_with_too_much_has_two_copies_of_as_few_slots_as_can_be(
    shape: tuple[int, ...], least: float
) -> None:
    """A rack with 2w/n of the copies above one a slot must have two of at least that many."""
    slots = slots_for(sum(shape))
    pool = assigned(hosts(*shape), slots, 2)
    assert least - 0.15 <= sharing_a_rack(pool, slots) <= least
    assert largest(pool) <= 1 + SPARE


def test_what_shares_a_rack_is_brought_apart_when_hosts_come() -> None:
    """Two racks of which one was too large: with a third one all copies are soon apart."""
    slots = slots_for(12)
    pool = assigned(hosts(4, 2), slots, 2)
    shared = sharing_a_rack(pool, slots)
    assert shared > 0.2
    for number in range(3):
        pool = assigned(pool | {f"x{number}": SlotMember(node=f"x{number}", rack="x")}, slots, 2)
        assert sharing_a_rack(pool, slots) <= shared
        shared = sharing_a_rack(pool, slots)
    assert shared == 0


def test_shares_follow_weights_and_no_node_keeps_a_slot_twice() -> None:
    """Double weight keeps double; one that is most of the pool keeps each slot once."""
    pool = hosts(4, 4, 4)
    pool["r0/0"] = replace(pool["r0/0"], weight=2.0)
    sizes = {name: len(member.slots) for name, member in assigned(pool, 256, 1).items()}
    assert sizes["r0/0"] / sizes["r1/1"] == pytest.approx(2, rel=0.1)
    pool["r0/0"] = replace(pool["r0/0"], weight=100.0)
    assert len(assigned(pool, 256, 2)["r0/0"].slots) >= 240
    same_node = {name: replace(member, node="one") for name, member in hosts(3).items()}
    pairs = assigned(same_node | {"b": SlotMember(node="other")}, 256, 2)
    assert len(pairs["b"].slots) == 256


def test_who_takes_nothing_keeps_nothing() -> None:
    """A member that is drained gives all its slots; when it is back it gets a share again."""
    pool = assigned(hosts(4, 4), 256, 2)
    drained = assigned(pool | {"r0/1": replace(pool["r0/1"], weight=0.0)}, 256, 2)
    assert drained["r0/1"].slots == ()
    back = assigned(drained | {"r0/1": replace(drained["r0/1"], weight=1.0)}, 256, 2)
    assert len(back["r0/1"].slots) == pytest.approx(64, rel=0.1)


def test_nothing_changes_when_nobody_does() -> None:
    """The same members keep the same slots, in any order."""
    pool = assigned(hosts(4, 4, 1), 256, 2)
    again = assigned(dict(reversed(pool.items())), 256, 2)
    assert {name: member.slots for name, member in again.items()} == {
        name: member.slots for name, member in pool.items()
    }


def test_a_pool_of_nobody_keeps_nothing() -> None:
    """No members, or none that takes anything: no slots, and no error."""
    assert assign_slots([], 256, 2) == []
    assert assign_slots([SlotMember(node="n", weight=0.0)], 256, 2) == [()]


@pytest.mark.parametrize(
    ("members", "slots"),
    [(0, 256), (3, 256), (26, 512), (48, 512), (384, 4_096), (9_999, 65_536)],
)
def test_slots_are_a_power_of_two(members: int, slots: int) -> None:
    """At least ten a member, within bounds."""
    assert slots_for(members) == slots


@given(st.lists(st.integers(0, 65_535), unique=True))
def test_packed_slots_come_back(slots: list[int]) -> None:
    """Two bytes each, in order."""
    assert unpack_slots(pack_slots(slots)) == tuple(slots)
    assert len(pack_slots(slots)) == 2 * len(slots)


def test_blocks_spread_evenly_over_slots() -> None:
    """What a slot holds is a share of the blocks: slots that move are blocks that move."""
    numbers = assign_slots([SlotMember(node=f"n{n}", rack=f"r{n // 4}") for n in range(8)], 256, 2)
    members = [
        PoolMember(name=f"h{n}", node=f"n{n}", rack=f"r{n // 4}", slots=slots)
        for n, slots in enumerate(numbers)
    ]
    keys = np.random.default_rng(3).integers(1, 2**64, size=20_000, dtype=np.uint64)
    counts = Counter(n for found in PoolMap(members).keepers(keys, 2) for n in found)
    assert max(counts.values()) / min(counts.values()) < 1.1
    for first, second in PoolMap(members).keepers(keys[:1_000], 2):
        assert members[first].rack != members[second].rack


def test_many_members_take_little_memory() -> None:
    """No table of all slots by all members is made: for 4,096 members it would be gigabytes."""
    pool = hosts(*[4] * 64)
    tracemalloc.start()
    try:
        assign_slots(list(pool.values()), 4_096, 1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4_096 * 256 * 8 / 2
