"""Decode ranks while a trace is replayed: which sequences each serves, and what a loss takes."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raddle.model.kv import TraceRequest

# More than any rank ever serves at once.
_DEAD = 1 << 40


@dataclass(frozen=True, slots=True)
class LostSequence:
    """A sequence that was being decoded, with its prompt and the tokens made so far."""

    request: TraceRequest
    tokens: int

    def tokens_restored(self, blocks_present: int, block_tokens: int) -> int:
        """Prompt tokens that need not be computed again.

        Generated tokens always are: the trace names no blocks of theirs. So is the last token,
        which gives the next one.
        """
        return min(blocks_present * block_tokens, self.request.input_tokens, self.tokens - 1)


class DecodeRanks:
    """Sequences on the rank with the fewest of them; the lowest one of equals."""

    def __init__(self, ranks: int, token_s: float, block_tokens: int) -> None:
        self._token_s = token_s
        self._block_tokens = block_tokens
        self._loads = np.zeros(ranks, dtype=np.int64)
        #: Request, begin and end of decoding, and rank by sequence number.
        self._running: dict[int, tuple[TraceRequest, float, float, int]] = {}
        self._ends: list[tuple[float, int]] = []
        self._next = 0

    def place(self, request: TraceRequest, now: float, begin_s: float) -> int | None:
        """The rank that decodes the request from `begin_s` on; None without live ranks."""
        self._end_until(now)
        if not self._loads.size:
            return None
        rank = int(self._loads.argmin())
        if self._loads[rank] >= _DEAD:
            return None
        end_s = begin_s + request.output_tokens * self._token_s
        self._running[self._next] = (request, begin_s, end_s, rank)
        heapq.heappush(self._ends, (end_s, self._next))
        self._loads[rank] += 1
        self._next += 1
        return rank

    def _end_until(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            _, number = heapq.heappop(self._ends)
            found = self._running.pop(number, None)
            if found is not None:
                self._loads[found[3]] -= 1

    def lose(self, ranks: Sequence[int], now: float) -> list[LostSequence]:
        """The ranks are gone; what they decoded goes on elsewhere and is given back."""
        self._end_until(now)
        self._loads[list(ranks)] = _DEAD
        lost: list[LostSequence] = []
        for number, (request, begin_s, end_s, rank) in list(self._running.items()):
            if rank not in ranks:
                continue
            if begin_s <= now:
                made = int((now - begin_s) / self._token_s)
                lost.append(LostSequence(request, request.input_tokens + made))
            target = int(self._loads.argmin())
            if self._loads[target] >= _DEAD:
                del self._running[number]
            else:
                self._loads[target] += 1
                self._running[number] = (request, begin_s, end_s, target)
        return lost
