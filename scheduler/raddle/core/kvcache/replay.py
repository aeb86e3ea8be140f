"""A trace of requests against a pool of hosts: hits, losses, repair, and lost ranks' sequences.

In go requests and actions (hosts that fail, drain and join, ranks that are lost), out comes a
`ReplayResult`. The prompt's missing blocks are computed one after another at the rate of a prefill
instance and written back as they are done: a block enters the pool when all its copies are there.
Decode ranks write what they make back in the same way.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import Any

from raddle.core.kvcache.figures import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    NODES_A_RACK,
    PREFILL_TOKENS_PER_S,
    REPAIR_BYTES_PER_S,
    TOKEN_S,
    WRITE_BYTES_PER_S,
)
from raddle.core.kvcache.replayed_copies import HostCopies
from raddle.core.kvcache.replayed_pool import ReplayedPool
from raddle.core.kvcache.replayed_ranks import DecodeRanks, Decoding
from raddle.model.errors import PermanentError, Reason
from raddle.model.kv import TraceRequest

#: A copy that found no room while hosts that joined fill up is tried again so much later.
_AGAIN_S = 1.0


class ActionKind(IntEnum):
    """What happens to the machine, in the order in which simultaneous ones count."""

    FAIL = 0
    DRAIN = 1
    JOIN = 2
    LOSE_RANK = 3


@dataclass(frozen=True, slots=True)
class Action:
    """`subject` is a host, or a rank for LOSE_RANK."""

    time_s: float
    kind: ActionKind
    subject: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayConfig:
    """Sizes of the machine and of the pool. `pool_blocks` counts copies; None is without end."""

    hosts: int = 48
    pool_blocks: int | None = None
    replicas: int = 1
    ranks: int = 0
    block_bytes: int = BLOCK_BYTES
    block_tokens: int = BLOCK_TOKENS
    prefill_tokens_per_s: float = PREFILL_TOKENS_PER_S
    write_bytes_per_s: float = WRITE_BYTES_PER_S
    #: Of each host that sends copies.
    repair_bytes_per_s: float = REPAIR_BYTES_PER_S

    def capacity(self, host: int) -> int | None:
        """Copies that fit on a host: equal shares, what is left over goes to the first ones."""
        if self.pool_blocks is None:
            return None
        share, rest = divmod(self.pool_blocks, self.hosts)
        return share + (host < rest)


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment, for a plot: sums since the beginning, and what is present then."""

    time_s: float
    references: int
    hits: int
    blocks: int
    blocks_below: int


@dataclass(slots=True, kw_only=True)
class ReplayResult:
    """Sums over the whole replay."""

    requests: int = 0
    references: int = 0
    unique_blocks: int = 0
    hits: int = 0
    recovery_copies: int = 0
    drain_copies: int = 0
    unprotected_s: float = 0.0
    blocks_lost: int = 0
    blocks_evicted: int = 0
    sequences_lost: int = 0
    tokens_recomputed: int = 0
    tokens_recomputed_without_pool: int = 0
    samples: list[Sample] = field(default_factory=list[Sample])


def _moment(action: Action) -> tuple[float, ActionKind]:
    return action.time_s, action.kind


class _Step(IntEnum):
    """What is due; simultaneous steps are taken in this order."""

    WRITTEN = 0
    FULL = 1
    COPIED = 2
    AGAIN = 3
    ACTION = 4
    ARRIVAL = 5


