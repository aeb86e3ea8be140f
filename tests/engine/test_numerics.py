"""Tokens depend on no batch, order, chunking, restart or placement: everything is bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raddle.agent.engine.reference import numerics
from raddle.agent.engine.reference.model import Decoder, History, Span
from raddle.agent.engine.reference.shape import EXACT_WIDTH_MAX, parse_shape
from raddle.agent.engine.reference.weights import F32, FloatArray, Matrix, load_shared
from raddle.model.errors import PermanentError, Reason
from tests.engine import small
from tests.engine.small import BLOCK_TOKENS, SHAPE, Ranks, bits, expert_map, extend, prompt
from tests.support import ROOT

LONG = prompt(0, 150)


@st.composite
def rows_of_all_sizes(draw: st.DrawFn) -> FloatArray:
    """1 to 64 rows, their magnitudes far apart, zeros among them.

    None is subnormal: such a row has no scale in float32, and the norm before keeps far from it.
    """
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 64)), draw(st.integers(1, 300))
    rows = random.standard_normal(size) * 2.0 ** random.integers(-60, 60, (size[0], 1))
    return np.where(random.random(size) < draw(st.sampled_from([0, 0.5, 1])), 0, rows).astype(F32)


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> Callable[[int], tuple[bytes, bytes]]:
    """Logits and history of a numbered prompt (1 to 9 tokens) that nobody shares a step with."""

    @cache
    def run(number: int) -> tuple[bytes, bytes]:
        history = History.empty(SHAPE)
        (logits,) = extend(decoder, [history], [prompt(number, 1 + number % 9)])
        return logits, bits(history)

    return run


@pytest.fixture(scope="module")
def at_once(decoder: Decoder) -> tuple[bytes, bytes]:
    """Logits and history of the long prompt in one pass."""
    history = History.empty(SHAPE)
    (logits,) = extend(decoder, [history], [LONG])
    return logits, bits(history)


@pytest.fixture(scope="module")
def three(checkpoint: Path) -> Iterator[Ranks]:
    with small.ranks_of(checkpoint, 3) as ranks:
        yield ranks


# --- sequences -----------------------------------------------------------------------------------


@given(order=st.permutations(range(64)), size=st.integers(1, 64), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_sequence_is_the_same_alone_and_in_any_batch(
    decoder: Decoder,
    alone: Callable[[int], tuple[bytes, bytes]],
    order: list[int],
    size: int,
    data: st.DataObject,
) -> None:
    """Batches of 1 to 64 in any order, some sequences half way already, change no bit of any."""
    numbers = order[:size]
    tokens = [prompt(number, 1 + number % 9) for number in numbers]
    cuts = [data.draw(st.integers(0, len(part) - 1)) for part in tokens]
    histories = [History.empty(SHAPE) for _ in numbers]
    begun = [at for at, cut in enumerate(cuts) if cut]
    if begun:
        extend(decoder, [histories[at] for at in begun], [tokens[at][: cuts[at]] for at in begun])
    logits = extend(
        decoder, histories, [part[cut:] for part, cut in zip(tokens, cuts, strict=True)]
    )
    found = list(zip(logits, map(bits, histories), strict=True))
    assert found == [alone(number) for number in numbers]


@given(cuts=st.sets(st.integers(1, len(LONG) - 1)))
@settings(max_examples=25, deadline=None)
def test_any_split_of_a_prompt_equals_one_pass(
    decoder: Decoder, at_once: tuple[bytes, bytes], cuts: set[int]
) -> None:
    """A prefill in chunks of any sizes leaves the logits and the history of one pass."""
    history, logits = History.empty(SHAPE), [b""]
    for start, end in pairwise([0, *sorted(cuts), len(LONG)]):
        logits = extend(decoder, [history], [LONG[start:end]])
    assert (logits[0], bits(history)) == at_once


def test_decode_step_after_step_equals_prefill(decoder: Decoder) -> None:
    """300 single steps, over a growth of the history's memory, equal one prefill."""
    tokens = prompt(3, 300)
    stepped, whole = History.empty(SHAPE), History.empty(SHAPE)
    each = [extend(decoder, [stepped], [[token]])[0] for token in tokens]
    assert [each[-1]] == extend(decoder, [whole], [tokens])
    assert bits(stepped) == bits(whole)


