"""One forward pass over token rows of several sequences, with experts anywhere.

In go, for each sequence, the tokens to add to its history; out come the logits of its last row.
A sequence's history grows only by `commit`: a step that fails leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from raddle.agent.engine.reference import numerics
from raddle.agent.engine.reference.shape import Shape
from raddle.agent.engine.reference.weights import F32, FloatArray, Shared

# (layer, expert ids of each row, quantised rows, scales) -> answer of each (row, expert) pair, in
# the order of rows and of their experts.
Experts = Callable[[int, list[list[int]], FloatArray, FloatArray], FloatArray]
_GROWTH = 256


@dataclass(slots=True)
class History:
    """Keys and values of one sequence [layers, capacity, heads, head]; `length` rows count."""

    keys: FloatArray
    values: FloatArray
    length: int = 0

    @staticmethod
    def empty(shape: Shape) -> History:
        size = (shape.layers, _GROWTH, shape.heads, shape.head)
        return History(np.zeros(size, dtype=F32), np.zeros(size, dtype=F32))

    def reserve(self, rows: int) -> None:
        missing = rows - self.keys.shape[1]
        if missing > 0:
            grow = ((0, 0), (0, missing + _GROWTH), (0, 0), (0, 0))
            self.keys = np.pad(self.keys, grow)
            self.values = np.pad(self.values, grow)

    def block(self, number: int, block_tokens: int) -> bytes:
        """A finished block's bytes: keys, then values, [layers, tokens, heads, head]."""
        rows = slice(number * block_tokens, (number + 1) * block_tokens)
        parts = (self.keys[:, rows], self.values[:, rows])
        return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)

    def load_block(self, payload: bytes, block_tokens: int) -> None:
        """Append a block at the end of the history."""
        layers, _, heads, head = self.keys.shape
        flat = np.frombuffer(payload, dtype=F32)
        parts = flat.reshape(2, layers, block_tokens, heads, head)
        self.reserve(self.length + block_tokens)
        rows = slice(self.length, self.length + block_tokens)
        self.keys[:, rows], self.values[:, rows] = parts[0], parts[1]
        self.length += block_tokens


@dataclass(slots=True)
class Span:
    """Tokens to add to one history, and the logits of the last of them."""

    history: History
    tokens: list[int]
    logits: FloatArray | None = field(default=None)


class Decoder:
    """The model's arithmetic; `experts` answers for the routed experts."""

    def __init__(self, shape: Shape, shared: Shared, experts: Experts) -> None:
        self._shape = shape
        self._shared = shared
        self._experts = experts
        self._cos, self._sin = numerics.rope_tables(shape)

    def step(self, spans: list[Span], *, want_logits: bool = True) -> None:
        """Compute all spans; call `commit` to keep the result."""
        rows = np.concatenate([self._shared.embedding[span.tokens] for span in spans])
        for span in spans:
            span.history.reserve(span.history.length + len(span.tokens))
        for layer in range(self._shape.layers):
            rows = rows + self._attention(layer, rows, spans)
            rows = rows + self._mixture(layer, rows)
        if not want_logits:
            return
        ends = np.cumsum([len(span.tokens) for span in spans]) - 1
        logits = numerics.linear(numerics.normalise(rows[ends]), self._shared.head)
        for span, row in zip(spans, logits, strict=True):
            span.logits = row

    @staticmethod
    def commit(spans: list[Span]) -> None:
        for span in spans:
            span.history.length += len(span.tokens)

    def _attention(self, layer: int, rows: FloatArray, spans: list[Span]) -> FloatArray:
        parts = self._shared.layers[layer]
        quantised, scale = numerics.quantise(numerics.normalise(rows))
        heads = (len(rows), self._shape.heads, self._shape.head)
        query = numerics.multiply(quantised, scale, parts.query).reshape(heads)
        key = numerics.multiply(quantised, scale, parts.key).reshape(heads)
        value = numerics.multiply(quantised, scale, parts.value).reshape(heads)
        mixed = np.empty((len(rows), self._shape.attention), dtype=F32)
        row = 0
        for span in spans:
            history = span.history
            for position in range(history.length, history.length + len(span.tokens)):
                cos, sin = self._cos[position], self._sin[position]
                history.keys[layer, position] = numerics.rotate(key[row], cos, sin)
                history.values[layer, position] = value[row]
                mixed[row] = numerics.attend(
                    numerics.rotate(query[row], cos, sin),
                    history.keys[layer, : position + 1],
                    history.values[layer, : position + 1],
                )
                row += 1
        return numerics.linear(mixed, parts.output)

    def _mixture(self, layer: int, rows: FloatArray) -> FloatArray:
        normal = numerics.normalise(rows)
        quantised, scale = numerics.quantise(normal)
        logits = numerics.multiply(quantised, scale, self._shared.layers[layer].router)
        chosen, weights = [], []
        for row in logits:
            experts, share = numerics.choose(row, self._shape.experts_per_token)
            chosen.append(experts)
            weights.append(share)
        answers = self._experts(layer, chosen, quantised, scale)
        out = np.zeros_like(rows)
        at = 0
        for number, share in enumerate(weights):
            # In the order of expert ids: float addition is not associative.
            for weight in share:
                out[number] += weight * answers[at]
                at += 1
        return out
