"""Arithmetic whose results do not depend on batch, order, chunking or restart.

Matrix products multiply integers held in float32: every partial sum is a whole number below 2^24,
so any order of summation gives the same result. What is not exact (norms, softmax, attention)
runs one token row at a time, with array shapes that depend on that row's own history alone.
"""

from __future__ import annotations

import numpy as np

from raddle.agent.engine.reference.shape import Shape
from raddle.agent.engine.reference.weights import F32, Expert, FloatArray, Matrix

_EPSILON = F32(1e-6)
_ROPE_BASE = 10_000.0


def quantise(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Whole numbers in [-127, 127] as float32 [rows, width] and a scale a row [rows, 1]."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / F32(127), F32(1))
    return np.rint(rows / scale), scale


def multiply(quantised: FloatArray, scale: FloatArray, matrix: Matrix) -> FloatArray:
    """[rows, inputs] x [inputs, outputs], exact up to one rounding a scale."""
    product: FloatArray = (quantised @ matrix.values) * (scale * matrix.scale)
    return product


def linear(rows: FloatArray, matrix: Matrix) -> FloatArray:
    quantised, scale = quantise(rows)
    return multiply(quantised, scale, matrix)


def normalise(rows: FloatArray) -> FloatArray:
    """Root mean square norm, one row at a time."""
    out = np.empty_like(rows)
    for number, row in enumerate(rows):
        mean = np.add.reduce(row * row) / F32(len(row))
        out[number] = row / np.sqrt(mean + _EPSILON)
    return out


def rope_tables(shape: Shape) -> tuple[FloatArray, FloatArray]:
    """cos and sin [positions, head / 2]."""
    half = shape.head // 2
    frequency = _ROPE_BASE ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(shape.context_max, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(F32), np.sin(angle).astype(F32)


def rotate(heads: FloatArray, cos: FloatArray, sin: FloatArray) -> FloatArray:
    """Rotary embedding of one row's heads [heads, head]."""
    half = heads.shape[1] // 2
    left, right = heads[:, :half], heads[:, half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)


def attend(query: FloatArray, keys: FloatArray, values: FloatArray) -> FloatArray:
    """One query row [heads, head] over its history [n, heads, head] -> [heads * head].

    Shapes depend on n alone, so the same row gives the same bits in any batch.
    """
    scale = F32(1.0 / np.sqrt(query.shape[1]))
    scores = np.add.reduce(keys * query, axis=2) * scale
    weights = np.exp(scores - scores.max(axis=0))
    weights /= np.add.reduce(weights, axis=0)
    mixed = np.add.reduce(weights[:, :, None] * values, axis=0)
    flat: FloatArray = mixed.reshape(-1)
    return flat


def choose(logits: FloatArray, count: int) -> tuple[list[int], FloatArray]:
    """The experts of one row, by id, with their weights; ties go to the lower id."""
    order = np.lexsort((np.arange(len(logits)), -logits))[:count]
    chosen = np.sort(order)
    picked = logits[chosen]
    weights = np.exp(picked - picked.max())
    return [int(e) for e in chosen], weights / np.add.reduce(weights)


def feed_forward(quantised: FloatArray, scale: FloatArray, expert: Expert) -> FloatArray:
    """An expert's answer for rows that arrive quantised [rows, hidden]."""
    gate = multiply(quantised, scale, expert.gate)
    up = multiply(quantised, scale, expert.up)
    activated = (gate / (F32(1) + np.exp(-gate)) * up).astype(F32, copy=False)
    return linear(activated, expert.down)
