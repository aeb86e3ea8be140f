"""The index of KV blocks: what members said, whoever else is there and in whatever order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.kvcache.index import BlockEvent, BlockIndex, Place, block_event, block_keys
from raddle.core.kvcache.rows import Keys
from raddle.core.kvcache.table import BlockTable
from raddle.model.kv import BlockSpace, KvEventKind, KvTier
from raddle.model.stats import KvEvent
from raddle.model.types import RankKey

JOB = "j-1"
SPACE = BlockSpace(model_digest="m", block_tokens=4)
OTHER = replace(SPACE, tenant_salt="tenant")


def member(rank: int) -> tuple[str, RankKey]:
    return JOB, RankKey(role="cache", instance=0, rank=rank)


def name(letter: str) -> str:
    """A block's hash: 32 digits, different in the first 16."""
    return f"{ord(letter):016x}" * 2


def event(kind: str, sequence: int, letters: str = "", space: BlockSpace = SPACE) -> BlockEvent:
    hashes = tuple(name(letter) for letter in letters)
    told = KvEvent(kind=KvEventKind(kind), block_hashes=hashes, sequence=sequence)
    return block_event(told, space)


def pool(**blocks: str) -> BlockIndex:
    """Members m0, m1, ... with these blocks."""
    index = BlockIndex()
    for who, letters in sorted(blocks.items()):
        index.apply(member(int(who[1:])), "a", event("STORED", 1, letters))
    return index


def prefix(index: BlockIndex, letters: str, *ranks: int) -> int:
    keys = block_keys([name(letter) for letter in letters])
    allowed = index.allowed([member(rank) for rank in ranks])
    return int(index.prefix_lengths(SPACE, keys, np.array([0]), allowed)[0])


def held(index: BlockIndex, letter: str, space: BlockSpace = SPACE) -> list[int]:
    return [place.member[1].rank for place in index.places(space, name(letter))]


def test_a_prefix_may_lie_on_several_members() -> None:
    """Blocks a and c are on one member, b on another; d is nowhere."""
    index = pool(m0="ac", m1="b")
    assert prefix(index, "abcd", 0, 1) == 3
    assert prefix(index, "abcd", 0) == 1
    assert prefix(index, "da", 0, 1) == 0
    assert held(index, "c") == [0]
    index.validate()


def test_many_chains_are_looked_up_at_once() -> None:
    """Each chain has its own length; an empty one has none, at the end too."""
    index = pool(m0="abc")
    keys = block_keys([name(letter) for letter in "abxbcabc"])
    starts = np.array([0, 3, 3, 5, 8])
    assert index.prefix_lengths(SPACE, keys, starts).tolist() == [2, 0, 2, 3, 0]


def test_removed_and_cleared_blocks_are_gone() -> None:
    """A removal takes its block, a clearing all."""
    index = pool(m0="ab")
    index.apply(member(0), "a", event("REMOVED", 2, "b"))
    assert prefix(index, "ab", 0) == 1
    index.apply(member(0), "a", event("CLEARED", 3))
    assert index.blocks(member(0)) == 0
    index.validate()


def test_a_new_process_starts_empty_and_the_old_one_is_silent() -> None:
    """What a restarted member's earlier process says late is ignored."""
    index = pool(m0="a")
    assert index.apply(member(0), "b", event("STORED", 1, "x"))
    assert prefix(index, "a", 0) == 0
    assert not index.apply(member(0), "a", event("STORED", 2, "y"))
    assert (prefix(index, "x", 0), prefix(index, "y", 0)) == (1, 0)
    assert index.stale_events == 1
    index.validate()


def test_repeated_events_change_nothing() -> None:
    """A number that was seen already is a resend."""
    index = pool(m0="a")
    index.apply(member(0), "a", event("REMOVED", 2, "a"))
    assert not index.apply(member(0), "a", event("STORED", 1, "a"))
    assert index.blocks(member(0)) == 0


def test_a_gap_forgets_what_may_have_been_removed() -> None:
    """After a missed event only what is said from now on counts."""
    index = pool(m0="a")
    index.apply(member(0), "a", event("STORED", 3, "b"))
    assert (prefix(index, "a", 0), prefix(index, "b", 0)) == (0, 1)
    assert index.gaps == 1


def test_numbers_may_begin_anywhere() -> None:
    """The first number is taken as it is, 0 too; from then on resends and gaps are seen."""
    index = BlockIndex()
    index.apply(member(0), "a", event("STORED", 0, "a"))
    assert not index.apply(member(0), "a", event("REMOVED", 0, "a"))
    index.apply(member(0), "a", event("STORED", 2, "b"))
    assert held(index, "a") == []
    assert index.blocks(member(0)) == 1


def test_a_full_report_replaces_what_was_known() -> None:
    """After a change of leader a member clears and lists all blocks: nothing else is left."""
    index = pool(m0="abc")
    for sequence, told in enumerate([("CLEARED", ""), ("STORED", "c"), ("STORED", "d")], start=7):
        index.apply(member(0), "a", event(told[0], sequence, told[1]))
    assert [letter for letter in "abcd" if held(index, letter)] == ["c", "d"]


