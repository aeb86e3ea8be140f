"""Repair and rebalance of expert maps: what moves, from where, and what a loss would cost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.experts.balance import balancedness, best_balancedness
from raddle.core.experts.bridge import plan_bridge
from raddle.core.experts.coverage import measure_coverage
from raddle.core.experts.layout import BoolArray, FloatArray, IntArray, Layout
from raddle.core.experts.maps import check_map, find_uncovered
from raddle.core.experts.place import place_experts
from raddle.core.experts.rebalance import rebalance_map
from raddle.core.experts.repair import MapChange, repair_map
from raddle.core.experts.sources import Bandwidths, choose_sources
from raddle.model.types import WeightSource
from tests.core.expert_cases import (
    assert_sound,
    cases,
    held,
    lognormal,
    make_layout,
    permuted,
    sharing,
    zipf,
)

RATES = Bandwidths(44_040_192, 196e9, 151e9, 2.5e9)


def loaded(change: MapChange, layout: Layout) -> set[tuple[int, int, int]]:
    die = layout.slot_die[change.slot]
    return set(zip(change.layer.tolist(), die.tolist(), change.expert.tolist(), strict=True))


def flags(dies: int, *chosen: int) -> BoolArray:
    found = np.zeros(dies, dtype=bool)
    found[list(chosen)] = True
    return found


# --- small cases -------------------------------------------------------------------------------


def test_a_covered_loss_moves_nothing() -> None:
    """All experts of the lost die have a copy elsewhere: its slots die, nothing is loaded."""
    change = repair_map(np.array([[0, 1, 1, 0]]), np.ones((1, 2)), make_layout(2, 2, lost=(1,)))
    assert change.table.tolist() == [[0, 1, -1, -1]]
    assert (change.loads, change.donor_slots, change.kept) == (0, 0, 2)


def test_an_uncovered_expert_takes_an_empty_slot() -> None:
    """Expert 2 is lost with die 1 and goes to die 0's empty slot."""
    table = np.array([[0, 1, -1, 2, -1, -1]])
    change = repair_map(table, np.ones((1, 3)), make_layout(2, 3, lost=(1,)))
    assert change.table.tolist() == [[0, 1, 2, -1, -1, -1]]
    assert (change.loads, change.donor_slots) == (1, 0)


def test_a_redundant_copy_gives_its_slot() -> None:
    """No slot is empty: a copy of an expert that has two gives way to expert 3."""
    table = np.array([[0, 1, 2, 0, 3, 1]])
    change = repair_map(table, np.ones((1, 4)), make_layout(3, 2, lost=(2,)))
    assert_sound(change.table, 4, make_layout(3, 2, lost=(2,)))
    assert (change.loads, change.donor_slots, change.kept) == (1, 1, 3)
    assert change.expert.tolist() == [3]


def test_what_finds_no_slot_is_listed() -> None:
    """Two experts are lost and no slot can give way: both are listed with their layer."""
    layout = make_layout(2, 2, lost=(1,))
    change = repair_map(np.array([[0, 1, 2, 3]]), np.ones((1, 4)), layout)
    assert change.uncovered == ((0, 2), (0, 3))
    assert change.loads == 0


def test_a_new_process_loads_its_slots() -> None:
    """A hot spare in die 0's place keeps the plan of its slots, and all of them are loaded."""
    table = np.array([[0, 1, 2, 0, 1, 3]])
    change = repair_map(table, np.ones((1, 4)), make_layout(3, 2), joined=flags(3, 0))
    assert (change.table == table).all()
    assert change.slot.tolist() == [0, 1]


# --- EP320 and EP32 ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
def test_one_die_of_ep320_moves_one_slot_a_layer(kind: str) -> None:
    """Whichever die is lost, 58 loads bring the map onto the bound, exact ties included."""
    loads = zipf(58, 256) if kind == "zipf" else lognormal(58, 256)
    table = place_experts(loads, make_layout(320, 1))
    for lost in (0, 7, 100, 319):
        layout = make_layout(320, 1, lost=(lost,))
        change = repair_map(table, loads, layout, swaps=None)
        assert_sound(change.table, 256, layout)
        assert change.loads <= 58
        best = best_balancedness(loads, layout)
        assert balancedness(change.table, loads, layout) == pytest.approx(best, rel=1e-8)


