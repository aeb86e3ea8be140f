"""Where each sequence of lost ranks continues, how its KV comes back, and when.

In go the sequences, the surviving decode ranks and the index of blocks; out comes a plan. For each
sequence there are three ways: restore the leading blocks that the pool or the own memory of a peer
still has and compute the tail; compute all anew; give up, when neither would be done by its
deadline. Tokens are exact in each case.

Cost model, in seconds: a rank restores and computes its sequences one after another, so with the
target's queue q a sequence is back at q + min(RESTORE_S + bytes / bandwidth + tail / rate,
tokens / rate). No host sends faster than its own link, so the last sequence is back no earlier
than the busiest host has sent its blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np
from numpy.typing import NDArray

from raddle.core.kvcache.figures import PREFILL_TOKENS_PER_S_A_DIE, SEQUENCE_S
from raddle.core.kvcache.index import BlockIndex, MemberName, block_keys, leading
from raddle.core.kvcache.rows import Flags, Owners
from raddle.model.kv import BlockSpace, KvTier
from raddle.model.reasons import Decision
from raddle.model.routes import SequenceReport
from raddle.model.types import RankKey, SequenceRestore, Why

#: What asking members for blocks takes at least, whatever their size.
RESTORE_S = 0.001
#: Ranks that are asked for one sequence's blocks.
PEERS_A_SEQUENCE_MAX = 4
# A rank that is full, or has no memory left, is taken only when all are.
_FULL = 1e9
_NO_MEMORY = 1e6
_NO_PEERS: dict[int, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivor:
    """A live decode rank. Maxima of 0 mean without a limit; tokens are KV that is held."""

    key: RankKey
    sequences: int
    sequences_max: int
    tokens: int = 0
    tokens_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCosts:
    """What moving and computing KV takes on this machine."""

    bytes_per_token: int = 70_272
    pool_bytes_per_s: float = 151e9
    peer_bytes_per_s: float = 196e9
    host_bytes_per_s: float = 151e9
    prefill_tokens_per_s: float = PREFILL_TOKENS_PER_S_A_DIE
    #: What earlier recoveries took of what was predicted for them.
    correction: float = 1.0


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """One decision a sequence, by sequence id, and when they are back."""

    restores: tuple[SequenceRestore, ...] = ()
    median_s: float = 0.0
    last_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Pool:
    """Whom blocks may come from, and what names them."""

    index: BlockIndex
    job_uid: str
    space: BlockSpace
    members: Sequence[RankKey]
    #: Ranks that live and let others read what they hold in their own memory.
    peers: Sequence[RankKey] = ()

    def names(self, keys: Sequence[RankKey]) -> list[MemberName]:
        return [(self.job_uid, key) for key in keys]


@dataclass(frozen=True, slots=True)
class _Held:
    """What is left of each sequence: leading blocks anywhere, and on each survivor."""

    left: list[int]
    #: How many of these only peers have.
    from_peers: list[int]
    #: By sequence: survivors (by number) with blocks of it, and how many.
    peers: dict[int, dict[int, int]]
    #: Of each block of all sequences, the owner that will send it, the pool's first; 0 for none.
    source: Owners
    #: By owner: is it a rank, not a pool member?
    is_peer: Flags
    starts: list[int]


def plan_restores(
    sequences: Sequence[SequenceReport], survivors: Sequence[Survivor], pool: Pool, costs: KvCosts
) -> RestorePlan:
    """Give every sequence a survivor and a way back. Without survivors there is nothing to plan.

    Long sequences choose first, so that the short ones even out the load.
    """
    if not survivors or not sequences:
        return RestorePlan()
    ordered = sorted(sequences, key=lambda s: (-_tokens(s), s.sequence_id))
    survivors = sorted(survivors, key=lambda s: (s.key.role, s.key.instance, s.key.rank))
    held = _held(ordered, survivors, pool)
    targets = _Targets(survivors, costs)
    fetched: list[Owners] = [np.zeros(0, dtype=np.uint16)]
    restores: list[SequenceRestore] = []
    for number, sequence in enumerate(ordered):
        tokens = _tokens(sequence)
        peers = held.peers.get(number, _NO_PEERS)
        left = _Left(held.left[number], held.from_peers[number], peers)
        choice = targets.choose(tokens, left, pool.space)
        late = 0 < sequence.left < choice.back_s
        start = held.starts[number]
        sources = held.source[start + choice.held : start + choice.blocks]
        asked = _peers_of(sources, held, pool) if held.from_peers[number] else ()
        restores.append(
            _restore(sequence, tokens, choice, pool.space.block_tokens, asked, late=late)
        )
        if not late:
            targets.take(choice, tokens)
            fetched.append(sources)
    backs = sorted(r.predicted for r in restores if not r.why.says(Decision.GIVE_UP))
    blocks = int(np.bincount(np.concatenate(fetched), minlength=1).max())
    busiest_s = blocks * pool.space.block_tokens * costs.bytes_per_token / costs.host_bytes_per_s
    busiest_s *= costs.correction
    restores.sort(key=lambda restore: restore.sequence_id)
    return RestorePlan(
        tuple(restores),
        median_s=median_low(backs) if backs else 0.0,
        last_s=max(backs[-1], busiest_s) if backs else 0.0,
    )


def _tokens(sequence: SequenceReport) -> int:
    return sequence.prompt_tokens + sequence.sent_tokens


def _held(ordered: Sequence[SequenceReport], survivors: Sequence[Survivor], pool: Pool) -> _Held:
    """Look all blocks of all sequences up at once.

    Only full blocks count, and the last token is always computed: it yields the next one.
    """
    size = pool.space.block_tokens
    hashes: list[str] = []
    starts: list[int] = []
    for sequence in ordered:
        starts.append(len(hashes))
        tokens = _tokens(sequence)
        if size > 0 and tokens > 0:
            hashes += sequence.block_hashes[: (tokens - 1) // size]
    begins = np.array(starts, dtype=np.intp)
    in_pool = pool.index.allowed(pool.names(pool.members), (KvTier.DRAM, KvTier.STORAGE))
    ranks = dict.fromkeys([*pool.peers, *(s.key for s in survivors)])
    on_ranks = pool.index.allowed(pool.names(list(ranks)), (KvTier.HBM,))
    owners = pool.index.owners(pool.space, block_keys(hashes), in_pool | on_ranks)
    source: Owners = np.where(in_pool[owners], owners, 0).max(axis=1, initial=0)
    peers: dict[int, dict[int, int]] = {}
    from_peers = [0] * len(ordered)
    if on_ranks.any():
        on_rank = np.where(on_ranks[owners], owners, 0)
        peers = _peers(on_rank, begins, survivors, pool)
        source = np.where(source > 0, source, on_rank.max(axis=1, initial=0))
    left = leading(source > 0, begins)
    if on_ranks.any():
        before = np.append(0, np.cumsum(on_ranks[source]))
        from_peers = (before[begins + left] - before[begins]).tolist()
    return _Held(left.tolist(), from_peers, peers, source, on_ranks, starts)


def _peers_of(sources: Owners, held: _Held, pool: Pool) -> tuple[RankKey, ...]:
    """The ranks that will send some of these blocks, those that send most first."""
    from_peers: list[int] = sources[held.is_peer[sources]].tolist()
    counts = Counter(from_peers)
    most = sorted(counts, key=lambda number: (-counts[number], number))[:PEERS_A_SEQUENCE_MAX]
    return tuple(pool.index.place(number).member[1] for number in most)


def _peers(
    owners: Owners, starts: NDArray[np.intp], survivors: Sequence[Survivor], pool: Pool
) -> dict[int, dict[int, int]]:
    """By sequence: how many leading blocks each survivor holds in its own memory.

    All survivors at once: of the blocks that one holds of one sequence, in order, the k-th is a
    leading one if it is the sequence's k-th.
    """
    number_of = np.full(int(owners.max(initial=0)) + 1, -1, dtype=np.int64)
    for number, name in enumerate(pool.names([s.key for s in survivors])):
        owner = pool.index.owner(name, KvTier.HBM)
        if 0 < owner < len(number_of):
            number_of[owner] = number
    block, column = (number_of[owners] >= 0).nonzero()
    sequence = np.searchsorted(starts, block, side="right") - 1
    pair = sequence * len(survivors) + number_of[owners[block, column]]
    order = np.argsort(pair, kind="stable")
    pair, place = pair[order], (block - starts[sequence])[order]
    nth = np.arange(len(pair)) - np.searchsorted(pair, pair)
    pairs, lengths = np.unique(pair[nth == place], return_counts=True)
    found: dict[int, dict[int, int]] = {}
    for one, length in zip(pairs.tolist(), lengths.tolist(), strict=True):
        which, number = divmod(one, len(survivors))
        found.setdefault(which, {})[number] = length
    return found


@dataclass(frozen=True, slots=True)
class _Left:
    """Of one sequence: leading blocks anywhere, how many only peers have, and by survivor."""

    blocks: int
    from_peers: int
    on_survivors: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Choice:
    """One sequence on one survivor: `blocks` restored, of which `held` are there already."""

    number: int
    key: RankKey
    blocks: int
    held: int
    back_s: float
    busy_s: float
    full: bool


class _Targets:
    """Survivors with their queues."""

    def __init__(self, survivors: Sequence[Survivor], costs: KvCosts) -> None:
        self._costs = costs
        self._keys = [s.key for s in survivors]
        self._survivors = survivors
        self._ready_s = [0.0] * len(survivors)
        self._sequences = [s.sequences for s in survivors]
        self._tokens = [s.tokens for s in survivors]
        self._cost = np.array([self._cost_of(number) for number in range(len(survivors))])

    def _cost_of(self, number: int) -> float:
        """When it could begin; each sequence that runs there counts against it."""
        most = self._survivors[number].sequences_max
        full = 0 < most <= self._sequences[number]
        return self._ready_s[number] + self._sequences[number] * SEQUENCE_S + full * _FULL

    def _lacks(self, number: int, tokens: int) -> bool:
        return 0 < self._survivors[number].tokens_max < self._tokens[number] + tokens

    def _first(self, tokens: int) -> int:
        """The rank that could begin first, one with enough memory if there is any."""
        number = int(self._cost.argmin())
        if not self._lacks(number, tokens):
            return number
        count = range(len(self._survivors))
        lacks = np.array([_NO_MEMORY if self._lacks(n, tokens) else 0.0 for n in count])
        return int((self._cost + lacks).argmin())

    def choose(self, tokens: int, left: _Left, space: BlockSpace) -> _Choice:
        """Where the sequence is back first."""
        number, held = self._first(tokens), 0
        blocks, busy_s = self._way(tokens, left, 0, space)
        best = float(self._cost[number]) + busy_s
        for peer, length in left.on_survivors.items():
            # What a rank holds it need not fetch; what it lacks comes from the pool or peers.
            there, peer_s = self._way(tokens, left, length, space)
            if self._cost[peer] + peer_s < best and not self._lacks(peer, tokens):
                best = float(self._cost[peer]) + peer_s
                number, blocks, busy_s, held = peer, there, peer_s, min(length, there)
        back_s = (self._ready_s[number] + busy_s) * self._costs.correction
        full = bool(self._cost[number] >= _FULL) or self._lacks(number, tokens)
        return _Choice(number, self._keys[number], blocks, held, back_s, busy_s, full)

    def _way(self, tokens: int, left: _Left, held: int, space: BlockSpace) -> tuple[int, float]:
        """(blocks restored, seconds): restoring, or computing all where that is faster."""
        costs = self._costs
        all_s = tokens / costs.prefill_tokens_per_s
        block_bytes = space.block_tokens * costs.bytes_per_token
        fetched = left.blocks - held
        from_peers = min(left.from_peers, fetched)
        restore_s = (tokens - left.blocks * space.block_tokens) / costs.prefill_tokens_per_s
        if fetched:
            restore_s += RESTORE_S + from_peers * block_bytes / costs.peer_bytes_per_s
            restore_s += (fetched - from_peers) * block_bytes / costs.pool_bytes_per_s
        return (left.blocks, restore_s) if left.blocks and restore_s < all_s else (0, all_s)

    def take(self, choice: _Choice, tokens: int) -> None:
        self._ready_s[choice.number] += choice.busy_s
        self._sequences[choice.number] += 1
        self._tokens[choice.number] += tokens
        self._cost[choice.number] = self._cost_of(choice.number)


def _restore(
    sequence: SequenceReport,
    tokens: int,
    choice: _Choice,
    block_tokens: int,
    peers: tuple[RankKey, ...],
    *,
    late: bool,
) -> SequenceRestore:
    restored = choice.blocks * block_tokens
    target = choice.key
    where = f"{target.role}/{target.instance} rank {target.rank}"
    if late:
        message = f"it would be back in {choice.back_s:.3f} s, its time is over in"
        return SequenceRestore(
            sequence_id=sequence.sequence_id,
            source=sequence.rank,
            tokens=tokens,
            why=Why(reason=Decision.GIVE_UP, message=f"{message} {sequence.left:.3f} s"),
        )
    load = "all ranks are full, it waits there" if choice.full else "where it is back first"
    message = (
        f"continues on {where}, {load}: {restored} of {tokens} tokens from blocks that are left,"
        f" {tokens - restored} recomputed, back in {choice.back_s:.3f} s"
    )
    return SequenceRestore(
        sequence_id=sequence.sequence_id,
        source=sequence.rank,
        target=target,
        block_hashes=sequence.block_hashes[: choice.blocks],
        peers=peers,
        tokens=tokens,
        tokens_restored=restored,
        tokens_recomputed=tokens - restored,
        why=Why(reason=Decision.RESTORE if restored else Decision.RECOMPUTE, message=message),
        predicted=choice.back_s,
    )
