"""Replays of small traces whose outcome can be counted by hand, and what holds in any of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.core.kvcache.replay import Action, ActionKind, Replay, ReplayConfig, ReplayResult
from raddle.core.kvcache.replayed_ranks import DecodeRanks
from raddle.model.errors import PermanentError
from raddle.model.kv import TraceRequest

FAIL, DRAIN, JOIN, LOSE = ActionKind


def request(time_s: float, *blocks: int, output_tokens: int = 10) -> TraceRequest:
    return TraceRequest(time_s, blocks, 512 * len(blocks), output_tokens, time_s)


def replay(requests: list[TraceRequest], *actions: Action, **config: float | None) -> ReplayResult:
    made = Replay(ReplayConfig(**config), requests, actions)  # type: ignore[arg-type]
    result = made.run()
    made.pool.validate()
    return result


def test_an_infinite_pool_misses_each_block_once() -> None:
    """References less distinct blocks are hits, as far as prefixes go."""
    found = replay([request(0, 1, 2), request(10, 1, 2, 3), request(20, 4, 2)])
    assert (found.references, found.unique_blocks, found.hits) == (7, 4, 2)


def test_a_block_is_there_once_its_copies_are_written() -> None:
    """A request that comes before the write-back is done finds nothing."""
    trace = [request(0, 1), request(0.5, 1), request(3, 1)]
    found = replay(trace, write_bytes_per_s=35_979_264, replicas=2)
    assert found.hits == 1


def test_the_least_recently_used_block_leaves() -> None:
    """Room for two copies: a use keeps a block, the other one leaves for a third."""
    trace = [request(t, block) for t, block in enumerate([1, 2, 1, 3, 1, 2])]
    found = replay(trace, hosts=1, pool_blocks=2)
    assert (found.hits, found.blocks_evicted) == (2, 2)


def test_the_tail_of_a_prefix_leaves_before_its_head() -> None:
    """Of blocks used together the last one is worth least."""
    trace = [request(0, 1, 2, 3), request(10, 9), request(20, 1, 2, 3)]
    assert replay(trace, hosts=1, pool_blocks=3).hits == 2


def test_every_copy_counts_and_leaves_together() -> None:
    """Two copies of each block on two hosts: four copies are two blocks."""
    trace = [request(t, block) for t, block in enumerate([1, 2, 3, 1, 3])]
    found = replay(trace, hosts=2, pool_blocks=4, replicas=2)
    assert (found.hits, found.blocks_evicted) == (1, 2)


def test_a_full_host_passes_blocks_on() -> None:
    """The pool evicts nothing while any host has room, wherever blocks rank first."""
    trace = [request(t, t % 8) for t in range(16)]
    assert replay(trace, hosts=4, pool_blocks=8).hits == 8


def test_a_lost_host_takes_single_copies() -> None:
    """With one copy of each the blocks of the host are lost, once each, and nothing is repaired."""
    trace = [request(0, *range(40)), request(20, *range(40))]
    found = replay(trace, Action(10, FAIL, 0), hosts=2)
    assert 0 < found.blocks_lost < 40
    assert found.hits < 40
    assert (found.recovery_copies, found.unprotected_s) == (0, 0)


def test_lost_copies_are_made_again() -> None:
    """With two copies nothing is lost; repair makes as many as the host had, in budget's time."""
    trace = [request(0, *range(40)), request(20, *range(40))]
    found = replay(trace, Action(10, FAIL, 0), hosts=3, replicas=2, repair_bytes_per_s=35_979_264)
    assert (found.blocks_lost, found.hits) == (0, 40)
    assert 0 < found.recovery_copies <= 40
    # A block a second of each of two hosts, which hold about as much.
    assert found.recovery_copies / 2 <= found.unprotected_s + 0.01
    assert found.unprotected_s < 0.7 * found.recovery_copies


def test_with_fewer_hosts_than_copies_one_is_enough() -> None:
    """Two hosts, two copies, one host lost: blocks are protected as far as can be."""
    found = replay([request(0, 1, 2)], Action(10, FAIL, 1), hosts=2, replicas=2)
    assert (found.blocks_lost, found.recovery_copies, found.unprotected_s) == (0, 0, 0)
    again = replay(
        [request(0, 1, 2)], Action(10, FAIL, 1), Action(20, JOIN, 1), hosts=2, replicas=2
    )
    assert again.recovery_copies == 2
    assert 0 < again.unprotected_s < 1