def test_one_node_of_ep320_moves_at_most_its_slots() -> None:
    """16 dies are lost: at most 928 loads, on the bound, spread over the survivors."""
    loads = lognormal(58, 256)
    table = place_experts(loads, make_layout(320, 1))
    layout = make_layout(320, 1, lost=tuple(range(16, 32)))
    change = repair_map(table, loads, layout)
    assert_sound(change.table, 256, layout)
    assert change.loads <= 928
    best = best_balancedness(loads, layout)
    assert balancedness(change.table, loads, layout) == pytest.approx(best, rel=1e-8)
    sources = choose_sources(change, table, layout, layout.hosts, RATES)
    # Nobody loads or sends more than a few experts.
    assert np.bincount(layout.slot_die[change.slot]).max() <= 16
    assert sources.predicted_s < 0.01


@pytest.mark.parametrize("slots", [9, 10, 12])
@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
def test_one_die_of_ep32_is_balanced_again_within_a_tenth_of_the_slots(
    slots: int, kind: str
) -> None:
    """9 to 12 slots a die: 0.95 balance with at most 10 % of the slots loaded."""
    random = np.random.default_rng(0)
    loads = lognormal(58, 256) if kind == "lognormal" else random.permuted(zipf(58, 256), axis=1)
    table = place_experts(loads, make_layout(32, slots))
    layout = make_layout(32, slots, lost=(17,))
    change = repair_map(table, loads, layout, swaps=None)
    assert_sound(change.table, 256, layout)
    assert balancedness(change.table, loads, layout) >= 0.95
    assert change.loads <= 0.1 * 58 * 32 * slots


@pytest.mark.parametrize("lost", [(17,), (0, 1, 2)])
def test_a_repaired_map_shares_few_nodes_that_it_need_not(lost: tuple[int, ...]) -> None:
    """Within the allowed moves, copies are parted on nodes too where that costs no balance."""
    loads = lognormal(20, 256, sigma=1.0)
    table = place_experts(loads, make_layout(32, 12))
    layout = make_layout(32, 12, lost=lost)
    bare = repair_map(table, loads, layout).table
    change = repair_map(table, loads, layout, swaps=None)
    assert_sound(change.table, 256, layout)
    assert sharing(change.table, 256, layout, 2) <= 0.4 * sharing(bare, 256, layout, 2)
    assert balancedness(change.table, loads, layout) >= 0.95
    assert change.loads <= 0.1 * table.size


@pytest.mark.parametrize("kind", ["zipf", "lognormal"])
@pytest.mark.parametrize("lost", [(17,), (3, 17)])
def test_a_repaired_map_shares_no_npu_that_it_need_not(kind: str, lost: tuple[int, ...]) -> None:
    """Copies that a repair had to put on one NPU are parted again by its exchanges."""
    loads = zipf(58, 256) if kind == "zipf" else lognormal(58, 256, sigma=1.0)
    table = place_experts(loads, make_layout(32, 12))
    layout = make_layout(32, 12, lost=lost)
    change = repair_map(table, loads, layout, swaps=None)
    assert_sound(change.table, 256, layout)
    assert [sharing(change.table, 256, layout, level) for level in (0, 1)] == [0, 0]
    assert change.loads <= 0.1 * table.size
    if kind == "zipf":
        # Without exchanges the hottest expert's copies are left as the loss left them.
        assert sharing(repair_map(table, loads, layout).table, 256, layout, 1) > 0


