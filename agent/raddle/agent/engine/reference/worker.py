"""The computing thread of a prefill or decode rank: its sequences, its steps, its fences.

Commands come from the control service's thread, tokens go back to it through callbacks. A step
either finishes or leaves no trace: an interrupted one is rolled back by not committing it, and the
rank waits for a newer epoch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import structlog

from raddle.agent.engine.reference.exchange import ExchangeClient, PeerLost
from raddle.agent.engine.reference.model import Decoder, History, Span
from raddle.agent.engine.reference.shape import Shape
from raddle.agent.engine.reference.slots import Experts, Slots
from raddle.agent.engine.reference.weights import FloatArray, Shared
from raddle.model.stats import ExpertLoad, RankState
from raddle.model.types import ExpertMap, Member

# Rows of one sequence in one step: a long prompt does not hold the others up for long.
CHUNK_TOKENS = 64
ROWS_A_STEP_MAX = 256
log = structlog.get_logger()


@dataclass(slots=True)
class Sequence:
    """One sequence: its tokens, its history, and where its results go."""

    sequence_id: str
    tokens: list[int]
    #: Length at which it is finished; equal to the prompt's for a prefill.
    final: int
    history: History
    #: Called from the computing thread with each new token, and with None at the end.
    emit: Callable[[int | None], None]
    #: Called with the history after rows were added, to hand finished blocks on.
    grown: Callable[[Sequence], None]
    cancelled: bool = field(default=False)

    @property
    def target(self) -> int:
        """Rows that its history needs now: the last token of a prompt gives the next token."""
        return len(self.tokens)

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self.final


class Worker:
    """Steps over all sequences of a rank, one thread."""

    def __init__(
        self,
        shape: Shape,
        shared: Shared,
        slots: Slots,
        client: ExchangeClient,
        rank: int,
        peer_lost: Callable[[Member, str, int], None],
        step_min_s: float = 0.0,
    ) -> None:
        """`step_min_s`: a step begins so long after the one before it, or later."""
        self.state = RankState.STARTING
        self.epoch = 0
        self.slots = slots
        self.client = client
        self._rank = rank
        self._peer_lost = peer_lost
        self._step_min_s = step_min_s
        self._decoder = Decoder(shape, shared, self._ask_experts)
        self._experts: Experts | None = None
        self._condition = threading.Condition()
        self._sequences: dict[str, Sequence] = {}
        self._stepping = False
        self._closing = False
        self.tokens_generated = 0
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # --- commands, from the control thread -----------------------------------------------------

    def quiesce(self, epoch: int, *, abort: bool) -> int:
        """No token leaves and no step runs when this returns; gives the sequences held.

        The step under way is broken off, since a dead peer may be what it waits for.
        """
        with self._condition:
            if epoch > self.epoch or self.state is not RankState.SERVING:
                self.state = RankState.QUIESCED
                self.epoch = max(epoch, self.epoch)
                self.client.abort(self.epoch)
        with self._condition:
            self._condition.wait_for(lambda: not self._stepping, timeout=5.0)
            if abort:
                for sequence in self._sequences.values():
                    sequence.emit(None)
                self._sequences.clear()
            return len(self._sequences)

    def resume(self, epoch: int, expert_map: ExpertMap, peers: dict[int, Member]) -> None:
        """Serve at this epoch; the map's experts of this rank are loaded already."""
        self.client.keep_only(peers.values())
        with self._condition:
            self.epoch = epoch
            self._experts = Experts(epoch, expert_map, self._rank, self.slots, self.client, peers)
            self.state = RankState.SERVING
            self._condition.notify_all()

    def add(self, sequence: Sequence) -> None:
        with self._condition:
            self._sequences[sequence.sequence_id] = sequence
            self._condition.notify_all()

    def cancel(self, sequence: Sequence) -> None:
        with self._condition:
            sequence.cancelled = True
            if self._sequences.get(sequence.sequence_id) is sequence:
                del self._sequences[sequence.sequence_id]

    @property
    def running(self) -> int:
        return len(self._sequences)

    def take_loads(self) -> tuple[int, tuple[ExpertLoad, ...]]:
        """The epoch in service, and tokens by layer and expert at it since the last call."""
        with self._condition:
            experts, epoch = self._experts, self.epoch
        return epoch, experts.take_loads() if experts is not None else ()

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self.client.close()

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        next_s = time.monotonic()
        while True:
            with self._condition:
                self._condition.wait_for(self._has_work)
                self._condition.wait_for(lambda: self._closing, next_s - time.monotonic())
                if self._closing:
                    return
                if not self._has_work():
                    continue
                next_s = time.monotonic() + self._step_min_s
                spans = self._choose()
                epoch = self.epoch
                self._stepping = True
            try:
                self._decoder.step([span for _, span in spans])
            except PeerLost as lost:
                self._interrupted(lost, epoch)
            except Exception:
                log.exception("a step failed; the rank waits for a newer epoch")
                self._wait_for_epoch(epoch)
            else:
                self._finish(spans, epoch)
            finally:
                with self._condition:
                    self._stepping = False
                    self._condition.notify_all()

    def _has_work(self) -> bool:
        return self._closing or (self.state is RankState.SERVING and bool(self._sequences))

    def _choose(self) -> list[tuple[Sequence, Span]]:
        """The next rows of each sequence, oldest sequence first, within the step's limit."""
        spans = []
        left = ROWS_A_STEP_MAX
        for sequence in self._sequences.values():
            start = sequence.history.length
            end = min(sequence.target, start + min(CHUNK_TOKENS, left))
            if end > start:
                spans.append((sequence, Span(sequence.history, sequence.tokens[start:end])))
                left -= end - start
            if left <= 0:
                break
        return spans

    def _ask_experts(
        self, layer: int, chosen: list[list[int]], quantised: FloatArray, scale: FloatArray
    ) -> FloatArray:
        assert self._experts is not None
        return self._experts(layer, chosen, quantised, scale)

    def _interrupted(self, lost: PeerLost, epoch: int) -> None:
        """The step is rolled back: nothing of it was committed or emitted."""
        with self._condition:
            deliberate = self.epoch != epoch or self.state is not RankState.SERVING
        if deliberate:
            return
        log.warning("a step was interrupted", peer=str(lost), epoch=epoch)
        self._wait_for_epoch(epoch)
        self._peer_lost(lost.peer, lost.reason, epoch)

    def _wait_for_epoch(self, epoch: int) -> None:
        with self._condition:
            if self.epoch == epoch and self.state is RankState.SERVING:
                self.state = RankState.WAITING

    def _finish(self, spans: list[tuple[Sequence, Span]], epoch: int) -> None:
        """Keep the step's results, unless a newer epoch came while it ran."""
        with self._condition:
            if self.epoch != epoch or self.state is not RankState.SERVING:
                return
            kept = [(sequence, span) for sequence, span in spans if not sequence.cancelled]
            self._decoder.commit([span for _, span in kept])
            for sequence, span in kept:
                self._advance(sequence, span)

    def _advance(self, sequence: Sequence, span: Span) -> None:
        sequence.grown(sequence)
        if sequence.history.length < len(sequence.tokens):
            return
        if not sequence.finished:
            assert span.logits is not None
            token = int(np.argmax(span.logits))
            sequence.tokens.append(token)
            self.tokens_generated += 1
            sequence.emit(token)
        if sequence.finished:
            self._sequences.pop(sequence.sequence_id, None)
            sequence.emit(None)
