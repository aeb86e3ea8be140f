"""Where lost sequences continue, what comes back and what is computed, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.kvcache.index import BlockEvent, BlockIndex, block_keys
from raddle.core.kvcache.recoveries import Recoveries, Recovery
from raddle.core.kvcache.restore import (
    PEERS_A_SEQUENCE_MAX,
    RESTORE_S,
    KvCosts,
    Pool,
    RestorePlan,
    Survivor,
    plan_restores,
)
from raddle.model.kv import BlockSpace, KvEventKind, KvTier
from raddle.model.routes import SequenceReport
from raddle.model.types import RankKey, SequenceRestore, Why

JOB = "j-1"
SPACE = BlockSpace(model_digest="m", block_tokens=4)
# A token takes a second to compute and a hundredth to fetch.
COSTS = KvCosts(
    bytes_per_token=1,
    pool_bytes_per_s=100,
    peer_bytes_per_s=100,
    host_bytes_per_s=100,
    prefill_tokens_per_s=1,
)


def cache(rank: int) -> RankKey:
    return RankKey(role="cache", instance=0, rank=rank)


def decode(rank: int) -> RankKey:
    return RankKey(role="decode", instance=0, rank=rank)


def name(letter: str) -> str:
    return f"{ord(letter):032x}"[::-1]


def hold(index: BlockIndex, key: RankKey, letters: str, tier: KvTier = KvTier.DRAM) -> None:
    keys = block_keys([name(letter) for letter in letters])
    stored = BlockEvent(kind=KvEventKind.STORED, sequence=1, space=SPACE, keys=keys, tier=tier)
    index.apply((JOB, key), "a", stored)


def pool(*held: str, members: int | None = None) -> Pool:
    """Cache ranks 0, 1, ... with these blocks; the first `members` of them live."""
    index = BlockIndex()
    for rank, letters in enumerate(held):
        hold(index, cache(rank), letters)
    live = len(held) if members is None else members
    return Pool(index, JOB, SPACE, [cache(rank) for rank in range(live)])


def sequence(
    name_: str, prompt: int, sent: int, blocks: str = "", left: float = 0
) -> SequenceReport:
    return SequenceReport(
        sequence_id=name_,
        rank=decode(9),
        prompt_tokens=prompt,
        sent_tokens=sent,
        block_hashes=tuple(name(letter) for letter in blocks),
        left=left,
    )


def survivor(rank: int, sequences: int = 0, sequences_max: int = 8) -> Survivor:
    return Survivor(key=decode(rank), sequences=sequences, sequences_max=sequences_max)


def plan(
    lost: list[SequenceReport], survivors: list[Survivor], held: Pool, costs: KvCosts = COSTS
) -> RestorePlan:
    return plan_restores(lost, survivors, held, costs)


def test_what_the_pool_has_is_restored_and_the_rest_recomputed() -> None:
    """Two of three blocks of 4 tokens are left: 8 of 14 tokens are restored."""
    (found,) = plan([sequence("s", 10, 4, "abc")], [survivor(1)], pool("a", "b")).restores
    assert (found.source, found.target) == (decode(9), decode(1))
    assert found.block_hashes == (name("a"), name("b"))
    assert (found.tokens, found.tokens_restored, found.tokens_recomputed) == (14, 8, 6)
    assert found.predicted == pytest.approx(RESTORE_S + 0.08 + 6)
    assert found.why == Why(
        reason="RESTORE",
        message="continues on decode/0 rank 1, where it is back first: 8 of 14 tokens from blocks"
        " that are left, 6 recomputed, back in 6.081 s",
    )


def test_the_last_token_is_always_computed() -> None:
    """All 8 tokens are in the pool, but the second block holds the token that yields the next."""
    (found,) = plan([sequence("s", 8, 0, "ab")], [survivor(1)], pool("ab")).restores
    assert (found.tokens_restored, found.tokens_recomputed) == (4, 4)


def test_only_live_members_count() -> None:
    """What only a dead member holds is recomputed: the reason says so."""
    (found,) = plan([sequence("s", 8, 1, "ab")], [survivor(1)], pool("ab", members=0)).restores
    assert (found.tokens_restored, found.why.reason) == (0, "RECOMPUTE")


def test_computing_is_chosen_where_it_is_faster() -> None:
    """Over a slow link blocks are left where they are."""
    slow = replace(COSTS, pool_bytes_per_s=0.5)
    (found,) = plan([sequence("s", 9, 1, "ab")], [survivor(1)], pool("ab"), slow).restores
    assert (found.why.reason, found.predicted) == ("RECOMPUTE", 10)


def test_a_sequence_that_would_come_too_late_is_given_up() -> None:
    """It is told why, takes no rank's time, and others go on."""
    lost = [sequence("late", 20, 0, left=5), sequence("s", 3, 0, left=5)]
    found = plan(lost, [survivor(1)], pool())
    late, other = found.restores
    assert (late.why.reason, late.target) == ("GIVE_UP", RankKey())
    assert late.why.message == "it would be back in 20.000 s, its time is over in 5.000 s"
    assert (other.why.reason, other.predicted) == ("RECOMPUTE", 3)
    assert (found.median_s, found.last_s) == (3, 3)