def test_swaps_are_bounded() -> None:
    """No swap, no exchange; each swap loads two experts a layer at most."""
    loads = lognormal(8, 256)
    table = place_experts(loads, make_layout(32, 9))
    layout = make_layout(32, 9, lost=(17,))
    found = [repair_map(table, loads, layout, swaps=swaps) for swaps in (0, 1, 4)]
    assert found[1].loads <= found[0].loads + 2 * 8
    assert found[2].loads <= found[0].loads + 2 * 4 * 8
    balance = [balancedness(change.table, loads, layout) for change in found]
    assert balance[0] < balance[1] < balance[2]


# --- properties --------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(case=cases(), data=st.data())
def test_repairs_are_sound(case: tuple[FloatArray, Layout], data: st.DataObject) -> None:
    """Over losses and returns: covered or listed, never twice, only hosts, moves = difference."""
    loads, layout = case
    table = place_experts(loads, layout)
    able = np.flatnonzero(layout.hosts).tolist()
    swaps = data.draw(st.sampled_from([0, 1, None]))
    before = layout
    for _ in range(2):
        alive = sorted(data.draw(st.sets(st.sampled_from(able), min_size=1)))
        now = replace(layout, hosts=flags(layout.dies, *alive))
        joined = now.hosts & ~before.hosts
        change = repair_map(table, loads, now, joined=joined, swaps=swaps)
        check_change(table, change, loads.shape[1], now, joined)
        assert repair_map(table, loads, now, joined=joined, swaps=swaps).slot.tolist() == (
            change.slot.tolist()
        )
        table, before = change.table, now


def check_change(
    before: IntArray, change: MapChange, experts: int, layout: Layout, joined: BoolArray
) -> None:
    defects = check_map(change.table, experts, layout)
    assert all("has no live copy" in defect for defect in defects)
    assert find_uncovered(change.table, experts, layout) == change.uncovered
    still = replace(layout, hosts=layout.hosts & ~joined)
    new = held(change.table, layout) - held(before, still)
    assert loaded(change, layout) == new
    assert change.loads == len(new)
    assert (change.table[change.layer, change.slot] == change.expert).all()
    if change.uncovered:
        for layer in {layer for layer, _ in change.uncovered}:
            row = change.table[layer, layout.hosts[layout.slot_die]]
            assert len(set(row.tolist())) == len(row)
            assert (row >= 0).all()


@settings(max_examples=60, deadline=None)
@given(case=cases(), swaps=st.sampled_from([0, 2, None]))
def test_repair_of_nothing_is_nothing(case: tuple[FloatArray, Layout], swaps: int | None) -> None:
    """Nothing lost, nothing new: the map stays, however bad its balance or slow its dies are."""
    loads, layout = case
    table = place_experts(loads, layout)
    other = lognormal(len(loads), loads.shape[1], seed=77)
    change = repair_map(table, other, layout, swaps=swaps)
    assert (change.table == table).all()
    assert change.loads == 0


@pytest.mark.parametrize(("dies", "slots"), [(32, 9), (320, 1), (48, 8)])
def test_repair_then_rejoin_converges(dies: int, slots: int) -> None:
    """The die comes back: it is filled, balance is back, and another repair moves nothing."""
    loads = lognormal(12, 256)
    whole, less = make_layout(dies, slots), make_layout(dies, slots, lost=(17,))
    first = place_experts(loads, whole)
    shrunk = repair_map(first, loads, less, swaps=None).table
    back = repair_map(shrunk, loads, whole, joined=flags(dies, 17), swaps=None)
    assert_sound(back.table, 256, whole)
    assert (back.table >= 0).all()
    assert balancedness(back.table, loads, whole) >= 0.93 * balancedness(first, loads, whole)
    again = repair_map(back.table, loads, whole, swaps=None)
    assert again.loads == 0
    assert (again.table == back.table).all()