class Replay:
    """One replay; `run` once."""

    def __init__(
        self, config: ReplayConfig, requests: Sequence[TraceRequest], actions: Sequence[Action]
    ) -> None:
        check_actions(config, actions)
        self._config = config
        joining = [action.subject for action in actions if action.kind is ActionKind.JOIN]
        self.pool = ReplayedPool(
            [config.capacity(host) for host in range(config.hosts)],
            config.replicas,
            NODES_A_RACK,
            max([config.hosts, *(host + 1 for host in joining)]),
        )
        self._ranks = DecodeRanks(config.ranks, TOKEN_S, config.block_tokens)
        self._copies = HostCopies(config.repair_bytes_per_s, config.block_bytes)
        self._result = ReplayResult(requests=len(requests))
        self._due: list[tuple[float, _Step, int, Any]] = []
        self._number = 0
        self._now = 0.0
        self._failed = False
        self._draining = False
        self._again = False
        for request in requests:
            self._at(request.arrival_s, _Step.ARRIVAL, request)
        for (time_s, kind), grouped in groupby(sorted(actions, key=_moment), key=_moment):
            same = list(grouped)
            # Ranks that are lost together are lost at once: none takes another's sequences.
            together = [same] if kind is ActionKind.LOSE_RANK else [[one] for one in same]
            for group in together:
                self._at(time_s, _Step.ACTION, group)

    def _at(self, time_s: float, step: _Step, what: Any) -> None:
        heapq.heappush(self._due, (time_s, step, self._number, what))
        self._number += 1

    def run(self) -> ReplayResult:
        """Everything that is due, until nothing is."""
        seen: set[int] = set()
        while self._due:
            time_s, step, _, what = heapq.heappop(self._due)
            if self.pool.below:
                self._result.unprotected_s += time_s - self._now
            self._now = time_s
            self._ranks.end_until(time_s)
            if step is _Step.ARRIVAL:
                seen.update(what.blocks)
            self._step(step, what)
            self._go_on_copying()
        self._sample()
        self._result.unique_blocks = len(seen)
        self._result.blocks_lost = len(self.pool.counts.lost)
        self._result.blocks_evicted = self.pool.counts.blocks_evicted
        self._result.recovery_copies = self.pool.counts.copies_restored
        self._result.drain_copies = self.pool.counts.copies_drained
        return self._result

    def _step(self, step: _Step, what: Any) -> None:
        match step:
            case _Step.ARRIVAL:
                self._arrive(what)
            case _Step.WRITTEN:
                self._written(*what)
            case _Step.FULL:
                self._full(what)
            case _Step.COPIED:
                self._copied(*what)
            case _Step.AGAIN:
                self._again = False
                self._queue_copies()
            case _:
                self._act(what)

    def _sample(self) -> None:
        result = self._result
        result.samples.append(
            Sample(self._now, result.references, result.hits, len(self.pool), len(self.pool.below))
        )

    # --- requests ------------------------------------------------------------------------------

    def _arrive(self, request: TraceRequest) -> None:
        config, blocks = self._config, request.blocks
        hits = self.pool.leading(blocks)
        self._result.references += len(blocks)
        self._result.hits += hits
        # The tail of a prefix is worth less than its head, so it counts as used before it.
        self.pool.touch(reversed(blocks))
        missing_tokens = max(0, request.input_tokens - hits * config.block_tokens)
        prefill_s = missing_tokens / config.prefill_tokens_per_s
        decoding = self._ranks.place(request, self._now + prefill_s)
        block_s = config.block_tokens / config.prefill_tokens_per_s
        self._write_back(blocks[hits:], block_s, chain=blocks)
        if decoding is not None:
            self._protect(decoding, blocks[:hits])
            self._fill_next(decoding)
        if self._result.requests <= 1 or self._result.references % 64 < len(blocks):
            self._sample()

    def _write_back(
        self,
        blocks: Sequence[int],
        block_s: float,
        *,
        writer: int | None = None,
        chain: Sequence[int] = (),
        copies: int | None = None,
    ) -> None:
        """Blocks are computed one after another, and each is written when it is computed.

        `writer` is the decode rank that does it: what it has not written is lost with it. With the
        last block the `chain` counts as used.
        """
        rankings = self.pool.rankings(blocks) if blocks else []
        size = (copies or self._config.replicas) * self._config.block_bytes
        done_s = self._now
        for number, (block, ranking) in enumerate(zip(blocks, rankings, strict=True), start=1):
            done_s = max(done_s, self._now + number * block_s)
            done_s += size / self._config.write_bytes_per_s
            used = chain if number == len(blocks) else ()
            self._at(done_s, _Step.WRITTEN, (block, ranking, writer, used))

    def _protect(self, decoding: Decoding, blocks: Sequence[int]) -> None:
        """A rank begins to use blocks whose only copy is on its own node: write one elsewhere."""
        here = [block for block in blocks if self.pool.is_alone(block, self._ranks.using(block))]
        self._write_back(here, 0.0, writer=decoding.rank, copies=1)

    def _written(
        self, block: int, ranking: Sequence[int], writer: int | None, chain: Sequence[int]
    ) -> None:
        if writer is not None and self._ranks.is_lost(writer):
            return
        using = self._ranks.using(block)
        if block not in self.pool:
            self.pool.keep(block, ranking, self._now, using)
        elif self.pool.is_alone(block, using):
            self.pool.add_copy(block, ranking, self._now, using)
        if block in self.pool.below:
            self._try_again()
        if chain:
            self.pool.touch(reversed(chain))

    def _fill_next(self, decoding: Decoding) -> None:
        full_s = self._ranks.next_full_s(decoding)
        if full_s is not None:
            self._at(full_s, _Step.FULL, decoding)

    def _full(self, decoding: Decoding) -> None:
        """A block of generated tokens is full: its rank writes it back."""
        if decoding.rank is None:
            return
        block = self._ranks.fill(decoding)
        self._write_back([block], 0.0, writer=decoding.rank)
        self._fill_next(decoding)

    # --- hosts and ranks -----------------------------------------------------------------------

    def _act(self, actions: Sequence[Action]) -> None:
        self._sample()
        kind, subject = actions[0].kind, actions[0].subject
        if kind is ActionKind.LOSE_RANK:
            self._lose_ranks([action.subject for action in actions])
            return
        host = self.pool.hosts.get(subject)
        live = host is not None and host.live
        if live == (kind is ActionKind.JOIN):
            there = "already" if live else "not"
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"host {subject} cannot {kind.name.lower()} at {actions[0].time_s:g} s:"
                f" it is {there} in the pool then.",
            )
        if kind is ActionKind.FAIL:
            self._failed = True
            self.pool.fail(subject, self._now)
        elif kind is ActionKind.DRAIN:
            self.pool.drain(subject, self._now)
        else:
            # A host that the pool did not begin with brings a whole share.
            capacity = self._config.capacity(min(subject, self._config.hosts - 1))
            self.pool.join(subject, capacity, self._now)
        self._queue_copies()
        self._sample()

    def _lose_ranks(self, ranks: Sequence[int]) -> None:
        size = self._config.block_tokens
        for sequence in self._ranks.lose(set(ranks), self._now):
            restored = sequence.tokens_restored(self.pool.leading, size)
            self._result.sequences_lost += 1
            self._result.tokens_recomputed += sequence.tokens - restored
            self._result.tokens_recomputed_without_pool += sequence.tokens
            self._go_on(sequence.decoding, restored // size)

    def _go_on(self, decoding: Decoding, restored: int) -> None:
        """The new rank computes what was not restored, and writes it back where it is missing."""
        if decoding.rank is None:
            return
        blocks = decoding.full_blocks(self._config.block_tokens)
        missing = [block for block in blocks[restored:] if block not in self.pool]
        block_s = self._config.block_tokens / self._config.prefill_tokens_per_s
        self._write_back(missing, block_s, writer=decoding.rank)
        self._protect(decoding, decoding.blocks)

    # --- copies --------------------------------------------------------------------------------

    def _queue_copies(self) -> None:
        """Hosts changed: queue anew what lacks copies, then what has to leave draining hosts."""
        pool = self.pool
        self._copies.begin_anew([number for number, host in pool.hosts.items() if host.live])
        lacking = {
            block
            for block in (*pool.below, *self._ranks.blocks_in_use)
            if pool.lacks(block, self._ranks.using(block))
        }
        hottest = pool.hottest(lacking)
        for at, block in enumerate(hottest):
            self._copies.add(block, pool.holders(block), heat=len(hottest) - at)
        moving = [block for block in pool.to_move() if block not in lacking]
        for at, block in enumerate(moving):
            # Colder than everything that lacks copies.
            self._copies.add(block, pool.holders(block), heat=at / len(moving) - 1.0)
        self._draining = bool(pool.draining)

    def _go_on_copying(self) -> None:
        """Drained hosts leave when nothing is left to be made; hosts begin their next copies."""
        if self._draining and self._copies.is_idle and not self._again:
            for number in self.pool.draining:
                self.pool.leave(number, self._now)
            self._queue_copies()
        if self._copies.waiting:
            for done_s, host, number in self._copies.begin(self._now):
                self._at(done_s, _Step.COPIED, (host, number))

    def _copied(self, host: int, number: int) -> None:
        block = self._copies.arrived(host, number)
        if block is None:
            return
        pool, using = self.pool, self._ranks.using(block)
        if not pool.lacks(block, using):
            return
        is_recovery = self._failed and (block in pool.below or not pool.is_moving(block))
        if not pool.add_copy(block, pool.rankings([block])[0], self._now, using):
            if not self._try_again():
                pool.leave_if_short(block, self._now)
            return
        pool.counts.copies_restored += is_recovery
        pool.counts.copies_drained += not is_recovery
        if pool.lacks(block, using):
            self._copies.add(block, pool.holders(block), heat=0.0)

    def _try_again(self) -> bool:
        """Hosts that joined have more room later: try then what lacks copies now."""
        waits = self.pool.waits_for_room(self._now)
        if waits and not self._again:
            self._again = True
            self._at(self._now + _AGAIN_S, _Step.AGAIN, None)
        return waits


def check_actions(config: ReplayConfig, actions: Sequence[Action]) -> None:
    """Refuse what cannot happen whatever the order.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    joining = {action.subject for action in actions if action.kind is ActionKind.JOIN}
    lost: set[int] = set()
    for action in actions:
        if action.kind is ActionKind.LOSE_RANK:
            _check_rank(config, action.subject, lost)
            lost.add(action.subject)
        elif action.subject >= config.hosts and action.subject not in joining:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"there is no host {action.subject}: the hosts are 0 to {config.hosts - 1}"
                f" (--hosts {config.hosts}).",
            )


def _check_rank(config: ReplayConfig, rank: int, lost: Collection[int]) -> None:
    if rank >= config.ranks:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"there is no rank {rank}: the ranks are 0 to {config.ranks - 1}"
            f" (--ranks {config.ranks}).",
        )
    if rank in lost:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"rank {rank} is lost twice: a lost rank does not come back."
        )
