"""Which members keep which block: shares, movement, distance; and the order of repairs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.kvcache.pool import RAMP_S, PoolMap, PoolMember, RepairLoop, ramp

KEYS = np.random.default_rng(5).integers(1, 2**64, size=20_000, dtype=np.uint64)


def hosts(count: int, nodes_a_rack: int = 4, **weights: float) -> list[PoolMember]:
    return [
        PoolMember(
            name=f"h{n}", node=f"n{n}", rack=f"r{n // nodes_a_rack}", weight=weights.get(f"h{n}", 1)
        )
        for n in range(count)
    ]


def kept(members: list[PoolMember], replicas: int, writer_node: str = "") -> list[list[str]]:
    found = PoolMap(members).keepers(KEYS, replicas, writer_node=writer_node)
    return [[members[number].name for number in block] for block in found]


def moved(before: list[list[str]], after: list[list[str]]) -> float:
    """Copies that are on a member where they were not, as a share of all."""
    new = sum(len(set(b) - set(a)) for a, b in zip(before, after, strict=True))
    return new / sum(map(len, after))


@pytest.mark.parametrize(
    ("count", "nodes_a_rack", "replicas"),
    [
        (4, 1, 1),
        (8, 4, 1),
        (8, 100, 2),
        (10, 1, 3),
        (24, 4, 2),
        (48, 4, 1),
        (48, 4, 2),
        (48, 4, 3),
    ],
)
def test_a_member_more_or_less_moves_at_most_its_share(
    count: int, nodes_a_rack: int, replicas: int
) -> None:
    """Adding or removing one of n members moves at most 1.1/n of the copies."""
    members = hosts(count, nodes_a_rack)
    before = kept(members, replicas)
    larger = hosts(count + 1, nodes_a_rack)
    for changed, n in ((members[:3] + members[4:], count), (larger, count + 1)):
        assert moved(before, kept(changed, replicas)) <= 1.1 / n


@settings(max_examples=60, deadline=None)
@given(
    racks=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    replicas=st.integers(1, 4),
    writer=st.integers(0, 3),
)
def test_copies_are_as_far_apart_as_they_can_be(
    racks: list[int], replicas: int, writer: int
) -> None:
    """Never two on a node, never two in a rack while others have none, never alone at home."""
    members = [
        PoolMember(name=f"h{rack}-{n}", node=f"n{rack}-{n}", rack=f"r{rack}")
        for rack, size in enumerate(racks)
        for n in range(size)
    ]
    node = f"n0-{writer}"
    pool = PoolMap(members)
    for block in pool.keepers(KEYS[:200], replicas, writer_node=node):
        nodes = [members[number].node for number in block]
        used = [members[number].rack for number in block]
        assert len(set(nodes)) == len(nodes)
        assert len(set(used)) == min(len(racks), len(block))
        assert nodes != [node]
        alone = len(members) - (replicas == 1 and any(m.node == node for m in members))
        if not (len(members) == 1 and members[0].node == node):
            assert len(block) == min(replicas, alone)


def test_two_members_of_one_node_never_keep_the_same_block() -> None:
    """Distance counts in nodes, not in members."""
    members = [PoolMember(name=f"m{n}", node=f"n{n // 2}") for n in range(6)]
    for block in PoolMap(members).keepers(KEYS[:500], 3):
        assert sorted(members[number].node for number in block) == ["n0", "n1", "n2"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_shares_follow_weights(replicas: int) -> None:
    """A member of double weight keeps about twice as much; one without weight nothing."""
    counts = Counter(n for block in kept(hosts(16, 1, h3=2, h5=0), replicas) for n in block)
    usual = sum(counts[f"h{n}"] for n in range(6, 16)) / 10
    assert counts["h5"] == 0
    assert counts["h3"] / usual == pytest.approx(2, rel=0.12)
    for n in range(6, 16):
        assert counts[f"h{n}"] / usual == pytest.approx(1, rel=0.12)


def test_more_weight_only_brings_blocks_in() -> None:
    """While an empty member is ramped in, blocks move to it and between no others."""
    before, after = kept(hosts(8, h7=0.1), 2), kept(hosts(8, h7=0.5), 2)
    assert all(set(b) - set(a) <= {"h7"} for a, b in zip(before, after, strict=True))
    assert any("h7" in set(b) - set(a) for a, b in zip(before, after, strict=True))


def test_a_ramp_begins_small_and_ends_whole() -> None:
    """An empty member takes a tenth at first, all after the ramp, never more."""
    assert ramp(0) == pytest.approx(0.1)
    assert ramp(RAMP_S / 2) == pytest.approx(0.55)
    assert ramp(RAMP_S) == ramp(10 * RAMP_S) == 1


def test_what_is_full_passes_blocks_on() -> None:
    """Members that take nothing are left out; the others keep the blocks that they kept."""
    members = hosts(8)
    pool, usable = PoolMap(members), [n != 2 for n in range(8)]
    all_of_them = pool.keepers(KEYS[:2_000], 1)
    for whole, rest in zip(all_of_them, pool.keepers(KEYS[:2_000], 1, usable=usable), strict=True):
        assert whole in (rest, [2])
        assert rest != [2]


def test_held_copies_stay_and_are_completed_elsewhere() -> None:
    """A repair adds what is missing, away from what is left."""
    members = hosts(12)
    pool = PoolMap(members)
    for order in pool.ranking(KEYS[:200]).tolist():
        block = pool.pick(order, 2, held=[5])
        assert block[0] == 5
        assert members[block[1]].rack != members[5].rack


# --- repair --------------------------------------------------------------------------------------


def test_the_hottest_copy_is_made_first() -> None:
    """By heat, and of equals the first that was queued."""
    loop: RepairLoop[str] = RepairLoop(10)
    for item, heat in (("cold", 1), ("hot", 3), ("warm", 2), ("warm too", 2)):
        loop.add(item, heat=heat, size_bytes=10)
    assert loop.seconds_to_protection(0) == pytest.approx(4)
    assert [loop.take(now) for now in range(5)] == ["hot", "warm", "warm too", "cold", None]
    assert (loop.progress.copies_made, loop.progress.copies_left) == (4, 0)
    assert loop.seconds_to_protection(5) == 0


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    gaps=st.lists(st.floats(0, 3), min_size=60, max_size=60),
)
def test_the_budget_is_kept_between_any_two_times(sizes: list[int], gaps: list[float]) -> None:
    """Of what is handed out from one time to another all but one copy fits into the budget."""
    budget, now = 20.0, 0.0
    loop: RepairLoop[int] = RepairLoop(budget)
    for size in sizes:
        loop.add(size, heat=0, size_bytes=size)
    taken: list[tuple[float, int]] = []
    for gap in gaps:
        now += gap
        took = loop.take(now)
        if took is not None:
            taken.append((now, took))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            whole = sum(size for _, size in taken[first:last])
            assert whole <= budget * (taken[last][0] - taken[first][0]) + 1e-6
    assert loop.progress.bytes_made + loop.progress.bytes_left == sum(sizes)


def test_a_budget_of_nothing_is_refused() -> None:
    """A repair that would never end is a mistake."""
    with pytest.raises(ValueError, match="above 0"):
        RepairLoop[int](0)