def test_a_dropped_member_holds_nothing_and_a_job_can_be_forgotten() -> None:
    """A process ended: its blocks are gone. A job ended: all its members are."""
    index = pool(m0="a", m1="b")
    index.drop(member(0))
    assert (held(index, "a"), held(index, "b")) == ([], [1])
    index.drop(member(1))
    index.apply(member(1), "a", event("STORED", 2, "b"))
    assert held(index, "b") == [1]
    index.forget(JOB)
    assert held(index, "b") == []
    assert index.apply(member(0), "a", event("STORED", 1, "a"))
    index.validate()


def test_the_last_words_of_an_ended_process_count_no_more() -> None:
    """They may arrive after its end: nothing of it is there again, its successor speaks."""
    index = pool(m0="a")
    index.drop(member(0), ["a"])
    assert not index.apply(member(0), "a", event("STORED", 2, "b"))
    assert (held(index, "a"), held(index, "b")) == ([], [])
    assert index.apply(member(0), "b", event("STORED", 0, "c"))
    assert held(index, "c") == [0]
    index.validate()


@pytest.mark.parametrize(
    "other",
    [
        replace(SPACE, model_digest="n"),
        replace(SPACE, weight_dtype="int8"),
        replace(SPACE, kv_dtype="fp8"),
        replace(SPACE, lora="l"),
        replace(SPACE, tenant_salt="t"),
        replace(SPACE, hash_scheme="h"),
        replace(SPACE, block_tokens=8),
        replace(SPACE, kv_group=1),
    ],
    ids=str,
)
def test_equal_hashes_of_different_spaces_are_different_blocks(other: BlockSpace) -> None:
    """Model, types, adapter, tenant, scheme, block size and group each keep blocks apart."""
    index = pool(m0="a")
    assert held(index, "a", other) == []
    index.apply(member(0), "a", event("STORED", 2, "a", other))
    index.apply(member(0), "a", event("REMOVED", 3, "a"))
    assert held(index, "a") == []
    assert held(index, "a", other) == [0]


def test_tiers_of_one_member_are_apart() -> None:
    """A block in a die's memory is not in the host's; removing one leaves the other."""
    index = BlockIndex()
    keys = block_keys([name("a")])
    for sequence, tier in enumerate([KvTier.HBM, KvTier.DRAM]):
        stored = BlockEvent(
            kind=KvEventKind.STORED, sequence=sequence, space=SPACE, keys=keys, tier=tier
        )
        index.apply(member(0), "a", stored)
    assert {place.tier for place in index.places(SPACE, name("a"))} == {KvTier.HBM, KvTier.DRAM}
    index.apply(member(0), "a", event("REMOVED", 2, "a"))
    assert index.places(SPACE, name("a")) == (Place(member(0), KvTier.HBM),)


def test_short_and_strange_hashes_are_refused() -> None:
    """A hash must have 16 hexadecimal digits at least: anything else names no block."""
    for bad in ("abc", "x" * 32, ""):
        with pytest.raises(ValueError, match=r"digits|hexadecimal"):
            block_keys([bad])