def test_a_rank_that_holds_blocks_already_is_preferred() -> None:
    """A peer with the prefix in its own memory needs no transfer, and is back first."""
    held = pool("ab")
    hold(held.index, decode(2), "abc", KvTier.HBM)
    lost = [sequence("s", 13, 0, "abc")]
    (found,) = plan(lost, [survivor(1), survivor(2, sequences=5)], held).restores
    assert (found.target, found.tokens_restored) == (decode(2), 12)
    assert found.predicted == pytest.approx(1)


def prefill(rank: int) -> RankKey:
    return RankKey(role="prefill", instance=0, rank=rank)


def test_what_the_pool_lacks_comes_from_the_memory_of_peers() -> None:
    """A prefill rank and another decode rank have the first blocks: the plan names them."""
    held = replace(pool("c"), peers=[prefill(0), decode(2)])
    hold(held.index, prefill(0), "a", KvTier.HBM)
    hold(held.index, decode(2), "b", KvTier.HBM)
    costs = replace(COSTS, peer_bytes_per_s=10)
    (found,) = plan([sequence("s", 13, 0, "abc")], [survivor(1)], held, costs).restores
    assert (found.target, found.tokens_restored) == (decode(1), 12)
    assert set(found.peers) == {prefill(0), decode(2)}
    assert found.predicted == pytest.approx(RESTORE_S + 8 / 10 + 4 / 100 + 1)


def test_peers_are_not_asked_for_what_the_pool_has() -> None:
    """A block in the pool comes from there, whoever else has it; a lost rank is no peer."""
    held = replace(pool("ab"), peers=[prefill(0)])
    hold(held.index, prefill(0), "ab", KvTier.HBM)
    hold(held.index, decode(9), "abc", KvTier.HBM)
    (found,) = plan([sequence("s", 13, 0, "abc")], [survivor(1)], held).restores
    assert (found.tokens_restored, found.peers) == (8, ())


def test_a_plan_names_few_peers() -> None:
    """Of many ranks with a block each those that have most are asked, the rest is computed."""
    letters = "abcdefgh"
    held = replace(pool(), peers=[prefill(n) for n in range(len(letters))])
    for number, letter in enumerate(letters):
        hold(held.index, prefill(number), letter, KvTier.HBM)
    (found,) = plan([sequence("s", 40, 0, letters)], [survivor(1)], held).restores
    assert len(found.peers) == PEERS_A_SEQUENCE_MAX
    assert set(found.peers) <= set(held.peers)


def test_sequences_spread_by_the_time_they_take() -> None:
    """Each goes where it is back first, the longest first; equals go to the lower rank."""
    lost = [sequence("b", 5, 0), sequence("a", 2, 0), sequence("c", 9, 0), sequence("d", 1, 0)]
    found = plan(lost, [survivor(0), survivor(1)], pool())
    assert [(r.sequence_id, r.target.rank) for r in found.restores] == [
        ("a", 1),
        ("b", 1),
        ("c", 0),
        ("d", 1),
    ]
    assert [r.predicted for r in found.restores] == [7, 5, 9, 8]
    assert (found.median_s, found.last_s) == (7, 9)


def test_a_busy_rank_gets_less() -> None:
    """Sequences that run there count against a rank where times are equal."""
    lost = [sequence("s", 1, 0)]
    found = plan(lost, [survivor(0, sequences=2), survivor(1), survivor(2, sequences=1)], pool())
    assert found.restores[0].target.rank == 1


