"""The pool's index, and where lost sequences continue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raddle.core.kvcache.index import PoolIndex
from raddle.core.kvcache.restore import Survivor, plan_restores
from raddle.model.routes import SequenceReport
from raddle.model.stats import KvEvent
from raddle.model.types import RankKey


def member(rank: int) -> RankKey:
    return RankKey(role="cache", instance=0, rank=rank)


def decode(rank: int) -> RankKey:
    return RankKey(role="decode", instance=0, rank=rank)


def stored(sequence: int, *blocks: str) -> KvEvent:
    return KvEvent(kind="STORED", block_hashes=blocks, sequence=sequence)


def removed(sequence: int, *blocks: str) -> KvEvent:
    return KvEvent(kind="REMOVED", block_hashes=blocks, sequence=sequence)


def pool(**blocks: tuple[str, ...]) -> PoolIndex:
    """Members m0, m1, ... with these blocks."""
    index = PoolIndex()
    for name, hashes in sorted(blocks.items()):
        index.apply(member(int(name[1:])), "a", stored(1, *hashes))
    return index


def test_a_prefix_may_lie_on_several_members() -> None:
    """Blocks a and c are on one member, b on another; d is nowhere."""
    index = pool(m0=("a", "c"), m1=("b",))
    live = (member(0), member(1))
    assert index.prefix_length(("a", "b", "c", "d"), live) == 3
    assert index.prefix_length(("a", "b", "c", "d"), live[:1]) == 1
    assert index.prefix_length(("d", "a"), live) == 0
    assert index.holders("c", live) == (member(0),)


def test_removed_and_cleared_blocks_are_gone() -> None:
    """A removal takes its block, a clearing all."""
    index = pool(m0=("a", "b"))
    index.apply(member(0), "a", removed(2, "b"))
    assert index.prefix_length(("a", "b"), (member(0),)) == 1
    index.apply(member(0), "a", KvEvent(kind="CLEARED", sequence=3))
    assert index.blocks(member(0)) == 0
    index.validate()


def test_a_new_process_starts_empty_and_the_old_one_is_silent() -> None:
    """What a restarted member's earlier process says late is ignored."""
    index = pool(m0=("a",))
    assert index.apply(member(0), "b", stored(1, "x"))
    assert index.prefix_length(("a",), (member(0),)) == 0
    assert not index.apply(member(0), "a", stored(2, "y"))
    assert index.prefix_length(("x",), (member(0),)) == 1
    assert index.prefix_length(("y",), (member(0),)) == 0
    index.validate()


def test_repeated_events_change_nothing() -> None:
    """A number that was seen already is a resend."""
    index = pool(m0=("a",))
    index.apply(member(0), "a", removed(2, "a"))
    assert not index.apply(member(0), "a", stored(1, "a"))
    assert index.blocks(member(0)) == 0


def test_a_gap_forgets_what_may_have_been_removed() -> None:
    """After a missed event only what is said from now on counts."""
    index = pool(m0=("a",))
    index.apply(member(0), "a", stored(3, "b"))
    assert index.prefix_length(("a",), (member(0),)) == 0
    assert index.prefix_length(("b",), (member(0),)) == 1


def test_numbers_may_begin_anywhere() -> None:
    """The first number is taken as it is, 0 too; from then on resends and gaps are seen."""
    index = PoolIndex()
    index.apply(member(0), "a", stored(0, "a"))
    assert not index.apply(member(0), "a", removed(0, "a"))
    index.apply(member(0), "a", stored(2, "b"))
    assert index.holders("a", (member(0),)) == ()
    assert index.blocks(member(0)) == 1


def test_a_dropped_member_holds_nothing() -> None:
    """Its process ended: its blocks are forgotten."""
    index = pool(m0=("a",))
    index.drop(member(0))
    assert index.blocks(member(0)) == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30))