def test_a_drained_host_loses_nothing() -> None:
    """Its blocks are copied away before it leaves; that is no recovery."""
    trace = [request(0, *range(40)), request(20, *range(40))]
    found = replay(trace, Action(10, DRAIN, 0), Action(15, FAIL, 1), hosts=3, replicas=1)
    safe = replay(trace, Action(10, DRAIN, 0), hosts=3, replicas=1)
    assert (safe.hits, safe.blocks_lost, safe.recovery_copies) == (40, 0, 0)
    assert safe.drain_copies > 0
    assert safe.unprotected_s == 0
    assert 0 < found.blocks_lost < 40
    two = replay(trace, Action(10, DRAIN, 0), hosts=3, replicas=2)
    assert (two.hits, two.unprotected_s, two.recovery_copies) == (40, 0, 0)


def test_a_joined_host_is_filled_by_and_by() -> None:
    """Of the first writes after it came it takes only what its ramp allows."""
    trace = [request(t / 10, t) for t in range(200)]
    made = Replay(ReplayConfig(hosts=2, pool_blocks=100), trace, [Action(15, JOIN, 2)])
    result = made.run()
    made.pool.validate()
    assert 0 < made.pool.hosts[2].used <= 10
    assert result.blocks_evicted > 0


def test_a_drained_host_sends_within_its_own_budget() -> None:
    """What only one host holds leaves it at that host's rate, however many take it."""
    trace = [request(0, *range(400))]
    lost = replay(trace, Action(30, FAIL, 0), hosts=4).blocks_lost
    found = replay(
        trace,
        Action(10, DRAIN, 0),
        Action(30.5, FAIL, 0),
        hosts=4,
        repair_bytes_per_s=35_979_264,
    )
    assert (found.drain_copies, found.blocks_lost) == (20, lost - 20)


def test_a_host_that_comes_back_is_filled_without_a_failure() -> None:
    """Copies that a planned change made necessary count with those of the drain."""
    found = replay(
        [request(0, 1, 2)], Action(10, DRAIN, 1), Action(20, JOIN, 1), hosts=2, replicas=2
    )
    assert (found.drain_copies, found.recovery_copies) == (2, 0)


def test_a_joining_host_does_not_empty_the_pool() -> None:
    """Blocks stay with the copies that they have until the host has room for the others."""
    trace = [request(0, *range(100)), request(2000.5, 200), request(3000, *range(100))]
    made = Replay(
        ReplayConfig(hosts=2, pool_blocks=204, replicas=2),
        trace,
        [Action(1500, FAIL, 1), Action(2000, JOIN, 1)],
    )
    found = made.run()
    made.pool.validate()
    assert (found.hits, found.blocks_evicted, found.blocks_lost) == (100, 0, 0)
    assert (found.recovery_copies, made.pool.copies) == (101, 202)
    assert 50 < found.unprotected_s < 62


def test_no_block_enters_with_fewer_copies() -> None:
    """Without room for all copies of a block there is none for the block."""
    made = Replay(
        ReplayConfig(hosts=2, pool_blocks=1, replicas=2), [request(0, 1), request(9, 1)], []
    )
    found = made.run()
    assert (found.hits, found.blocks_evicted, len(made.pool)) == (0, 0, 0)


def test_what_finds_no_room_for_its_copy_leaves() -> None:
    """A full pool that lost a host keeps fewer blocks, each of them protected."""
    trace = [request(0, *range(6))]
    made = Replay(ReplayConfig(hosts=3, pool_blocks=12, replicas=2), trace, [Action(10, FAIL, 0)])
    found = made.run()
    made.pool.validate()
    assert 0 < len(made.pool) <= 4
    assert not made.pool.below
    assert found.unprotected_s < 1


@pytest.mark.parametrize("kind", [FAIL, DRAIN, JOIN])
def test_what_cannot_happen_is_refused(kind: ActionKind) -> None:
    """A host that is not there, is there already or never was; a rank that is none."""
    before = Action(1, FAIL if kind is not JOIN else DRAIN, 0)
    subject = 1 if kind is JOIN else 0
    with pytest.raises(PermanentError, match="host"):
        replay([request(0, 1)], before, Action(2, kind, subject), hosts=2)
    with pytest.raises(PermanentError, match="hosts are 0 to 1"):
        replay([request(0, 1)], Action(2, FAIL, 2), hosts=2)
    with pytest.raises(PermanentError, match="no rank 3"):
        replay([request(0, 1)], Action(2, LOSE, 3), ranks=3)
    with pytest.raises(PermanentError, match="rank 1 is lost twice"):
        replay([request(0, 1)], Action(2, LOSE, 1), Action(3, LOSE, 1), ranks=3)


def test_a_lost_ranks_sequence_computes_what_the_pool_lacks() -> None:
    """Its prompt is in the pool; what it had generated is computed again, and no more."""
    trace = [request(0, 1, 2, 3, output_tokens=1_000)]
    found = replay(trace, Action(10, LOSE, 0), ranks=2, hosts=2)
    assert found.sequences_lost == 1
    assert found.tokens_recomputed_without_pool == 3 * 512 + found.tokens_recomputed
    assert 190 < found.tokens_recomputed < 210


