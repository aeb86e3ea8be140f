"""The front door's sequences: each lives until its last token left, whatever happens to ranks.

In go requests and routes, out come tokens, each once and in order. A sequence owns its prompt and
the tokens already sent, so that any decode rank can continue it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from raddle.agent.engine.reference.routing import Routing
from raddle.model.errors import RaddleError, Reason, TemporaryError
from raddle.model.types import Fence, Member
from raddle.v1 import reference_pb2, reference_pb2_grpc, types_pb2
from raddle.wire.codec import to_message
from raddle.wire.status import error_from

_RETRY_S = 0.01
_PREFILL_TIMEOUT_S = 30.0
log = structlog.get_logger()


@dataclass(slots=True)
class SequenceState:
    """One request under way."""

    sequence_id: str
    prompt: list[int]
    max_tokens: int
    deadline_s: float
    sent: list[int] = field(default_factory=list)
    #: The decode rank that serves it, and its process.
    member: Member | None = None
    kv_tokens_restored: int = 0
    kv_tokens_recomputed: int = 0
    moves: int = 0

    @property
    def left_s(self) -> float:
        return self.deadline_s - time.monotonic()


class Sequences:
    """Runs sequences over the ranks that the routes name."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self.running: dict[str, SequenceState] = {}
        #: How many were moved to another rank, and what their KV cost.
        self.moved = 0
        self.kv_tokens_restored = 0
        self.kv_tokens_recomputed = 0

    async def run(self, state: SequenceState) -> AsyncIterator[int]:
        """Tokens of one request, in order.

        Raises:
            TemporaryError: DEADLINE_EXCEEDED.
            PermanentError: a rank refused the request for good.
        """
        self.running[state.sequence_id] = state
        try:
            await self._prefill(state)
            while len(state.sent) < state.max_tokens:
                try:
                    async for token in self._decode(state):
                        yield token
                except _Moved as moved:
                    log.info("a sequence moves", sequence=state.sequence_id, why=str(moved))
        finally:
            del self.running[state.sequence_id]
            self._routing.sequence_ended(state.sequence_id)

    async def _prefill(self, state: SequenceState) -> None:
        """Have the prompt's blocks computed and pooled; without prefill ranks decode does it."""
        while True:
            routes = await self._routing.wait_live(state.left_s)
            member = self._routing.prefill_rank(routes)
            if member is None:
                return
            stub: Any = reference_pb2_grpc.ReferenceRankStub(
                self._routing.channel(member.engine_address)
            )
            request = reference_pb2.PrefillRequest(
                fence=_fence(routes.job_uid, routes.epoch),
                sequence_id=state.sequence_id,
                tokens=state.prompt,
            )
            call = stub.Prefill(request, timeout=max(0.01, min(state.left_s, _PREFILL_TIMEOUT_S)))
            try:
                await self._routing.guard(call, member)
                return
            except grpc.aio.AioRpcError as error:
                await self._failed(state, error)
            except _Moved:
                continue
            finally:
                self._routing.prefill_done(member)

    async def _decode(self, state: SequenceState) -> AsyncIterator[int]:
        """Tokens from one rank, until all are there or the sequence has to move."""
        routes = await self._routing.wait_live(state.left_s)
        given_up = self._routing.given_up(routes, state.sequence_id)
        if given_up:
            raise TemporaryError(Reason.DEADLINE_EXCEEDED, f"its rank was lost: {given_up}.")
        member = self._routing.decode_rank(routes, state.sequence_id)
        if member is None:
            await asyncio.sleep(_RETRY_S)
            raise _Moved("no decode rank is live")
        if state.member is not None and state.member.incarnation != member.incarnation:
            state.moves += 1
            self.moved += 1
        state.member = member
        self._routing.sequence_placed(state.sequence_id, member)
        stub: Any = reference_pb2_grpc.ReferenceRankStub(
            self._routing.channel(member.engine_address)
        )
        request = reference_pb2.GenerateRequest(
            fence=_fence(routes.job_uid, routes.epoch),
            sequence_id=state.sequence_id,
            prompt_tokens=state.prompt,
            sent_tokens=state.sent,
            max_tokens=state.max_tokens,
        )
        call = stub.Generate(request, timeout=max(0.01, state.left_s))
        lost = self._routing.when_lost(member)
        try:
            while True:
                answer = await _next_or_lost(call, lost)
                if answer is grpc.aio.EOF:
                    raise _Moved("the stream ended early")
                self._count(state, answer)
                for token in self._accept(state, answer):
                    yield token
                if answer.finish_reason == "length":
                    return
                if answer.finish_reason:
                    raise _Moved(answer.finish_reason)
        except grpc.aio.AioRpcError as error:
            await self._failed(state, error)
            raise _Moved(error.details() or error.code().name) from error
        finally:
            call.cancel()

    def _accept(self, state: SequenceState, answer: Any) -> list[int]:
        """Tokens that are exactly the next ones; a gap or a repetition ends the stream."""
        if answer.index != len(state.sent):
            raise _Moved(f"token {answer.index} came when {len(state.sent)} was due")
        tokens = list(answer.tokens)
        state.sent += tokens
        if tokens:
            self._routing.sequence_grew(state.sequence_id)
        return tokens

    def _count(self, state: SequenceState, answer: Any) -> None:
        """What moving cost; the first placement of a request is no recovery."""
        if state.moves:
            self.kv_tokens_restored += answer.kv_tokens_restored
            self.kv_tokens_recomputed += answer.kv_tokens_recomputed

    async def _failed(self, state: SequenceState, error: grpc.aio.AioRpcError) -> None:
        """Wait a moment and go on, unless the rank's refusal is final or the time is over."""
        failure = error_from(error)
        if state.left_s <= 0:
            raise TemporaryError(Reason.DEADLINE_EXCEEDED, "the request's time is over.") from error
        final = (
            failure.reason is Reason.INVALID_ARGUMENT
            and error.code() is grpc.StatusCode.INVALID_ARGUMENT
        )
        if final:
            raise failure from error
        await asyncio.sleep(_RETRY_S)


class _Moved(RaddleError):  # noqa: N818 - an event in the life of a sequence
    """The sequence has to go on elsewhere (or again); its tokens so far are kept."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.PEER_LOST, message)


async def _next_or_lost(call: Any, lost: asyncio.Event) -> Any:
    """The next answer of a stream, or `_Moved` as soon as the routes drop its rank."""
    reading = asyncio.ensure_future(call.read())
    waiting = asyncio.ensure_future(lost.wait())
    try:
        await asyncio.wait({reading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            return reading.result()
        raise _Moved("the routes left its rank")
    finally:
        waiting.cancel()
        if not reading.done():
            reading.cancel()


def _fence(job_uid: str, epoch: int) -> types_pb2.Fence:
    message: types_pb2.Fence = to_message(Fence(job_uid=job_uid, epoch=epoch), types_pb2.Fence)
    return message
