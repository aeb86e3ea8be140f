"""Expert maps: the first one, its repair after losses, and what it can still lose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.experts.coverage import coverage_margin
from raddle.core.experts.maps import IntArray, check_map, to_array, to_expert_map
from raddle.core.experts.place import initial_map
from raddle.core.experts.repair import RepairedMap, repair_map
from raddle.model.types import WeightSource


def make_domains(ranks: int, *, dies_a_node: int = 16, nodes_a_rack: int = 4) -> IntArray:
    """Ranks on consecutive dies: die, NPU, node and rack of each."""
    die = np.arange(ranks)
    node = die // dies_a_node
    return np.stack([die, die // 2, node, node // nodes_a_rack])


def loads_of(layers: int, experts: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype]:
    """Lognormal with the spread of real DeepSeek-V3 decode loads (sigma 0.6)."""
    return np.random.default_rng(seed).lognormal(0.0, 0.6, (layers, experts))


def holders(table: IntArray, layer: int, expert: int, width: int) -> list[int]:
    return [int(slot) // width for slot in np.flatnonzero(table[layer] == expert)]


# --- first maps ----------------------------------------------------------------------------------


def test_the_lowest_experts_get_the_redundant_slots() -> None:
    """4 ranks x 3 slots hold 10 experts: without loads, experts 0 and 1 get a second copy."""
    table = initial_map(2, 10, 3, make_domains(4, dies_a_node=2))
    assert check_map(table, 10, 3, [0, 1, 2, 3]) == []
    assert np.bincount(table[0]).tolist() == [2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    assert (table[0] == table[1]).all()


def test_the_hottest_experts_get_the_redundant_slots() -> None:
    """Copies go where the load a copy is highest: 9 is split in three before 4 in two."""
    loads = np.array([[1.0, 9.0, 1.0, 4.0]])
    table = initial_map(1, 4, 2, make_domains(4), loads=loads)
    assert np.bincount(table[0]).tolist() == [1, 4, 1, 2]


def test_more_slots_than_ranks_can_tell_apart_stay_empty() -> None:
    """2 ranks x 4 slots and 3 experts: each rank holds each expert once, one slot is empty."""
    table = initial_map(1, 3, 4, make_domains(2))
    assert check_map(table, 3, 4, [0, 1]) == []
    assert np.count_nonzero(table == -1) == 2


def test_shared_expert_ranks_stay_empty() -> None:
    """The last two ranks host the shared expert only."""
    table = initial_map(1, 8, 2, make_domains(6), shared_expert_ranks=2)
    assert (table[0, 8:] == -1).all()
    assert check_map(table, 8, 2, [0, 1, 2, 3]) == []


def test_copies_differ_in_every_domain_when_they_can() -> None:
    """EP320 has 64 redundant copies: each pair of copies differs in NPU, node and rack."""
    domains = make_domains(320)
    table = initial_map(58, 256, 1, domains)
    for expert in range(64):
        first, second = holders(table, 0, expert, 1)
        assert (domains[:, first] != domains[:, second]).all()


def test_copies_share_no_more_than_they_must() -> None:
    """Inside one node copies can't differ in node, but do in NPU."""
    domains = make_domains(16)
    table = initial_map(1, 24, 2, domains)
    for expert in range(8):
        first, second = holders(table, 0, expert, 2)
        assert domains[1, first] != domains[1, second]