@settings(max_examples=100, deadline=None)
@given(case=cases(), data=st.data(), swaps=st.sampled_from([0, 2, None]))
def test_permuting_the_dies_permutes_the_repair(
    case: tuple[FloatArray, Layout], data: st.DataObject, swaps: int | None
) -> None:
    """The same dies in another order, of any slots and speeds: the same contents die for die."""
    loads, layout = case
    table = place_experts(loads, layout)
    lost = data.draw(st.integers(0, layout.dies - 1))
    order = data.draw(st.permutations(range(layout.dies)))
    left = replace(layout, hosts=layout.hosts & ~flags(layout.dies, lost))
    mixed = permuted(left, order)
    moved = mixed.to_table(layout.to_grid(table)[:, order])
    one = repair_map(table, loads, left, swaps=swaps)
    other = repair_map(moved, loads, mixed, swaps=swaps)
    assert one.loads == other.loads
    assert (layout.to_grid(one.table)[:, order] == mixed.to_grid(other.table)).all()


def test_a_slowed_die_gets_colder_experts() -> None:
    """A die that fell to half speed gives load away, within the allowed moves."""
    loads = lognormal(10, 256)
    layout = make_layout(32, 9)
    table = place_experts(loads, layout)
    speeds = np.ones(32)
    speeds[3] = 0.5
    slow = replace(layout, speeds=speeds)
    change = repair_map(table, loads, slow, respeeded=flags(32, 3), swaps=None)
    assert_sound(change.table, 256, slow)
    assert balancedness(table, loads, slow) < 0.6
    assert balancedness(change.table, loads, slow) > 0.8
    assert change.loads <= 0.1 * table.size


# --- sources -----------------------------------------------------------------------------------


def test_the_closest_copy_is_read_and_busy_links_are_shared() -> None:
    """Of equally idle sources the closest sends; a busy one is passed over for another."""
    layout = make_layout(8, 8, node=2)
    table = np.full((1, 64), -1)
    table[0, 0:40] = np.tile(np.arange(8), 5)  # dies 0 to 4 hold experts 0 to 7
    new = replace(layout, hosts=~flags(8, 6, 7))
    grown = repair_map(table, np.ones((1, 8)), new, joined=flags(8, 5))
    assert (layout.slot_die[grown.slot] == 5).all()
    one = replace_loads(grown, 1)
    nearest = choose_sources(
        one, table, layout, ~flags(8, 5, 6, 7), replace(RATES, pool_bytes_per_s=0)
    )
    assert nearest.die.tolist() == [4]  # the other die of its node
    slow_disk = replace(RATES, pool_bytes_per_s=0, disk_bytes_per_s=1e9)
    sources = choose_sources(grown, table, layout, ~flags(8, 5, 6, 7), slow_disk)
    assert set(sources.source) == {WeightSource.PEER}


def replace_loads(change: MapChange, count: int) -> MapChange:
    return replace(
        change,
        layer=change.layer[:count],
        slot=change.slot[:count],
        expert=change.expert[:count],
    )


def test_without_a_copy_the_pool_or_the_disk_sends() -> None:
    """No live copy: the hosts' memory where there is a pool, else the checkpoint."""
    layout = make_layout(2, 2, lost=(1,))
    change = repair_map(np.array([[0, -1, 1, -1]]), np.ones((1, 2)), layout)
    found = choose_sources(change, np.array([[0, -1, 1, -1]]), layout, layout.hosts, RATES)
    assert found.source == (WeightSource.POOL,)
    assert found.predicted_s == pytest.approx(44_040_192 / 151e9)
    no_pool = replace(RATES, pool_bytes_per_s=0)
    found = choose_sources(change, np.array([[0, -1, 1, -1]]), layout, layout.hosts, no_pool)
    assert found.source == (WeightSource.DISK,)
    # A drained die can still be read.
    found = choose_sources(change, np.array([[0, -1, 1, -1]]), layout, flags(2, 0, 1), RATES)
    assert (found.source, found.die.tolist()) == ((WeightSource.PEER,), [1])


# --- rebalance ---------------------------------------------------------------------------------


