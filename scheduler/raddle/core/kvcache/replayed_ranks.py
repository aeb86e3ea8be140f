"""Decode ranks while a trace is replayed: which sequences each serves, and what a loss takes.

A rank writes each full block that its sequences make back into the pool. The trace has no names
for these blocks, so they get numbers of their own beyond those of any trace: nobody else asks for
them, and only the same sequence comes back from them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raddle.core.kvcache.figures import DIES_A_NODE
from raddle.model.kv import TraceRequest

# More than any rank ever serves at once.
_DEAD = 1 << 40
# Above the block ids of all traces.
_FIRST_MADE = 1 << 62


@dataclass(slots=True, eq=False)
class Decoding:
    """One sequence. Its rank is None once no rank was left for it."""

    request: TraceRequest
    begin_s: float
    end_s: float
    rank: int | None
    #: The number of the first block that it makes, and how many of them are full.
    first_made: int
    blocks_made: int = 0

    @property
    def made(self) -> range:
        return range(self.first_made, self.first_made + self.blocks_made)

    @property
    def blocks(self) -> tuple[int, ...]:
        return (*self.request.blocks, *self.made)

    def full_blocks(self, block_tokens: int) -> tuple[int, ...]:
        """In order; the prompt's last block is rarely full, what is made fills it."""
        return (*self.request.blocks[: self.request.input_tokens // block_tokens], *self.made)


@dataclass(frozen=True, slots=True)
class LostSequence:
    """A sequence that was being decoded, with its prompt and the tokens made so far."""

    decoding: Decoding
    tokens: int

    def tokens_restored(self, leading: Callable[[Sequence[int]], int], block_tokens: int) -> int:
        """Tokens that need not be computed again; `leading` counts the first blocks present.

        The last token always is computed: it gives the next one.
        """
        request = self.decoding.request
        prompt = leading(request.blocks)
        tokens = min(prompt * block_tokens, request.input_tokens)
        full = request.input_tokens // block_tokens
        made = leading(self.decoding.made) if prompt >= full else 0
        if made:
            tokens = (full + made) * block_tokens
        return min(tokens, self.tokens - 1)


class DecodeRanks:
    """Sequences on the rank with the fewest of them; equals take turns."""

    def __init__(self, ranks: int, token_s: float, block_tokens: int) -> None:
        self._token_s = token_s
        self._block_tokens = block_tokens
        self._loads = np.zeros(ranks, dtype=np.int64)
        self._turn = 0
        self._running: dict[int, Decoding] = {}
        self._ends: list[tuple[float, int]] = []
        self._next = 0
        self._next_made = _FIRST_MADE
        #: By block: how many sequences of each node use it.
        self._users: dict[int, Counter[int]] = {}

    # --- questions -----------------------------------------------------------------------------

    def using(self, block: int) -> Collection[int]:
        """The nodes whose ranks use a block now."""
        return self._users.get(block, ())

    @property
    def blocks_in_use(self) -> Collection[int]:
        return self._users.keys()

    def is_lost(self, rank: int) -> bool:
        return bool(self._loads[rank] >= _DEAD)

    def next_full_s(self, decoding: Decoding) -> float | None:
        """When the next block of a sequence is full; None if that is never."""
        request = decoding.request
        blocks = request.input_tokens // self._block_tokens + decoding.blocks_made + 1
        tokens = blocks * self._block_tokens - request.input_tokens
        if tokens > request.output_tokens:
            return None
        return decoding.begin_s + tokens * self._token_s

    # --- sequences -----------------------------------------------------------------------------

    def place(self, request: TraceRequest, begin_s: float) -> Decoding | None:
        """The request is decoded from `begin_s` on; None without live ranks."""
        rank = self._emptiest()
        if rank is None:
            return None
        end_s = begin_s + request.output_tokens * self._token_s
        decoding = Decoding(request, begin_s, end_s, rank, self._next_made)
        self._next_made += 1 + request.output_tokens // self._block_tokens
        self._running[self._next] = decoding
        heapq.heappush(self._ends, (end_s, self._next))
        self._next += 1
        self._count(rank, decoding.blocks, 1)
        self._loads[rank] += 1
        return decoding

    def _emptiest(self) -> int | None:
        """Equals take turns, so that no rank stays empty while others work again and again."""
        least = self._loads.min(initial=_DEAD)
        if least >= _DEAD:
            return None
        equals = np.flatnonzero(self._loads == least)
        rank = int(equals[np.searchsorted(equals, self._turn) % len(equals)])
        self._turn = rank + 1
        return rank

    def _count(self, rank: int, blocks: Iterable[int], sequences: int) -> None:
        """So many sequences more of a rank's node use the blocks (or fewer)."""
        node = rank // DIES_A_NODE
        for block in blocks:
            users = self._users.setdefault(block, Counter())
            users[node] += sequences
            if not users[node]:
                del users[node]
            if not users:
                del self._users[block]

    def fill(self, decoding: Decoding) -> int:
        """The sequence's next block is full; gives its number."""
        block = decoding.first_made + decoding.blocks_made
        decoding.blocks_made += 1
        if decoding.rank is not None:
            self._count(decoding.rank, [block], 1)
        return block

    def end_until(self, now: float) -> None:
        """Sequences that are done by now need nothing any more."""
        while self._ends and self._ends[0][0] < now:
            _, number = heapq.heappop(self._ends)
            decoding = self._running.pop(number)
            if decoding.rank is not None:
                self._count(decoding.rank, decoding.blocks, -1)
                self._loads[decoding.rank] -= not self.is_lost(decoding.rank)

    def lose(self, ranks: Collection[int], now: float) -> list[LostSequence]:
        """The ranks are gone; what they decoded goes on elsewhere and is given back."""
        self._loads[list(ranks)] = _DEAD
        lost: list[LostSequence] = []
        for decoding in self._running.values():
            if decoding.rank not in ranks or decoding.end_s <= now:
                continue
            if decoding.begin_s <= now:
                made = int((now - decoding.begin_s) / self._token_s)
                lost.append(LostSequence(decoding, decoding.request.input_tokens + made))
            self._move(decoding)
        return lost

    def _move(self, decoding: Decoding) -> None:
        assert decoding.rank is not None
        self._count(decoding.rank, decoding.blocks, -1)
        decoding.rank = self._emptiest()
        if decoding.rank is not None:
            self._count(decoding.rank, decoding.blocks, 1)
            self._loads[decoding.rank] += 1
