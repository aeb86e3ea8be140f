"""A trace of requests against a pool of hosts: hits, losses, repair, and lost ranks' sequences.

In go requests and actions (hosts that fail, drain and join, ranks that are lost), out comes a
`ReplayResult`. The prompt's missing blocks are computed one after another at the rate of a prefill
instance and written back as they are done: a block enters the pool when all its copies are there.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import Any

from raddle.core.kvcache.figures import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    DIES_A_NODE,
    NODES_A_RACK,
    PREFILL_TOKENS_PER_S,
    REPAIR_BYTES_PER_S,
    TOKEN_S,
    WRITE_BYTES_PER_S,
)
from raddle.core.kvcache.pool import RepairLoop
from raddle.core.kvcache.replayed_pool import ReplayedPool, node_name
from raddle.core.kvcache.replayed_ranks import DecodeRanks
from raddle.model.errors import PermanentError, Reason
from raddle.model.kv import TraceRequest


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
    #: Of each host; the hosts repair together.
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
    COPIED = 1
    ACTION = 2
    ARRIVAL = 3


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
        self._repair: RepairLoop[tuple[int, bool]] = RepairLoop(
            config.repair_bytes_per_s * config.hosts
        )
        self._result = ReplayResult(requests=len(requests))
        self._due: list[tuple[float, int, int, Any]] = []
        self._number = 0
        self._now = 0.0
        self._failed = False
        self._draining = False
        self._copying: tuple[int, bool] | None = None
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
            match step:
                case _Step.ARRIVAL:
                    seen.update(what.blocks)
                    self._arrive(what)
                case _Step.WRITTEN:
                    self._written(*what)
                case _Step.COPIED:
                    self._copied()
                case _:
                    self._act(what)
            if self._copying is None and (len(self._repair) or self._draining):
                self._copy_next()
        self._sample()
        self._result.unique_blocks = len(seen)
        self._result.blocks_lost = len(self.pool.counts.lost)
        self._result.blocks_evicted = self.pool.counts.blocks_evicted
        self._result.recovery_copies = self.pool.counts.copies_restored
        self._result.drain_copies = self.pool.counts.copies_drained
        return self._result

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
        rank = self._ranks.place(request, self._now, self._now + prefill_s)
        node = node_name(rank // DIES_A_NODE) if rank is not None else ""
        missing = list(blocks[hits:])
        rankings = self.pool.rankings(missing) if missing else []
        done_s = self._now
        for number, block in enumerate(missing):
            computed_s = (
                self._now + (number + 1) * config.block_tokens / config.prefill_tokens_per_s
            )
            done_s = max(done_s, computed_s)
            done_s += config.replicas * config.block_bytes / config.write_bytes_per_s
            chain = blocks if number + 1 == len(missing) else ()
            self._at(done_s, _Step.WRITTEN, (block, rankings[number], node, chain))
        if node:
            self._protect_from(node, blocks[:hits])
        if self._result.requests <= 1 or self._result.references % 64 < len(blocks):
            self._sample()

    def _protect_from(self, node: str, blocks: Sequence[int]) -> None:
        """A rank begins to use blocks whose only copy is on its own node: write one elsewhere."""
        here = [block for block in blocks if self.pool.only_on(block, node)]
        done_s = self._now
        for block, ranking in zip(here, self.pool.rankings(here) if here else [], strict=True):
            done_s += self._config.block_bytes / self._config.write_bytes_per_s
            self._at(done_s, _Step.WRITTEN, (block, ranking, node, ()))

    def _written(self, block: int, ranking: Sequence[int], node: str, chain: Sequence[int]) -> None:
        if block not in self.pool:
            self.pool.keep(block, ranking, self._now, node)
        elif node and self.pool.only_on(block, node):
            self.pool.add_copy(block, ranking, self._now)
        if chain:
            self.pool.touch(reversed(chain))

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
        for sequence in self._ranks.lose(ranks, self._now):
            present = self.pool.leading(sequence.request.blocks)
            restored = sequence.tokens_restored(present, self._config.block_tokens)
            self._result.sequences_lost += 1
            self._result.tokens_recomputed += sequence.tokens - restored
            self._result.tokens_recomputed_without_pool += sequence.tokens

    # --- copies --------------------------------------------------------------------------------

    def _queue_copies(self) -> None:
        """Hosts changed: queue anew what lacks copies, then what has to leave draining hosts."""
        self._repair.clear()
        size = self._config.block_bytes
        below = self.pool.hottest_below()
        for at, block in enumerate(below):
            self._repair.add((block, True), heat=len(below) - at, size_bytes=size)
        for number in self.pool.draining:
            moving = self.pool.to_move(number)
            for at, block in enumerate(moving):
                # Colder than everything that lacks copies.
                self._repair.add((block, False), heat=at / len(moving) - 1.0, size_bytes=size)
        self._draining = bool(self.pool.draining)

    def _copy_next(self) -> None:
        """Begin the next copy, as soon as the budget allows one; drained hosts leave at the end."""
        if not len(self._repair):
            for number in self.pool.draining:
                self.pool.leave(number, self._now)
            self._draining = False
            return
        begin_s = max(self._now, self._repair.free_at_s)
        self._copying = self._repair.take(begin_s)
        self._at(self._repair.free_at_s, _Step.COPIED, None)

    def _copied(self) -> None:
        assert self._copying is not None
        block, lacking = self._copying
        self._copying = None
        if lacking and block not in self.pool.below:
            return
        if not self.pool.add_copy(block, self.pool.rankings([block])[0], self._now):
            return
        if lacking:
            self.pool.counts.copies_restored += self._failed
            if block in self.pool.below:
                self._repair.add((block, True), heat=0.0, size_bytes=self._config.block_bytes)
        else:
            self.pool.counts.copies_drained += 1


def check_actions(config: ReplayConfig, actions: Sequence[Action]) -> None:
    """Refuse what cannot happen whatever the order.

    Raises:
        PermanentError: INVALID_ARGUMENT.
    """
    joining = {action.subject for action in actions if action.kind is ActionKind.JOIN}
    for action in actions:
        if action.kind is ActionKind.LOSE_RANK:
            if action.subject >= config.ranks:
                raise PermanentError(
                    Reason.INVALID_ARGUMENT,
                    f"there is no rank {action.subject}: the ranks are 0 to {config.ranks - 1}"
                    f" (--ranks {config.ranks}).",
                )
        elif action.subject >= config.hosts and action.subject not in joining:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"there is no host {action.subject}: the hosts are 0 to {config.hosts - 1}"
                f" (--hosts {config.hosts}).",
            )