_STEPS = st.lists(
    st.tuples(
        st.integers(0, 8),  # member
        st.sampled_from("ab"),  # incarnation
        st.sampled_from(
            ["STORED", "STORED", "STORED", "REMOVED", "CLEARED", "DROP", "REBUILD", "CLEAN"]
        ),
        st.integers(0, 2),  # 0 the next number, 1 a gap, 2 a resend
        st.text(alphabet="abcdef", max_size=4),
        st.booleans(),  # another space
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(_STEPS)
def test_the_index_equals_a_naive_model_under_any_order(
    steps: list[tuple[int, str, str, int, str, bool]],
) -> None:
    """Sets by member, changed one by one, say the same as the index after every event."""
    index = BlockIndex()
    model: dict[int, set[tuple[str, bool]]] = {}
    current: dict[int, tuple[str, int, set[str]]] = {}
    for who, process, kind, jump, letters, other in steps:
        if kind == "DROP":
            index.drop(member(who), [process])
            model[who] = set()
            was, expected, retired = current.get(who, ("", -1, set()))
            if was == process:
                # What an ended process said last may arrive still, and counts no more.
                current[who] = ("", -1, {*retired, was})
            continue
        if kind in ("REBUILD", "CLEAN"):
            (index.table.rebuild if kind == "REBUILD" else index.table.clean_some)()
            continue
        was, expected, retired = current.get(who, ("", -1, set()))
        number = max(0, max(0, expected) + (0, 3, -1)[jump])
        changed = index.apply(
            member(who), process, event(kind, number, letters, OTHER if other else SPACE)
        )
        fresh = bool(was) and process != was
        stale = process in retired or (not fresh and 0 <= number < expected)
        assert changed == (not stale)
        if stale:
            continue
        if fresh:
            retired, expected = {*retired, was}, -1
        if fresh or (expected >= 0 and number > expected) or kind == "CLEARED":
            model[who] = set()
        current[who] = (process, number + 1, retired)
        blocks = {(letter, other) for letter in letters}
        mine = model.setdefault(who, set())
        if kind == "STORED":
            mine |= blocks
        elif kind == "REMOVED":
            mine -= blocks
        index.validate()
        for letter in "abcdef":
            for flag, space in ((False, SPACE), (True, OTHER)):
                want = sorted(rank for rank, has in model.items() if (letter, flag) in has)
                assert sorted(held(index, letter, space)) == want
    for rank, blocks in model.items():
        assert index.blocks(member(rank)) == len(blocks)
        for letter in "abcdef":
            assert prefix(index, letter, rank) == ((letter, False) in blocks)


# --- the table -----------------------------------------------------------------------------------


def some_keys(count: int, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).integers(1, 2**64, size=count, dtype=np.uint64)


def test_a_growing_table_keeps_everything() -> None:
    """Twenty thousand keys in batches, half of them removed: the rest is there, nothing else."""
    table, keys = BlockTable(1_000_000), some_keys(20_000)
    table.alive[1] = table.alive[2] = True
    for start in range(0, keys.size, 37):
        table.add(keys[start : start + 37], 1, 1)
        table.add(keys[start : start + 37], 1, 2)
    table.remove(keys[::2], 1, 1)
    table.kill(2)
    present = table.present(keys, 1)
    assert not present[::2].any()
    assert present[1::2].all()
    assert not table.present(some_keys(1_000, seed=1), 1).any()
    table.validate()
    table.rebuild()
    assert table.present(keys, 1).tolist() == present.tolist()
    table.validate()


def test_a_table_is_laid_out_anew_bit_by_bit() -> None:
    """While rows move, everything is found, changed and counted where it is, old or new."""
    table, keys = BlockTable(1_000_000), some_keys(12_000)
    table.alive[1] = table.alive[2] = True
    table.add(keys[:9_000], 1, 1)
    table.rebuild()
    table.clean_some()
    for start in range(9_000, 12_000, 10):
        batch = keys[start : start + 10]
        table.add(batch, 1, 1)
        table.add(keys[start - 5_000 : start - 4_990], 1, 2)
        table.remove(keys[start - 9_000 : start - 8_990], 1, 1)
        if start % 500 == 0:
            table.validate()
            assert table.present(keys[: start + 10], 1).sum() == 9_000
            assert sum(int(piece[1:].sum()) for piece in table.copies(table.alive)) == 9_000
    assert table.layouts_done == table.layouts_begun >= 2
    table.validate()


def test_no_step_of_a_layout_moves_many_rows() -> None:
    """However large the table, a small batch moves a bounded part of it."""
    table, keys = BlockTable(1_000_000), some_keys(200_000)
    table.alive[1] = True
    most = 0
    for start in range(0, keys.size, 30):
        before = table._cut if table._old is not None else 0
        table.add(keys[start : start + 30], 1, 1)
        if table._old is not None:
            most = max(most, table._cut - before)
    assert table.layouts_done > 3
    assert 0 < most < 2_000


def test_keys_with_one_home_are_all_found_or_refused() -> None:
    """Chosen keys fill the places near their home; what finds none is missing, never wrong."""
    table = BlockTable(10_000)
    table.alive[1] = True
    keys = np.arange(1, 500, dtype=np.uint64)
    table.add(keys, 1, 1)
    present = table.present(keys, 1)
    assert int(present.sum()) == int(table.counts[1]) == keys.size - table.refused
    assert 0 < table.refused < keys.size
    table.validate()


def test_a_full_index_refuses_more_and_keeps_what_it_has() -> None:
    """The number of blocks is bounded."""
    table, keys = BlockTable(2_000), some_keys(3_000)
    table.alive[1] = True
    for start in range(0, keys.size, 100):
        table.add(keys[start : start + 100], 1, 1)
    assert table.present(keys[:1_900], 1).all()
    assert table.refused >= 1_000
    table.validate()


def test_a_block_of_many_owners_is_known_of_all() -> None:
    """More owners than a row has room for: each is found, removed and voided like any other."""
    table, key = BlockTable(100), np.array([7 << 40], dtype=np.uint64)
    for owner in range(1, 11):
        table.alive[owner] = True
        table.add(key, 1, owner)
    assert table.all_holders(int(key[0]), 1) == list(range(1, 11))
    table.remove(key, 1, 2)
    table.remove(key, 1, 9)
    table.kill(3)
    table.kill(8)
    table.validate()
    assert table.all_holders(int(key[0]), 1) == [1, 4, 5, 6, 7, 10]
    only = np.zeros_like(table.alive)
    only[10] = True
    assert table.holders(key, 1, only)[0].max() == 10
    table.rebuild()
    table.validate()
    assert table.all_holders(int(key[0]), 1) == [1, 4, 5, 6, 7, 10]
    only[[1, 4]] = True
    assert [piece.tolist() for piece in table.copies(only)] == [[0, 0, 0, 1]]