def test_a_small_drift_moves_nothing() -> None:
    """Twenty steps of 2 % noise at 9 slots a die: not one load."""
    loads = lognormal(20, 256)
    layout = make_layout(32, 9)
    table = place_experts(loads, layout)
    random = np.random.default_rng(1)
    for _ in range(20):
        now = loads * (1 + 0.02 * random.standard_normal(loads.shape))
        found = rebalance_map(table, now, layout, RATES)
        assert found.change.loads == 0, found.why
        assert found.why.reason in ("BALANCED", "SMALL_GAIN")


NARROW = pytest.mark.parametrize(("dies", "slots"), [(144, 2), (192, 2), (320, 1)])


@NARROW
@pytest.mark.parametrize("kind", ["drift", "tokens"])
def test_noise_moves_nothing_with_few_slots_a_die(dies: int, slots: int, kind: str) -> None:
    """Loads that never change, seen with 5 % noise or through 100 tokens an expert: no load."""
    layout = make_layout(dies, slots)
    loads = lognormal(8, 256, sigma=1.0 if kind == "drift" else 0.7)
    loads *= 100 / loads.mean(axis=1, keepdims=True)
    table = place_experts(loads, layout)
    random = np.random.default_rng(2)
    for _ in range(8):
        drifted = loads * (1 + 0.05 * random.standard_normal(loads.shape))
        now = drifted if kind == "drift" else random.poisson(loads).astype(float)
        found = rebalance_map(table, now, layout, RATES)
        assert found.change.loads == 0, found.why


@NARROW
def test_a_drift_is_followed_with_few_slots_a_die(dies: int, slots: int) -> None:
    """Loads walk away by 5 % a step: in time experts move, and balance stays far higher."""
    layout = make_layout(dies, slots)
    loads = lognormal(8, 256)
    first = table = place_experts(loads, layout)
    random = np.random.default_rng(2)
    for _ in range(8):
        for _ in range(4):
            loads *= 1 + 0.05 * random.standard_normal(loads.shape)
        table = rebalance_map(table, loads, layout, RATES).change.table
    assert_sound(table, 256, layout)
    assert balancedness(table, loads, layout) > 1.1 * balancedness(first, loads, layout)


@pytest.mark.parametrize(("dies", "slots", "seed"), [(192, 2, 1), (144, 2, 2), (320, 1, 0)])
def test_an_unlucky_look_at_a_single_layer_moves_nothing(dies: int, slots: int, seed: int) -> None:
    """Nothing averages out in one layer of few tokens, and still no look of twelve moves a load."""
    layout = make_layout(dies, slots)
    loads = lognormal(1, 256, seed=seed, sigma=0.7)
    loads *= 100 / loads.mean()
    table = place_experts(loads, layout)
    random = np.random.default_rng(seed)
    for _ in range(12):
        found = rebalance_map(table, random.poisson(loads).astype(float), layout, RATES)
        assert found.change.loads == 0, found.why


def test_layers_that_may_gain_by_chance_take_no_moves() -> None:
    """Half of the layers shift for good, the others show noise: only those that shifted move."""
    layout = make_layout(192, 2)
    loads = lognormal(8, 256)
    table = place_experts(loads, layout)
    random = np.random.default_rng(2)
    now = loads * (1 + 0.05 * random.standard_normal(loads.shape))
    now[:4] *= random.lognormal(0, 0.5, (4, 256))
    change = rebalance_map(table, now, layout, RATES).change
    assert set(change.layer.tolist()) == {0, 1, 2, 3}


def test_a_large_drift_moves_once() -> None:
    """Loads shift for good: one rebalance repairs the balance, the next ones do nothing."""
    layout = make_layout(32, 9)
    loads = lognormal(20, 256)
    table = place_experts(loads, layout)
    random = np.random.default_rng(2)
    shifted = loads * random.lognormal(0, 0.25, loads.shape)
    first = rebalance_map(table, shifted, layout, RATES)
    assert first.why.reason == "PAYS"
    assert 0 < first.change.loads <= 0.1 * table.size
    assert first.balance_after > first.balance_before * 1.05
    assert_sound(first.change.table, 256, layout)
    for _ in range(10):
        now = shifted * (1 + 0.02 * random.standard_normal(loads.shape))
        again = rebalance_map(first.change.table, now, layout, RATES)
        assert again.change.loads == 0, again.why