def test_the_index_is_what_the_member_has(changes: list[tuple[str, bool]]) -> None:
    """With every event in order the index equals the member's own set."""
    index, own = PoolIndex(), set[str]()
    for number, (block, is_stored) in enumerate(changes, start=1):
        event = stored(number, block) if is_stored else removed(number, block)
        index.apply(member(0), "a", event)
        (own.add if is_stored else own.discard)(block)
    assert {b for b in "abcd" if index.holders(b, (member(0),))} == own


# --- restore -------------------------------------------------------------------------------------


def sequence(name: str, prompt: int, sent: int, *blocks: str) -> SequenceReport:
    return SequenceReport(
        sequence_id=name,
        rank=decode(9),
        prompt_tokens=prompt,
        sent_tokens=sent,
        block_hashes=blocks,
    )


def test_what_the_pool_has_is_restored_and_the_rest_recomputed() -> None:
    """Two of three blocks of 4 tokens are left: 8 of 14 tokens are restored."""
    (found,) = plan_restores(
        (sequence("s", 10, 4, "a", "b", "c"),),
        (Survivor(decode(1), 0, 8),),
        pool(m0=("a", "b")),
        4,
        (member(0),),
    )
    assert (found.source, found.target) == (decode(9), decode(1))
    assert found.block_hashes == ("a", "b")
    assert (found.tokens, found.tokens_restored, found.tokens_recomputed) == (14, 8, 6)
    assert found.why.reason == "RESTORE"
    assert found.why.message == (
        "continues on decode/0 rank 1, the least loaded rank:"
        " 8 of 14 tokens from the pool, 6 recomputed"
    )


def test_the_last_token_is_always_computed() -> None:
    """All 8 tokens are in the pool, but the second block holds the token that yields the next."""
    (found,) = plan_restores(
        (sequence("s", 8, 0, "a", "b"),),
        (Survivor(decode(1), 0, 8),),
        pool(m0=("a", "b")),
        4,
        (member(0),),
    )
    assert (found.tokens_restored, found.tokens_recomputed) == (4, 4)


def test_without_a_pool_everything_is_recomputed() -> None:
    """No member is live: the reason says so."""
    (found,) = plan_restores(
        (sequence("s", 8, 1, "a", "b"),), (Survivor(decode(1), 0, 8),), pool(m0=("a", "b")), 4, ()
    )
    assert (found.tokens_restored, found.why.reason) == (0, "RECOMPUTE")


def test_sequences_go_to_the_least_loaded_ranks() -> None:
    """Loads 2, 0, 1 even out; equal loads go to the lower rank."""
    survivors = (Survivor(decode(0), 2, 8), Survivor(decode(1), 0, 8), Survivor(decode(2), 1, 8))
    lost = tuple(sequence(f"s{n}", 1, 0) for n in range(4))
    found = plan_restores(lost, survivors, PoolIndex(), 4, ())
    assert [r.target.rank for r in found] == [1, 1, 2, 0]


def test_long_sequences_choose_first() -> None:
    """The longest goes to the emptiest rank; the answer is in the order of the ids."""
    survivors = (Survivor(decode(0), 1, 8), Survivor(decode(1), 0, 8))
    lost = (sequence("b", 5, 0), sequence("a", 2, 0), sequence("c", 9, 0))
    found = plan_restores(lost, survivors, PoolIndex(), 4, ())
    assert [(r.sequence_id, r.target.rank) for r in found] == [("a", 1), ("b", 0), ("c", 1)]


def test_full_ranks_are_taken_only_when_all_are_full() -> None:
    """Rank 0 has fewer sequences but no room; when rank 1 is full too, the reason says so."""
    survivors = (Survivor(decode(0), 1, 1), Survivor(decode(1), 2, 3))
    lost = tuple(sequence(f"s{n}", 1, 0) for n in range(2))
    found = plan_restores(lost, survivors, PoolIndex(), 4, ())
    assert [r.target.rank for r in found] == [1, 0]
    assert "all ranks are full" in found[1].why.message


def test_without_survivors_nothing_is_planned() -> None:
    """The front door keeps the sequences until there is a rank."""
    assert plan_restores((sequence("s", 1, 0),), (), PoolIndex(), 4, ()) == ()
