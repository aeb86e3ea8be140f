"""The expert map of a new instance: counts, balance, spread, ties; dispatch over its copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from raddle.core.experts.balance import balancedness, best_balancedness, die_loads
from raddle.core.experts.copies import by_load, copies_of_sorted, heaviest_copy
from raddle.core.experts.dispatch import dispatch_weights, replica_order
from raddle.core.experts.layout import FloatArray, IntArray, Layout, require_loads
from raddle.core.experts.maps import to_array, to_expert_map
from raddle.core.experts.place import place_experts, place_unknown_loads
from raddle.core.experts.repair import repair_map
from raddle.model.errors import PermanentError
from tests.core.expert_cases import (
    assert_sound,
    cases,
    lognormal,
    make_layout,
    permuted,
    sharing,
    slowest,
    zipf,
)

# The weights of the worked example in the README of deepseek-ai/EPLB (MIT licence): 2 layers,
# 12 experts, 16 slots on 8 dies.
EPLB_WEIGHTS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
# ... and the map that it publishes.
EPLB_MAP = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)


def greedy_copies(loads: FloatArray, slots: int, dies: int) -> IntArray:
    """The textbook loop: the next copy goes where the load a copy is highest."""
    copies = np.ones(loads.shape, dtype=np.int64)
    for row, count in zip(loads, copies, strict=True):
        for _ in range(min(slots, len(row) * dies) - len(row)):
            count[np.argmax(np.where(count < dies, row / count, -1.0))] += 1
    return copies


@pytest.mark.parametrize("slots", [24, 25, 37, 60, 120, 240])
def test_counts_are_those_of_the_greedy_loop(slots: int) -> None:
    """No loop is needed for the counts that make the heaviest copy lightest."""
    loads = lognormal(6, 24, sigma=1.2)
    order = by_load(loads)
    heavy = np.take_along_axis(loads, order, 1)
    assert (copies_of_sorted(heavy, slots, 8) == greedy_copies(heavy, slots, 8)).all()


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_first_maps_are_sound(case: tuple[FloatArray, Layout]) -> None:
    """Every expert has a copy, none twice on a die, whatever the sizes, speeds and loads."""
    loads, layout = case
    table = place_experts(loads, layout)
    assert table.shape == (len(loads), layout.slots.sum())
    assert_sound(table, loads.shape[1], layout)
    # Slots stay empty only if another copy could not be told apart or finds no die of its own.
    if layout.is_even and layout.host_slots <= loads.shape[1] * int(layout.hosts.sum()):
        assert (table[:, layout.hosts[layout.slot_die]] >= 0).all()


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_no_map_beats_the_bound(case: tuple[FloatArray, Layout]) -> None:
    """The bound is one: no map is more balanced."""
    loads, layout = case
    table = place_experts(loads, layout)
    assert balancedness(table, loads, layout) <= best_balancedness(loads, layout) + 1e-9


def test_two_big_experts_are_split_for_the_heaviest_die() -> None:
    """The known hard case: 200 on the heaviest die, where longest-first gives 232."""
    loads = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])
    layout = make_layout(8, 2)
    table = place_experts(loads, layout)
    assert_sound(table, 8, layout)
    assert max(slowest(table, loads, layout)) <= 200


def loads_of(kind: str) -> FloatArray:
    """58 layers of 256 experts; zipf with exact ties, and twice as steep as usual."""
    random = np.random.default_rng(1)
    if kind == "uniform":
        return random.uniform(0.8, 1.2, (58, 256))
    if kind == "grouped":
        groups = np.repeat(random.lognormal(0.0, 0.8, (58, 8)), 32, axis=1)
        return groups * random.lognormal(0.0, 0.5, (58, 256))
    return {"zipf": zipf(58, 256), "steep": zipf(58, 256) ** 1.5}.get(kind, lognormal(58, 256))


@pytest.mark.parametrize("dies", [24, 32, 48, 64, 100])
@pytest.mark.parametrize("slots", [9, 12])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "lognormal", "grouped"])
def test_many_slots_a_die_come_within_one_percent_of_the_bound(
    dies: int, slots: int, kind: str
) -> None:
    """58 layers of 256 experts, nodes and racks of one size or not: no two copies on an NPU."""
    loads = loads_of(kind)
    layout = make_layout(dies, max(slots, -(-256 // dies)))
    table = place_experts(loads, layout)
    assert_sound(table, 256, layout)
    assert balancedness(table, loads, layout) >= 0.99 * best_balancedness(loads, layout)
    kept_apart = (0, 1, 2) if dies < 100 else (0, 1)
    assert [sharing(table, 256, layout, level) for level in kept_apart] == [0] * len(kept_apart)


@pytest.mark.parametrize("slots", [9, 10, 12])
def test_few_experts_that_carry_nearly_all_are_cut_to_fit(slots: int) -> None:
    """The best counts for the heaviest copy would leave 20 % here: other counts pack better."""
    loads = loads_of("steep")
    layout = make_layout(32, slots)
    table = place_experts(loads, layout)
    assert_sound(table, 256, layout)
    assert balancedness(table, loads, layout) >= 0.99
    assert sharing(table, 256, layout, 1) == 0


@pytest.mark.parametrize("dies", [288, 320])
def test_one_slot_a_die_is_on_the_bound_and_spread(dies: int) -> None:
    """EP288 and EP320: nothing left to win, and copies differ in NPU, node and rack."""
    loads = lognormal(58, 256)
    layout = make_layout(dies, 1)
    table = place_experts(loads, layout)
    assert_sound(table, 256, layout)
    best = best_balancedness(loads, layout)
    assert balancedness(table, loads, layout) == pytest.approx(best, rel=1e-12)
    assert [sharing(table, 256, layout, level) for level in (1, 2, 3)] == [0, 0, 0]


def test_two_slots_a_die_beat_longest_first() -> None:
    """384 slots on 192 dies: 0.93 and more, where longest-first packing gives 0.914."""
    loads = lognormal(58, 256, sigma=1.0)
    layout = make_layout(192, 2)
    table = place_experts(loads, layout)
    assert_sound(table, 256, layout)
    assert balancedness(table, loads, layout) > 0.94
    assert [sharing(table, 256, layout, level) for level in (1, 2, 3)] == [0, 0, 0]


def test_the_worked_example_is_at_least_as_balanced_as_published() -> None:
    """16 slots on 8 dies: both layers are no worse than the published hierarchical map."""
    layout = make_layout(8, 2, node=4)
    ours = slowest(place_experts(EPLB_WEIGHTS, layout), EPLB_WEIGHTS, layout)
    published = slowest(EPLB_MAP, EPLB_WEIGHTS, layout)
    assert all(mine <= theirs for mine, theirs in zip(ours, published, strict=True))


def test_ties_go_to_the_lowest_index() -> None:
    """Equal loads: the first experts get the redundant slots, and all layers are alike."""
    layout = make_layout(4, 3, node=2)
    table = place_unknown_loads(2, 10, layout)
    assert_sound(table, 10, layout)
    assert np.bincount(table[0]).tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert (table[0] == table[1]).all()
    assert (place_experts(np.ones((2, 10)), layout) == table).all()


def test_a_slow_die_gets_less() -> None:
    """A die at half speed carries about half, and no die is much slower than the others."""
    loads = lognormal(20, 256)
    layout = make_layout(32, 9)
    speeds = layout.speeds.copy()
    speeds[5] = 0.5
    layout = replace(layout, speeds=speeds)
    table = place_experts(loads, layout)
    carried = die_loads(table, loads, layout)
    assert (carried[:, 5] < 0.6 * carried.mean(axis=1)).all()
    assert balancedness(table, loads, layout) > 0.95


@pytest.mark.parametrize(("dies", "slots"), [(192, 2), (96, 3), (72, 4)])
@pytest.mark.parametrize("slow", [{5: 0.5}, {5: 0.8, 9: 0.5, 40: 0.6}])
def test_few_slots_a_die_are_as_balanced_with_slow_dies(
    dies: int, slots: int, slow: dict[int, float]
) -> None:
    """2 to 4 slots a die: slow dies carry so little that balance is that of a healthy instance."""
    loads = lognormal(10, 256, sigma=1.0)
    healthy = make_layout(dies, slots)
    speeds = healthy.speeds.copy()
    speeds[list(slow)] = list(slow.values())
    layout = replace(healthy, speeds=speeds)
    table = place_experts(loads, layout)
    assert_sound(table, 256, layout)
    whole = balancedness(place_experts(loads, healthy), loads, healthy)
    assert balancedness(table, loads, layout) >= 0.99 * whole
    assert sharing(table, 256, layout, 1) == 0


def test_shared_expert_dies_stay_empty() -> None:
    """The last two dies host the shared expert alone."""
    layout = make_layout(6, 2, lost=(4, 5))
    table = place_experts(np.ones((1, 8)), layout)
    assert (table[0, 8:] == -1).all()
    assert_sound(table, 8, layout)


def test_too_few_slots_are_refused() -> None:
    """9 experts do not fit into 8 slots, and the message says what to do."""
    with pytest.raises(PermanentError, match="9 experts do not fit into 8 slots of 4 dies"):
        place_experts(np.ones((1, 9)), make_layout(4, 2))


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        (np.array([[1.0, np.nan]]), "expert 1 is not finite"),
        (np.array([[1.0, np.inf]]), "expert 1 is not finite"),
        (np.array([[1.0, 1.0], [-2.0, 1.0]]), "layer 1, expert 0 is negative"),
        (np.ones(4), "must be two-dimensional"),
        (np.ones((2, 2, 2)), "2 x 2 x 2"),
        (np.ones((0, 4)), "not empty"),
    ],
)
def test_bad_loads_are_named(loads: FloatArray, said: str) -> None:
    """NaN, infinite and negative loads and wrong shapes are refused, naming the place."""
    with pytest.raises(PermanentError, match=said):
        require_loads(loads)


@settings(max_examples=100, deadline=None)
@given(case=cases(), data=st.data())
def test_permuting_the_dies_permutes_the_answer(
    case: tuple[FloatArray, Layout], data: st.DataObject
) -> None:
    """Dies in another order, of any slots and speeds: the same experts die for die."""
    loads, layout = case
    order = data.draw(st.permutations(range(layout.dies)))
    mixed = permuted(layout, order)
    one, other = place_experts(loads, layout), place_experts(loads, mixed)
    assert (layout.to_grid(one)[:, order] == mixed.to_grid(other)).all()


def test_a_map_survives_its_model_form() -> None:
    """Array to `ExpertMap` and back changes nothing."""
    table = place_unknown_loads(3, 10, make_layout(4, 3))
    stored = to_expert_map(table, 3, 10)
    assert (stored.slots_per_rank, stored.experts) == (3, 10)
    assert (to_array(stored) == table).all()


# --- dispatch ------------------------------------------------------------------------------------


def best_split(row: IntArray, loads: FloatArray, layout: Layout) -> float:
    """The time of the slowest die under the best split, by linear programming (HiGHS)."""
    slot = np.flatnonzero(row >= 0)
    count, dies = len(slot), layout.dies
    die = layout.slot_die[slot]
    entry = np.concatenate([np.ones(count), -layout.speeds])
    at = (
        np.concatenate([die, np.arange(dies)]),
        np.concatenate([np.arange(count), [count] * dies]),
    )
    busy = coo_matrix((entry, at), shape=(dies, count + 1))
    whole = coo_matrix((np.ones(count), (row[slot], np.arange(count))), (len(loads), count + 1))
    aim = np.zeros(count + 1)
    aim[-1] = 1
    found = linprog(aim, busy, np.zeros(dies), whole, loads, method="highs")
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize(("slots", "dies"), [(9, 32), (10, 32), (12, 32), (2, 192)])
def test_dispatch_is_within_one_percent_of_the_linear_program(slots: int, dies: int) -> None:
    """After a loss, a better split of the same copies: as good as the optimum within 1 %."""
    loads = lognormal(4, 256, seed=slots, sigma=1.0)
    table = place_experts(loads, make_layout(dies, slots))
    layout = make_layout(dies, slots, lost=(3, 17))
    table = repair_map(table, loads, layout).table
    weights = dispatch_weights(table, loads, layout)
    for row, load, share in zip(table, loads, weights, strict=True):
        used = row >= 0
        assert np.bincount(row[used], share[used]) == pytest.approx(np.ones(256))
        assert (share[~used] == 0).all()
        assert carried_with(share, row, load, layout) <= best_split(row, load, layout) * 1.01


def carried_with(weights: FloatArray, row: IntArray, loads: FloatArray, layout: Layout) -> float:
    """The time of the slowest die of a layer with these shares of its slots."""
    used = row >= 0
    shares = (weights * loads[row])[used]
    carried = np.bincount(layout.slot_die[used], shares, minlength=layout.dies)
    return float((carried / layout.speeds).max())


@st.composite
def splits(draw: st.DrawFn) -> tuple[IntArray, FloatArray, Layout]:
    """Any map of a layer, copies wherever, with loads that are sparse, steep or lognormal."""
    dies, slots, experts = draw(st.sampled_from([(4, 2, 3), (6, 2, 5), (12, 4, 20), (40, 2, 50)]))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    row = np.concatenate([np.arange(experts), random.integers(-1, experts, dies * slots - experts)])
    row = random.permutation(row)
    loads = {
        "sparse": np.where(random.random(experts) < 0.3, random.random(experts), 0.0),
        "steep": random.permutation(np.arange(1.0, experts + 1) ** -2),
        "lognormal": random.lognormal(0, 1.2, experts),
    }[draw(st.sampled_from(["sparse", "steep", "lognormal"]))]
    speeds = np.where(random.random(dies) < draw(st.sampled_from([0.0, 0.2])), 0.5, 1.0)
    return row[None, :], loads[None, :], replace(make_layout(dies, slots), speeds=speeds)


@settings(max_examples=100, deadline=None)
@given(case=splits())
def test_any_map_is_split_within_one_percent_of_the_linear_program(
    case: tuple[IntArray, FloatArray, Layout],
) -> None:
    """Chains of copies, idle dies and slow ones: as good as the optimum within 1 %."""
    table, loads, layout = case
    weights = dispatch_weights(table, loads, layout)
    best = best_split(table[0], loads[0], layout)
    assert carried_with(weights[0], table[0], loads[0], layout) <= best * 1.01 + 1e-9


def test_steps_that_grow_for_ever_stay_numbers() -> None:
    """A split that gets better at each step, by ever stronger ones: no overflow."""
    table, loads = np.array([[1, 0, 2, 2, 1, 2, 1, 2]]), np.array([[0.25, 1.0, 1 / 9]])
    layout = replace(make_layout(4, 2), speeds=np.array([0.5, 1.0, 1.0, 1.0]))
    with np.errstate(over="raise"):
        weights = dispatch_weights(table, loads, layout)
    best = best_split(table[0], loads[0], layout)
    assert carried_with(weights[0], table[0], loads[0], layout) <= best * 1.01


def test_a_chain_of_copies_does_not_swing() -> None:
    """Two loads of 10 that three dies share: 6.67 each, though strong steps swing around it."""
    table, loads = np.array([[-1, 0, 0, 1, 1, 2, 2, -1]]), np.array([[0.0, 10.0, 10.0]])
    layout = make_layout(4, 2)
    weights = dispatch_weights(table, loads, layout)
    assert carried_with(weights[0], table[0], loads[0], layout) == pytest.approx(20 / 3, rel=0.01)


def test_copies_are_ordered_along_the_machine() -> None:
    """The first run of ranks uses the copy that is nearest to the machine's beginning."""
    layout = make_layout(4, 2, node=2)
    order = replica_order(np.array([[3, 0, 1, 2, 0, 3, 2, 1]]), 4, layout)
    assert order.tolist() == [[[1, 4], [2, 7], [3, 6], [0, 5]]]
    # Dies 0 and 1 are at the machine's end now.
    turned = replace(layout, domains=layout.domains[:, [2, 3, 0, 1]])
    assert replica_order(np.array([[3, 0, 1, 2, 0, 3, 2, 1]]), 4, turned)[0, 0].tolist() == [4, 1]


def test_the_heaviest_copy_is_the_bound_of_one_slot_a_die() -> None:
    """5 slots for loads 6, 2, 1: three copies of the first weigh 2 each."""
    assert heaviest_copy(np.array([[6.0, 2.0, 1.0]]), 5, 5).tolist() == [2.0]