def test_a_gain_that_ends_too_soon_does_not_pay() -> None:
    """The same shift with a horizon of half a second is not worth its moves."""
    layout = make_layout(32, 9)
    loads = lognormal(20, 256)
    table = place_experts(loads, layout)
    shifted = loads * np.random.default_rng(2).lognormal(0, 0.25, loads.shape)
    found = rebalance_map(table, shifted, layout, RATES, horizon_s=0.3)
    assert found.why.reason == "TOO_DEAR"
    assert found.change.loads == 0
    assert (found.change.table == table).all()


# --- bridge ------------------------------------------------------------------------------------


def test_a_bridge_masks_what_has_no_copy() -> None:
    """EP320 loses a die: what has no live copy is masked until a deadline."""
    loads = lognormal(4, 256)
    table = place_experts(loads, make_layout(320, 1))
    lost = int(np.flatnonzero(table[0] == int(loads[0].argmin()))[0])
    layout = make_layout(320, 1, lost=(lost,))
    found = plan_bridge(table, 256, layout, predicted_s=0.01, ranks=320)
    assert found.why.reason == "MASKED"
    assert found.masked == find_uncovered(table, 256, layout) != ()
    assert found.deadline_s >= 0.01


def test_a_bridge_is_refused_beyond_its_limits() -> None:
    """Small instances mask nothing, and no instance more than 1 of 32 experts of a layer."""
    table = np.arange(256)[None, :]
    few = plan_bridge(table, 256, make_layout(256, 1, lost=(3,)), predicted_s=0.01, ranks=256)
    assert few.masked == ((0, 3),)
    many = make_layout(256, 1, lost=tuple(range(9)))
    refused = plan_bridge(table, 256, many, predicted_s=0.01, ranks=256)
    assert (refused.masked, refused.why.reason) == ((), "TOO_MANY_LOST")
    small = plan_bridge(table, 256, make_layout(16, 16, lost=(3,)), predicted_s=0.01, ranks=16)
    assert (small.masked, small.why.reason) == ((), "TOO_SMALL")
    covered = plan_bridge(
        np.array([[0, 0]]), 1, make_layout(2, 1, lost=(1,)), predicted_s=0, ranks=2
    )
    assert covered.why.reason == "NOT_NEEDED"