def test_generated_blocks_come_back() -> None:
    """Full blocks of what a rank made are restored as prompts are, again and again."""
    trace = [request(0, 1, output_tokens=1_500)]
    once = replay(trace, Action(60, LOSE, 0), ranks=3, hosts=2)
    assert once.tokens_recomputed == once.tokens_recomputed_without_pool - 3 * 512
    assert 150 < once.tokens_recomputed < 250
    twice = replay(trace, Action(60, LOSE, 0), Action(61, LOSE, 1), ranks=3, hosts=2)
    assert twice.tokens_recomputed == pytest.approx(2 * once.tokens_recomputed, abs=30)
    assert (once.references, once.unique_blocks, once.hits) == (1, 1, 0)


def test_what_a_rank_had_not_written_is_lost_with_it() -> None:
    """Of two blocks that it made the second is still on its way; the next rank writes it again."""
    trace = [request(0, 1, output_tokens=3_000)]
    losses = [Action(60, LOSE, 0), Action(90, LOSE, 1)]
    for count, restored in ((1, 2 * 512), (2, (2 + 3) * 512)):
        found = replay(trace, *losses[:count], ranks=3, hosts=2, write_bytes_per_s=35_979_264 / 20)
        assert found.tokens_recomputed == found.tokens_recomputed_without_pool - restored


def test_generated_blocks_take_room() -> None:
    """Two blocks that a rank made and a prompt of one do not fit into two places."""
    found = replay([request(0, 1, output_tokens=1_500)], hosts=2, pool_blocks=4, ranks=1)
    assert found.blocks_evicted == 1


def test_equal_ranks_take_turns() -> None:
    """No rank stays empty because a lower one always is as empty."""
    ranks = DecodeRanks(3, 0.05, 512)
    taken = []
    for time_s in range(0, 40, 10):
        ranks.end_until(time_s)
        decoding = ranks.place(request(time_s, time_s), time_s)
        assert decoding is not None
        taken.append(decoding.rank)
    assert taken == [0, 1, 2, 0]


@pytest.mark.parametrize("before", [(), (Action(10, DRAIN, 1),)], ids=len)
def test_a_lost_node_leaves_the_blocks_of_its_own_sequences(before: tuple[Action, ...]) -> None:
    """A rank's only copies are never on its own node, shared and moved ones neither."""
    trace = [
        request(n * 0.01, 0, *range(10 * n + 1, 10 * n + 9), output_tokens=2_000) for n in range(64)
    ]
    node = [Action(30, LOSE, rank) for rank in range(16)] + [Action(30, FAIL, 0)]
    found = replay(trace, *before, *node, ranks=64, hosts=4)
    assert found.sequences_lost == 16
    assert found.blocks_lost > 0
    restored = found.tokens_recomputed_without_pool - found.tokens_recomputed
    assert restored == 16 * 10 * 512


def test_without_ranks_left_a_sequence_ends() -> None:
    """All ranks are lost at once: their sequences are counted once and go nowhere."""
    found = replay(
        [request(0, 1, output_tokens=900)], Action(5, LOSE, 0), Action(5, LOSE, 1), ranks=2
    )
    assert found.sequences_lost == 1


_ACTIONS = st.lists(
    st.tuples(st.floats(0, 50), st.sampled_from([FAIL, DRAIN, JOIN]), st.integers(0, 4)), max_size=6
)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    pool_blocks=st.one_of(st.none(), st.integers(0, 40)),
    replicas=st.integers(1, 3),
    actions=_ACTIONS,
)
def test_whatever_happens_the_books_are_right(
    seed: int, pool_blocks: int | None, replicas: int, actions: list[tuple[float, ActionKind, int]]
) -> None:
    """Copies on different nodes, hosts within their room, losses only with hosts, sums exact."""
    rng = random.Random(seed)
    trace = [
        request(t, *(rng.randrange(8) * 10 + depth for depth in range(rng.randrange(1, 6))))
        for t in range(50)
    ]
    made = Replay(
        ReplayConfig(hosts=4, pool_blocks=pool_blocks, replicas=replicas, ranks=64),
        trace,
        [Action(t, kind, host) for t, kind, host in actions if kind is JOIN or host < 4],
    )
    try:
        found = made.run()
    except PermanentError as error:
        assert "in the pool then" in error.message  # noqa: PT017 - most histories are possible
        return
    made.pool.validate()
    assert not made.pool.below, "what lacks a copy gets it or leaves"
    assert found.hits <= found.references - found.unique_blocks
    if all(kind is not FAIL for _, kind, _ in actions):
        assert (found.blocks_lost, found.recovery_copies) == (0, 0)
    if pool_blocks is None and not actions:
        assert found.hits == replay(trace).hits