def test_full_ranks_are_taken_only_when_all_are_full() -> None:
    """Full by sequences or by KV memory; when all are, the reason says so."""
    ranks = [survivor(0, 1, 1), survivor(1, 2, 3)]
    found = plan([sequence(f"s{n}", 1, 0) for n in range(2)], ranks, pool()).restores
    assert [r.target.rank for r in found] == [1, 0]
    assert "all ranks are full" in found[1].why.message
    small = replace(survivor(0), tokens=90, tokens_max=100)
    (found_one,) = plan([sequence("s", 20, 0)], [small, survivor(1, 5, 9)], pool()).restores
    assert found_one.target.rank == 1


def test_a_host_that_sends_everything_bounds_the_last() -> None:
    """Four ranks fetch at once from one host: the last is back when the host has sent all."""
    costs = replace(COSTS, host_bytes_per_s=4)
    lost = [sequence(f"s{n}", 9, 0, "ab") for n in range(4)]
    found = plan(lost, [survivor(n) for n in range(4)], pool("ab"), costs)
    assert found.last_s == pytest.approx(4 * 8 / 4)
    assert found.median_s == pytest.approx(RESTORE_S + 0.08 + 1)


def test_without_survivors_nothing_is_planned() -> None:
    """The front door keeps the sequences until there is a rank."""
    assert plan([sequence("s", 1, 0)], [], pool()) == RestorePlan()


@settings(deadline=None)
@given(
    lost=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 9), st.integers(0, 10)), max_size=12
    ),
    held=st.lists(st.text("abcdefghij", max_size=10), max_size=3),
    ranks=st.integers(1, 4),
)
def test_every_plan_adds_up(lost: list[tuple[int, int, int]], held: list[str], ranks: int) -> None:
    """Each sequence once; restored is a whole prefix that live members hold; sums are exact."""
    reports = [
        sequence(f"s{n:02}", prompt, sent, "abcdefghij"[:blocks])
        for n, (prompt, sent, blocks) in enumerate(lost)
    ]
    found = plan(reports, [survivor(n, 0, 0) for n in range(ranks)], pool(*held))
    assert [r.sequence_id for r in found.restores] == [r.sequence_id for r in reports]
    for report, restore in zip(reports, found.restores, strict=True):
        assert restore.tokens == report.prompt_tokens + report.sent_tokens
        assert restore.tokens_restored == 4 * len(restore.block_hashes) < restore.tokens
        assert restore.tokens_restored + restore.tokens_recomputed == restore.tokens
        letters = "abcdefghij"[: len(restore.block_hashes)]
        assert restore.block_hashes == tuple(map(name, letters))
        assert all(any(letter in blocks for blocks in held) for letter in letters)
        assert restore.predicted <= found.last_s + 1e-9


# --- what became of it ---------------------------------------------------------------------------


def recovery(begin_s: float = 10, **waiting: int) -> Recovery:
    restores = tuple(SequenceRestore(sequence_id=who) for who in waiting)
    return Recovery(JOB, "i-1", 2, RestorePlan(restores, 1, 2), begin_s, dict(waiting))


def test_a_sequence_is_back_when_it_sends_more() -> None:
    """A report without progress is none; median and last are told when they are known."""
    seen = Recoveries()
    seen.began(recovery(a=3, b=4, c=5))
    seen.reported(JOB, [sequence("a", 9, 3)], [], 11)
    assert seen.of(JOB)[0].backs_s == []
    seen.reported(JOB, [sequence("a", 9, 4)], ["b"], 12)
    (one,) = seen.of(JOB)
    assert (one.median_s, one.last_s) == (2, 0)
    seen.reported("j-2", [sequence("c", 9, 9)], [], 13)
    assert seen.reported(JOB, [sequence("c", 9, 9)], [], 14) == [one]
    assert (one.median_s, one.last_s) == (2, 4)


def test_predictions_are_corrected_by_what_happened() -> None:
    """It took twice as long as predicted: the next prediction is larger, others are not."""
    seen = Recoveries()
    seen.began(recovery(a=3))
    seen.reported(JOB, [sequence("a", 9, 4)], [], 14)
    assert seen.correction(JOB) == pytest.approx(1.3)
    assert seen.correction("j-2") == 1


def test_a_sequence_lost_again_waits_in_the_newer_recovery() -> None:
    """The older record ends without it."""
    seen = Recoveries()
    seen.began(recovery(a=3))
    seen.began(recovery(20, a=3))
    seen.reported(JOB, [sequence("a", 9, 4)], [], 21)
    assert [one.backs_s for one in seen.of(JOB)] == [[], [1]]
    seen.forget(JOB)
    assert seen.of(JOB) == []
