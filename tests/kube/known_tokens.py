"""The tokens that the reference model must answer, computed here alone, without any rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raddle import models
from raddle.agent.engine.reference.model import Decoder, History, Span
from raddle.agent.engine.reference.shape import Shape, parse_shape
from raddle.agent.engine.reference.slots import Slots
from raddle.agent.engine.reference.weights import FloatArray, load_shared, write_checkpoint
from raddle.traces import TraceRequest


def known_tokens(requests: Sequence[TraceRequest], folder: Path) -> list[list[int]]:
    """The answer to each request; the model's weights are written to the folder."""
    shape = parse_shape(models.config_text("raddle-demo"))
    write_checkpoint(shape, folder)
    slots = Slots(folder)
    for layer in range(shape.layers):
        for expert in range(shape.experts):
            slots.load_from_disk(layer, expert)

    def ask_experts(
        layer: int, chosen: list[list[int]], quantised: FloatArray, scale: FloatArray
    ) -> FloatArray:
        pairs = [(row, expert) for row, experts in enumerate(chosen) for expert in experts]
        rows = [row for row, _ in pairs]
        experts = [expert for _, expert in pairs]
        answer = slots.compute(layer, experts, quantised[rows], scale[rows])
        assert answer is not None, "all experts are here"
        return answer

    decoder = Decoder(shape, load_shared(shape, folder), ask_experts)
    return [_answer(decoder, shape, request) for request in requests]


def _answer(decoder: Decoder, shape: Shape, request: TraceRequest) -> list[int]:
    history, tokens = History.empty(shape), list(request.prompt)
    for _ in range(request.output_tokens):
        span = Span(history, tokens[history.length :])
        decoder.step([span])
        decoder.commit([span])
        assert span.logits is not None, "logits are wanted"
        tokens.append(int(np.argmax(span.logits)))
    return tokens[len(request.prompt) :]