@settings(max_examples=120, deadline=None)
@given(
    lost=st.sets(st.integers(0, 39), min_size=1, max_size=12),
    seed=st.integers(0, 9),
    slots=st.sampled_from([1, 2, 7]),
)
def test_an_expert_is_covered_or_masked_until_it_is_loaded(
    lost: set[int], seed: int, slots: int
) -> None:
    """Masked is what has no live copy, within the limits, and the repair loads all of it."""
    experts = 32 * slots
    loads = lognormal(2, experts, seed)
    table = place_experts(loads, make_layout(40, slots))
    left = make_layout(40, slots, lost=tuple(sorted(lost)))
    found = plan_bridge(table, experts, left, predicted_s=0.5, ranks=40)
    missing = find_uncovered(table, experts, left)
    worst = max((sum(1 for at, _ in missing if at == layer) for layer in range(2)), default=0)
    assert found.masked == (missing if worst <= experts // 32 else ())
    assert (found.deadline_s > 0.5) == bool(found.masked)
    change = repair_map(table, loads, left)
    arriving = set(zip(change.layer.tolist(), change.expert.tolist(), strict=True))
    assert set(found.masked) <= arriving | set(change.uncovered)


# --- coverage ------------------------------------------------------------------------------------


def test_coverage_of_a_small_map() -> None:
    """Dies 0 and 1 share an NPU: losing it takes expert 0, any other loss takes less."""
    layout = replace(
        make_layout(4, 1),
        domains=np.array([[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 1]]),
        levels=("die", "npu", "node"),
    )
    found = measure_coverage(np.array([[0, 0, 1, 1], [0, 1, 0, 1]]), 2, layout)
    assert (found.margin_dies, found.uncovered) == (1, ())
    assert [(w.level, w.members, w.experts) for w in found.worst_one] == [
        ("die", (0,), ()),
        ("npu", (0,), ((0, 0),)),
        ("node", (0,), ((0, 0),)),
    ]
    assert [(w.level, w.members, w.experts_lost) for w in found.worst_two] == [
        ("die", (0, 1), 1),
        ("npu", (0, 1), 2),
        ("node", (0, 1), 4),
    ]


def test_coverage_counts_what_is_gone() -> None:
    """An expert without a copy makes the margin -1, and is what an extra slot would hold."""
    found = measure_coverage(np.array([[0, -1, 1]]), 3, make_layout(3, 1))
    assert (found.margin_dies, found.uncovered) == (-1, ((0, 2),))
    assert (found.extra_copies_needed, found.extra_copies) == (1, ((0, 2, 0),))


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_what_trying_every_loss_finds(seed: int) -> None:
    """Margin, worst one and worst two of each level equal those of trying all of them."""
    layout = make_layout(6, 2, node=4)
    loads = lognormal(2, 7, seed)
    table = place_experts(loads, layout)
    found = measure_coverage(table, 7, layout)

    def lost(dies: tuple[int, ...]) -> set[tuple[int, int]]:
        live = [s for s in range(12) if s // 2 not in dies]
        gone = [set(range(7)) - set(row[live].tolist()) for row in table]
        return {(layer, expert) for layer, experts in enumerate(gone) for expert in experts}

    margin = 0
    while all(not lost(dies) for dies in itertools.combinations(range(6), margin + 1)):
        margin += 1
    assert found.margin_dies == margin
    for count, worst in ((1, found.worst_one), (2, found.worst_two)):
        for level, members in enumerate(layout.domains):
            unique = sorted(set(members.tolist()))
            tried = [
                lost(tuple(np.flatnonzero(np.isin(members, chosen)).tolist()))
                for chosen in itertools.combinations(unique, count)
            ]
            mine = [w for w in worst if w.level == layout.levels[level]]
            if not tried:
                assert mine == []
                continue
            assert mine[0].experts_lost == max(len(gone) for gone in tried)
            dies = tuple(np.flatnonzero(np.isin(members, mine[0].members)).tolist())
            assert set(mine[0].experts) == lost(dies)


def test_the_extra_copies_raise_the_margin() -> None:
    """As many copies more as are named, where they are named: one more die may be lost."""
    table = np.array([[0, 1, -1, -1, 2, 3, -1, -1, 0, 1, -1, -1]])
    layout = make_layout(3, 4)
    found = measure_coverage(table, 4, layout)
    assert (found.margin_dies, found.extra_copies_needed) == (0, 2)
    for _, expert, die in found.extra_copies:
        own = table[0, die * 4 : die * 4 + 4]
        assert expert not in own
        own[np.flatnonzero(own < 0)[0]] = expert
    assert measure_coverage(table, 4, layout).margin_dies == 1


def test_check_map_names_every_defect() -> None:
    """A wrong number, a double, a missing expert and a dead die's copy each get a sentence."""
    table = np.array([[0, 1, 1, 2], [0, 0, 1, 7]])
    assert check_map(table, 3, make_layout(2, 2)) == [
        "layer 1: slot 3 (die 1) holds 7, which is no expert of 3",
        "layer 1: die 0 holds expert 0 2 times",
        "layer 1: expert 2 has no live copy",
    ]
    assert check_map(table[:1], 3, make_layout(2, 2, lost=(1,))) == [
        "layer 0: slot 2 holds expert 1, but die 1 hosts none",
        "layer 0: slot 3 holds expert 2, but die 1 hosts none",
        "layer 0: expert 2 has no live copy",
    ]