def test_loads_are_balanced() -> None:
    """EP32 with 9 slots a rank: the fullest rank of the worst layer is within 12 % of the mean."""
    loads = loads_of(58, 256)
    domains = make_domains(32)
    table = initial_map(58, 256, 9, domains, loads=loads)
    copies = np.stack([np.bincount(row[row >= 0], minlength=256) for row in table])
    share = np.take_along_axis(loads / copies, table, axis=1)
    carried = share.reshape(58, 32, 9).sum(axis=2)
    assert (carried.max(axis=1) / carried.mean(axis=1)).max() < 1.12


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 40),
    width=st.integers(1, 8),
    extra=st.integers(0, 12),
    layers=st.integers(1, 3),
    shared=st.integers(0, 2),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_first_maps_are_sound(
    experts: int, width: int, extra: int, layers: int, shared: int, seed: int | None
) -> None:
    """Every expert has a copy, none twice on a rank, whatever the sizes and loads."""
    ranks = -(-experts // width) + extra
    loads = None if seed is None else loads_of(layers, experts, seed)
    domains = make_domains(ranks + shared, dies_a_node=4, nodes_a_rack=2)
    table = initial_map(layers, experts, width, domains, loads=loads, shared_expert_ranks=shared)
    assert table.shape == (layers, (ranks + shared) * width)
    assert check_map(table, experts, width, list(range(ranks))) == []
    assert (table[:, ranks * width :] == -1).all()


def test_check_map_names_every_defect() -> None:
    """A wrong number, a double and a missing expert are each named with their layer."""
    table = np.array([[0, 1, 1, 2], [0, 0, 1, 7]])
    assert check_map(table, 3, 2, [0, 1]) == [
        "layer 1: no such experts: [7]",
        "layer 1: experts without a live copy: [2]",
        "layer 1: rank 0 holds twice: [0]",
    ]
    assert check_map(table[:1], 3, 2, [0]) == ["layer 0: experts without a live copy: [2]"]


def test_a_map_survives_its_wire_form() -> None:
    """Array to `ExpertMap` and back changes nothing."""
    table = initial_map(3, 10, 3, make_domains(4))
    stored = to_expert_map(table, 3, 10)
    assert (stored.slots_per_rank, stored.experts) == (3, 10)
    assert (to_array(stored) == table).all()


# --- repair --------------------------------------------------------------------------------------


def without(ranks: int, *lost: int) -> list[int]:
    return [rank for rank in range(ranks) if rank not in lost]


def moves_of(repaired: RepairedMap) -> list[tuple[int, int, int, int]]:
    return [(r, m.layer, m.expert, m.slot) for r, ms in repaired.moves.items() for m in ms]


def test_a_covered_loss_moves_nothing() -> None:
    """All experts of the lost rank have a copy elsewhere: its slots die, nothing is loaded."""
    table = np.array([[0, 1, 1, 0]])
    repaired = repair_map(table, 2, 2, live=[0])
    assert repaired.table.tolist() == [[0, 1, -1, -1]]
    assert (repaired.experts_moved, repaired.donor_slots, repaired.kept) == (0, 0, 2)


def test_an_uncovered_expert_takes_an_empty_slot() -> None:
    """Expert 2 is lost with rank 1 and goes to rank 0's empty slot, from disk."""
    repaired = repair_map(np.array([[0, 1, -1, 2, -1, -1]]), 3, 3, live=[0])
    assert repaired.table.tolist() == [[0, 1, 2, -1, -1, -1]]
    (move,) = repaired.moves[0]
    assert (move.expert, move.slot, move.source) == (2, 2, WeightSource.DISK)
    assert repaired.donor_slots == 0


def test_a_redundant_copy_gives_its_slot() -> None:
    """No slot is empty: the second copy of expert 0 gives way to expert 3."""
    repaired = repair_map(np.array([[0, 1, 2, 0, 3, 1]]), 2, 4, live=[0, 1])
    assert repaired.table.tolist() == [[3, 1, 2, 0, -1, -1]]
    assert moves_of(repaired) == [(0, 0, 3, 0)]
    assert (repaired.donor_slots, repaired.kept, repaired.uncovered) == (1, 3, ())


def test_what_finds_no_slot_is_listed() -> None:
    """Two experts are lost and no slot can give way: both are listed with their layer."""
    repaired = repair_map(np.array([[0, 1, 2, 3]]), 2, 4, live=[0])
    assert repaired.uncovered == ((0, 2), (0, 3))
    assert repaired.experts_moved == 0


def test_shared_expert_ranks_take_no_guest() -> None:
    """Rank 2 is empty, but it hosts the shared expert: expert 1 finds no slot."""
    table = np.array([[0, 1, -1]])
    assert repair_map(table, 1, 2, live=[0, 2], guests_refused=[2]).uncovered == ((0, 1),)
    assert repair_map(table, 1, 2, live=[0, 2]).uncovered == ()


def test_a_joined_rank_loads_its_seat_from_the_closest_copies() -> None:
    """A new process of rank 0 reads expert 0 from its own node, and expert 1 from disk."""
    table = np.array([[0, 1, 2, 0, 0, 3]])
    domains = np.array([[0, 1, 2], [0, 1, 0]])
    repaired = repair_map(table, 2, 4, live=[0, 1, 2], joined=[0], domains=domains)
    assert (repaired.table == table).all()
    first, second = repaired.moves[0]
    assert (first.expert, first.source, first.source_rank) == (0, WeightSource.PEER, 2)
    assert (second.expert, second.source) == (1, WeightSource.DISK)
    assert repaired.kept == 4


def test_two_new_processes_are_no_source_for_each_other() -> None:
    """Both ranks that hold expert 0 are new: its weights are in nobody's memory."""
    repaired = repair_map(np.array([[0, 0]]), 1, 1, live=[0, 1], joined=[0, 1])
    sources = [move.source for moves in repaired.moves.values() for move in moves]
    assert sources == [WeightSource.DISK, WeightSource.DISK]


def test_one_die_of_ep320_moves_at_most_a_slot_a_layer() -> None:
    """Whichever die is lost, at most 61 loads (58 layers) bring every expert back."""
    domains = make_domains(320)
    table = initial_map(58, 256, 1, domains, loads=loads_of(58, 256))
    for lost in (0, 7, 100, 319):
        live = without(320, lost)
        repaired = repair_map(table, 1, 256, live=live, domains=domains)
        assert check_map(repaired.table, 256, 1, live) == []
        assert repaired.experts_moved <= 58
        uncovered = sum(1 for e in table[:, lost] if np.count_nonzero(table == e) == 1)
        assert repaired.experts_moved >= uncovered


def test_one_node_of_ep320_spreads_its_loads() -> None:
    """16 dies are lost: only what had no other copy is loaded, few on each survivor."""
    domains = make_domains(320)
    table = initial_map(58, 256, 1, domains)
    live = list(range(304))
    repaired = repair_map(table, 1, 256, live=live, domains=domains)
    assert check_map(repaired.table, 256, 1, live) == []
    gone = np.array([np.setdiff1d(table[0], table[0, :304]).size])
    assert repaired.experts_moved == 58 * int(gone[0]) <= 928
    mean = repaired.experts_moved / 64
    assert max(len(moves) for moves in repaired.moves.values()) <= mean * 4 + 1


@settings(max_examples=80, deadline=None)
@given(
    experts=st.integers(1, 24),
    width=st.integers(1, 5),
    extra=st.integers(0, 6),
    data=st.data(),
)
def test_repairs_are_sound_and_small(
    experts: int, width: int, extra: int, data: st.DataObject
) -> None:
    """Over two losses: all covered or listed, never twice, and only what is needed moves."""
    ranks = -(-experts // width) + extra
    domains = make_domains(ranks, dies_a_node=4)
    table = initial_map(2, experts, width, domains, loads=loads_of(2, experts))
    live = list(range(ranks))
    for _ in range(2):
        kept = data.draw(st.sets(st.sampled_from(live), min_size=1))
        joined = data.draw(st.sets(st.sampled_from(sorted(kept))))
        live = sorted(kept)
        repaired = repair_map(
            table, width, experts, live=live, joined=sorted(joined), domains=domains
        )
        check_repair(table, repaired, experts, width, live, sorted(joined))
        table = repaired.table


def check_repair(
    before: IntArray,
    repaired: RepairedMap,
    experts: int,
    width: int,
    live: list[int],
    joined: list[int],
) -> None:
    after = repaired.table
    missing = {(layer, e) for layer, e in repaired.uncovered}
    defects = check_map(after, experts, width, live)
    assert all("without a live copy" in defect for defect in defects)
    for layer in range(len(after)):
        alive = [s for s in range(after.shape[1]) if s // width in live]
        found = set(after[layer, alive].tolist())
        assert {(layer, e) for e in range(experts) if e not in found} == {
            pair for pair in missing if pair[0] == layer
        }
        dead = [s for s in range(after.shape[1]) if s not in alive]
        assert (after[layer, dead] == -1).all()
        had = set(before[layer, alive].tolist())
        changed = [s for s in alive if before[layer, s] != after[layer, s]]
        # What moves had no live copy, and is exactly what changed or was loaded anew.
        assert all(int(after[layer, s]) not in had for s in changed)
        loaded = {m.slot for ms in repaired.moves.values() for m in ms if m.layer == layer}
        anew = {s for s in alive if s // width in joined and after[layer, s] >= 0}
        assert loaded == set(changed) | anew
        if any(pair[0] == layer for pair in missing):
            copies = np.bincount(after[layer, alive][after[layer, alive] >= 0])
            assert copies.max(initial=0) <= 1
            assert (after[layer, alive] >= 0).all()
    for rank, moves in repaired.moves.items():
        for move in moves:
            assert move.slot // width == rank
            assert after[move.layer, move.slot] == move.expert
            if move.source is WeightSource.PEER:
                own = slice(move.source_rank * width, (move.source_rank + 1) * width)
                assert move.expert in after[move.layer, own]
                assert move.source_rank in live
                assert move.source_rank not in joined


# --- coverage ------------------------------------------------------------------------------------


def test_coverage_of_a_small_map() -> None:
    """Ranks 0 and 1 share an NPU: losing it takes expert 0, any other loss takes less."""
    table = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    domains = np.array([[0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 1]])
    found = coverage_margin(table, 1, 2, domains, ("die", "npu", "node"))
    assert (found.margin_dies, found.uncovered) == (1, 0)
    assert [(w.level, w.member, w.experts_lost) for w in found.worst] == [
        ("die", 0, 0),
        ("npu", 0, 1),
        ("node", 0, 1),
    ]


def test_coverage_counts_what_is_gone() -> None:
    """An expert without a copy makes the margin -1."""
    found = coverage_margin(np.array([[0, -1, 1]]), 1, 3, make_domains(3))
    assert (found.margin_dies, found.uncovered) == (-1, 1)


def test_one_copy_each_has_no_margin() -> None:
    """At one expert a die, every die's loss takes one expert of each layer."""
    found = coverage_margin(initial_map(58, 256, 1, make_domains(256)), 1, 256, make_domains(256))
    assert found.margin_dies == 0
    assert [w.experts_lost for w in found.worst] == [58, 58 * 2, 58 * 16, 58 * 64]


@pytest.mark.parametrize("seed", range(5))
def test_coverage_is_what_trying_every_loss_finds(seed: int) -> None:
    """Margin and worst losses equal those of trying all sets of dies and all members."""
    rng = np.random.default_rng(seed)
    domains = make_domains(6, dies_a_node=4, nodes_a_rack=1)
    table = initial_map(2, 7, 2, domains, loads=rng.lognormal(0, 1, (2, 7)))
    found = coverage_margin(table, 2, 7, domains)

    def lost(ranks: tuple[int, ...]) -> int:
        live = [s for s in range(12) if s // 2 not in ranks]
        return sum(len(set(range(7)) - set(row[live].tolist())) for row in table)

    margin = 0
    while all(lost(ranks) == 0 for ranks in itertools.combinations(range(6), margin + 1)):
        margin += 1
    assert found.margin_dies == margin
    for worst, level in zip(found.worst, domains, strict=True):
        members = [tuple(np.flatnonzero(level == m).tolist()) for m in np.unique(level)]
        assert worst.experts_lost == max(lost(ranks) for ranks in members)