@given(blocks=st.integers(0, len(LONG) // BLOCK_TOKENS))
@settings(max_examples=15, deadline=None)
def test_a_history_restored_from_blocks_goes_on_alike(
    decoder: Decoder, at_once: tuple[bytes, bytes], blocks: int
) -> None:
    """Blocks taken as bytes from one history and loaded into a new one stand for their tokens."""
    first, second = History.empty(SHAPE), History.empty(SHAPE)
    extend(decoder, [first], [LONG])
    for number in range(blocks):
        second.load_block(first.block(number, BLOCK_TOKENS), BLOCK_TOKENS)
    assert second.length == blocks * BLOCK_TOKENS
    (logits,) = extend(decoder, [second], [LONG[second.length :]])
    assert (logits, bits(second)) == at_once


def test_a_failed_step_leaves_no_trace(
    decoder: Decoder, checkpoint: Path, at_once: tuple[bytes, bytes]
) -> None:
    """After a step that broke off in its second layer, or was not committed, it can be repeated."""

    def broken(layer: int, chosen: list[list[int]], rows: FloatArray, _: FloatArray) -> FloatArray:
        if layer == 1:
            raise ConnectionError
        return np.ones((sum(map(len, chosen)), rows.shape[1]), dtype=F32)

    history = History.empty(SHAPE)
    extend(decoder, [history], [LONG[:70]])
    with pytest.raises(ConnectionError):
        Decoder(SHAPE, load_shared(SHAPE, checkpoint), broken).step([Span(history, [9] * 40)])
    decoder.step([Span(history, [11] * 90)])
    (logits,) = extend(decoder, [history], [LONG[70:]])
    assert (logits, bits(history)) == at_once


@pytest.mark.parametrize(
    "environment", [{"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_CORETYPE": "Nehalem"}], ids=str
)
def test_another_process_computes_the_same_bits(
    checkpoint: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """A new process with new weights from the seed and another BLAS kernel gives the same bits."""
    program = "import sys, pathlib; from tests.engine import small; "
    program += "print(small.fingerprint(pathlib.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "weights")],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == small.fingerprint(checkpoint)


@given(
    holders=st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
        min_size=SHAPE.experts,
        max_size=SHAPE.experts,
    ),
    rank=st.integers(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_answers_are_added_by_expert_whoever_holds_them(
    three: Ranks, at_once: tuple[bytes, bytes], holders: list[list[int]], rank: int
) -> None:
    """Any placement and replication of experts over three ranks, asked by any, gives one result."""
    history = History.empty(SHAPE)
    (logits,) = extend(three.decoder(expert_map(holders, 3), rank), [history], [LONG])
    assert (logits, bits(history)) == at_once


# --- arithmetic ----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 64),
    inputs=st.one_of(st.integers(1, EXACT_WIDTH_MAX), st.just(EXACT_WIDTH_MAX)),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    extreme=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_integer_products_are_exact(
    rows: int, inputs: int, outputs: int, seed: int, extreme: bool
) -> None:
    """Float32 BLAS gives the whole numbers of int64 products, at any width that is allowed."""
    draw = np.random.default_rng(seed)
    low = 127 if extreme else -127
    left = draw.integers(low, 128, (rows, inputs), dtype=np.int8)
    right = draw.integers(low, 128, (inputs, outputs), dtype=np.int8)
    one = np.ones((rows, 1), dtype=F32)
    product = numerics.multiply(left.astype(F32), one, Matrix.of(right, 1.0))
    assert (product.astype(np.int64) == left.astype(np.int64) @ right.astype(np.int64)).all()


@given(rows=rows_of_all_sizes(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_rows_do_not_see_each_other(rows: FloatArray, seed: int) -> None:
    """Norm, quantisation and products of a row have the same bits without the other rows."""
    drawn = np.random.default_rng(seed).integers(-127, 128, (rows.shape[1], 50), dtype=np.int8)
    matrix = Matrix.of(drawn, 0.01)
    together = numerics.linear(numerics.normalise(rows), matrix)
    for number in range(len(rows)):
        single = numerics.linear(numerics.normalise(rows[number : number + 1]), matrix)
        assert single.tobytes() == together[number].tobytes()


@given(rows=rows_of_all_sizes())
@settings(max_examples=60, deadline=None)
def test_quantised_rows_are_small_whole_numbers(rows: FloatArray) -> None:
    """Every value is within half a step of a whole number from -127 to 127: it fits in int8."""
    quantised, scale = numerics.quantise(rows)
    assert (quantised == quantised.astype(np.int8)).all()
    assert np.abs(quantised).max() <= 127
    assert (np.abs(quantised * scale - rows) <= scale * 0.5001).all()


@given(logits=st.lists(st.integers(-3, 3), min_size=1, max_size=40), count=st.integers(1, 8))
def test_ties_between_experts_go_to_the_lower_id(logits: list[int], count: int) -> None:
    """The highest logits win, equal ones by id; the chosen are in id order, their weights sum 1."""
    chosen, weights = numerics.choose(np.array(logits, dtype=F32), count)
    best = sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:count]
    assert chosen == sorted(best)
    assert weights.sum() == pytest.approx(1.0)
    assert [weights[i] > weights[j] for i in range(len(chosen)) for j in range(len(chosen))] == [
        logits[a] > logits[b] for a in chosen for b in chosen
    ]


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["hidden_size", "moe_intermediate_size", "head_dim"])
def test_a_model_too_wide_for_exact_products_is_refused(size: str) -> None:
    """1,040 inputs are the most whose products stay below 2^24; one more is refused."""
    widest = small.config(num_attention_heads=1, **{size: EXACT_WIDTH_MAX})
    parse_shape(widest)
    assert EXACT_WIDTH_MAX * 127**2 < 2**24 <= (EXACT_WIDTH_MAX + 1) * 127**2
    with pytest.raises(PermanentError) as refused:
        parse_shape(small.config(num_attention_heads=1, **{size: EXACT_WIDTH_MAX + 1}))
    assert refused.value.reason is Reason.INVALID_ARGUMENT


def test_another_kind_of_model_is_refused() -> None:
    """The reference engine runs its own model type and says so."""
    with pytest.raises(PermanentError) as refused:
        parse_shape(small.config(model_type="deepseek_v3"))
    assert refused.value.reason is Reason.ENGINE_UNSUPPORTED
