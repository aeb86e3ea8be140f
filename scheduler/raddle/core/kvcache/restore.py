"""What becomes of each sequence of a lost decode rank.

In go the sequences that front doors own, the surviving ranks and the pool's blocks; out comes for
each sequence a rank to continue on, the blocks that it can fetch, and how much it recomputes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raddle.core.kvcache.index import PoolIndex
from raddle.model.routes import SequenceReport
from raddle.model.types import RankKey, SequenceRestore, Why


@dataclass(frozen=True, slots=True)
class Survivor:
    """A decode rank that can take sequences."""

    key: RankKey
    sequences: int
    #: 0 means no limit.
    sequences_max: int


def plan_restores(
    lost: Sequence[SequenceReport],
    survivors: Sequence[Survivor],
    pool: PoolIndex,
    kv_block_tokens: int,
    pool_members: Sequence[RankKey],
) -> tuple[SequenceRestore, ...]:
    """A restore for each sequence, by sequence id; without survivors there is none to plan."""
    if not survivors:
        return ()
    load = {survivor.key: survivor.sequences for survivor in survivors}
    most = {s.key: s.sequences_max or len(lost) + s.sequences + 1 for s in survivors}
    found = []
    # Long sequences first, so that the last ones even out the load.
    for sequence in sorted(lost, key=lambda s: (-_tokens(s), s.sequence_id)):
        target = min(
            load, key=lambda key: (load[key] >= most[key], load[key], key.instance, key.rank)
        )
        load[target] += 1
        found.append(_restore(sequence, target, pool, kv_block_tokens, pool_members))
    return tuple(sorted(found, key=lambda restore: restore.sequence_id))


def _tokens(sequence: SequenceReport) -> int:
    return sequence.prompt_tokens + sequence.sent_tokens


def _restore(
    sequence: SequenceReport,
    target: RankKey,
    pool: PoolIndex,
    kv_block_tokens: int,
    pool_members: Sequence[RankKey],
) -> SequenceRestore:
    blocks = pool.prefix_length(sequence.block_hashes, pool_members)
    tokens = _tokens(sequence)
    restored = min(blocks * kv_block_tokens, tokens)
    if restored == 0:
        why = Why(reason="RECOMPUTE", message="no block of it is in the pool")
    else:
        message = f"{blocks} blocks are in the pool, the tail is recomputed"
        why = Why(reason="RESTORE", message=message)
    return SequenceRestore(
        sequence_id=sequence.sequence_id,
        source=sequence.rank,
        target=target,
        block_hashes=sequence.block_hashes[:blocks],
        tokens=tokens,
        tokens_restored=restored,
        tokens_recomputed=tokens - restored,
        why=why,
    )
