"""Where each sequence of a lost rank continues, and how much of its KV survives.

In go the sequences of lost ranks, the surviving decode ranks and the pool's index; out comes one
`SequenceRestore` a sequence. Tokens are exact either way: what the pool lacks is recomputed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from raddle.core.kvcache.index import PoolIndex
from raddle.model.routes import SequenceReport
from raddle.model.types import RankKey, SequenceRestore, Why


@dataclass(frozen=True, slots=True)
class Survivor:
    """A live decode rank. `sequences_max` 0 means without a limit."""

    key: RankKey
    sequences: int
    sequences_max: int


def plan_restores(
    sequences: Sequence[SequenceReport],
    survivors: Sequence[Survivor],
    index: PoolIndex,
    kv_block_tokens: int,
    live_members: Sequence[RankKey],
) -> tuple[SequenceRestore, ...]:
    """Give every sequence the least loaded survivor (ties by rank); by sequence id.

    Long sequences choose first, so that the short ones even out the load. Without survivors there
    is nothing to plan.
    """
    # A full rank is taken only when all are: its sequences then wait their turn.
    heap = [(_is_full(s, s.sequences), s.sequences, _order(s.key), s) for s in survivors]
    heapq.heapify(heap)
    restores: list[SequenceRestore] = []
    for sequence in sorted(sequences if heap else (), key=lambda s: (-_tokens(s), s.sequence_id)):
        full, count, order, survivor = heap[0]
        heapq.heapreplace(heap, (_is_full(survivor, count + 1), count + 1, order, survivor))
        kept = _kept_blocks(sequence, index, kv_block_tokens, live_members)
        restores.append(_restore(sequence, survivor.key, kept, kv_block_tokens, full=full))
    return tuple(sorted(restores, key=lambda restore: restore.sequence_id))


def _tokens(sequence: SequenceReport) -> int:
    return sequence.prompt_tokens + sequence.sent_tokens


def _order(rank: RankKey) -> tuple[str, int, int]:
    return rank.role, rank.instance, rank.rank


def _is_full(survivor: Survivor, sequences: int) -> bool:
    return 0 < survivor.sequences_max <= sequences


def _kept_blocks(
    sequence: SequenceReport,
    index: PoolIndex,
    kv_block_tokens: int,
    live_members: Sequence[RankKey],
) -> int:
    """Full blocks to restore; the last token is always computed, since it yields the next one."""
    tokens = _tokens(sequence)
    if kv_block_tokens <= 0 or tokens <= 0:
        return 0
    usable = sequence.block_hashes[: (tokens - 1) // kv_block_tokens]
    return index.prefix_length(usable, live_members)


def _restore(
    sequence: SequenceReport, target: RankKey, kept: int, kv_block_tokens: int, *, full: bool
) -> SequenceRestore:
    tokens = _tokens(sequence)
    restored = kept * kv_block_tokens
    where = f"{target.role}/{target.instance} rank {target.rank}"
    reason = "RESTORE" if restored else "RECOMPUTE"
    load = "all ranks are full, it waits there" if full else "the least loaded rank"
    message = (
        f"continues on {where}, {load}: {restored} of {tokens} tokens from the pool,"
        f" {tokens - restored} recomputed"
    )
    return SequenceRestore(
        sequence_id=sequence.sequence_id,
        source=sequence.rank,
        target=target,
        block_hashes=sequence.block_hashes[:kept],
        tokens=tokens,
        tokens_restored=restored,
        tokens_recomputed=tokens - restored,
        why=Why(reason=reason, message=message),
    )
