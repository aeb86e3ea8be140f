"""The `ReferenceRank` service: prompts in, tokens out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.agent.engine.reference.fences import Context, Standing, log_refusal, refusals_told
from raddle.agent.engine.reference.serving import Serving
from raddle.agent.engine.reference.worker import Sequence
from raddle.model.errors import PermanentError, RaddleError, Reason
from raddle.v1 import reference_pb2, reference_pb2_grpc
from raddle.wire.status import abort


class TokenService(reference_pb2_grpc.ReferenceRankServicer):
    """See reference.proto."""

    def __init__(self, standing: Standing, serving: Serving) -> None:
        self._standing = standing
        self._serving = serving

    async def _begin(
        self, sequence_id: str, tokens: list[int], final: int
    ) -> tuple[Sequence, asyncio.Queue[int | None], int]:
        """Put a sequence to work; its tokens come through the queue, None at the end."""
        serving = self._serving
        serving.require_room(tokens, final)
        history, restored = await serving.new_history(tokens)
        queue: asyncio.Queue[int | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        pooled = restored // serving.block_tokens

        def emit(token: int | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, token)

        def grown(sequence: Sequence) -> None:
            nonlocal pooled
            blocks = serving.finished_blocks(sequence, pooled)
            if blocks:
                pooled += len(blocks)
                serving.put_later(blocks)

        sequence = Sequence(sequence_id, tokens, final, history, emit, grown)
        serving.worker.add(sequence)
        return sequence, queue, restored

    @refusals_told
    async def Prefill(self, request: Any, _context: Context) -> Any:
        self._standing.require(request.fence, newer=False)
        tokens = list(request.tokens)
        sequence, queue, restored = await self._begin(request.sequence_id, tokens, len(tokens))
        try:
            await queue.get()
        finally:
            self._serving.worker.cancel(sequence)
        if sequence.history.length < len(tokens):
            raise PermanentError(Reason.QUIESCED, "the prompt was aborted; send it again.")
        await self._serving.flush_puts()
        names = block_hashes(
            cache_key(self._serving.shape.digest), tokens, self._serving.block_tokens
        )
        return reference_pb2.PrefillResponse(
            block_hashes=names, tokens_computed=len(tokens) - restored, tokens_restored=restored
        )

    async def Generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for answer in self._generate(request):
                yield answer
        except RaddleError as error:
            log_refusal("Generate", request, context, error)
            await abort(context, error)

    async def _generate(self, request: Any) -> AsyncIterator[Any]:
        self._standing.require(request.fence, newer=False)
        sent = len(request.sent_tokens)
        tokens = [*request.prompt_tokens, *request.sent_tokens]
        final = len(request.prompt_tokens) + request.max_tokens
        if sent >= request.max_tokens:
            yield reference_pb2.GenerateResponse(index=sent, finish_reason="length")
            return
        sequence, queue, restored = await self._begin(request.sequence_id, tokens, final)
        index = sent
        try:
            yield reference_pb2.GenerateResponse(
                index=index,
                kv_tokens_restored=restored,
                kv_tokens_recomputed=len(tokens) - restored,
            )
            while True:
                token = await queue.get()
                if token is None:
                    done = len(sequence.tokens) >= final
                    reason = "length" if done else "abort"
                    yield reference_pb2.GenerateResponse(index=index, finish_reason=reason)
                    return
                yield reference_pb2.GenerateResponse(index=index, tokens=[token])
                index += 1
        finally:
            self._serving.worker.cancel(sequence)
