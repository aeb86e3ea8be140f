"""Weights come from the seed alone, the same on every rank, and move one expert at a time."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raddle.agent.engine.reference.exchange import ExchangeClient
from raddle.agent.engine.reference.shape import parse_shape
from raddle.agent.engine.reference.slots import Experts, Slots
from raddle.agent.engine.reference.weights import (
    Expert,
    Matrix,
    expert_bytes,
    expert_from_bytes,
    expert_path,
    load_expert,
    load_shared,
    write_checkpoint,
)
from tests.engine.small import EVERYTHING_HERE, SHAPE, config, expert_map

OTHER = parse_shape(config(weights_seed=8))
PAIRS = [(layer, e) for layer in range(SHAPE.layers) for e in range(SHAPE.experts)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def matrices(folder: Path) -> list[Matrix]:
    """All of a checkpoint's matrices."""
    shared = load_shared(SHAPE, folder)
    owners: list[Any] = [*shared.layers, *(load_expert(folder, *pair) for pair in PAIRS)]
    parts = [getattr(owner, f.name) for owner in owners for f in dataclasses.fields(owner)]
    return [shared.head, *parts]


def same(one: Expert, other: Expert) -> bool:
    pairs = [(one.gate, other.gate), (one.up, other.up), (one.down, other.down)]
    return all((a.values == b.values).all() and a.scale == b.scale for a, b in pairs)


def test_every_writer_makes_the_same_files(checkpoint: Path, tmp_path: Path) -> None:
    """Two checkpoints of one model are equal, byte for byte."""
    write_checkpoint(SHAPE, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(checkpoint)


def test_writers_at_once_leave_one_whole_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """Four ranks' agents that write one folder together end with the files of one writer."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_checkpoint(SHAPE, tmp_path / "w"), range(4)))
    assert contents(tmp_path / "w") == contents(checkpoint)


def test_a_complete_checkpoint_is_left_alone(tmp_path: Path) -> None:
    """Writing a checkpoint that is there already touches no file."""
    write_checkpoint(SHAPE, tmp_path)
    before = {path: path.stat().st_ino for path in tmp_path.iterdir()}
    write_checkpoint(SHAPE, tmp_path)
    assert {path: path.stat().st_ino for path in tmp_path.iterdir()} == before


def test_an_interrupted_checkpoint_is_completed(checkpoint: Path, tmp_path: Path) -> None:
    """Without the mark that comes last, files are missing or cut short: all are written again."""
    write_checkpoint(SHAPE, tmp_path)
    (tmp_path / "digest").unlink()
    expert_path(tmp_path, 1, 5).unlink()
    expert_path(tmp_path, 0, 2).write_bytes(b"PK")
    write_checkpoint(SHAPE, tmp_path)
    assert contents(tmp_path) == contents(checkpoint)


def test_another_model_replaces_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    """A folder with another seed's weights is written anew."""
    write_checkpoint(OTHER, tmp_path)
    write_checkpoint(SHAPE, tmp_path)
    assert contents(tmp_path) == contents(checkpoint)


def test_no_two_matrices_are_alike(checkpoint: Path, tmp_path: Path) -> None:
    """Each layer, expert and part has weights of its own, and another seed changes them all."""
    write_checkpoint(OTHER, tmp_path)
    found = [m.values.tobytes() for m in [*matrices(checkpoint), *matrices(tmp_path)]]
    assert len(set(found)) == len(found)


def test_weights_are_whole_numbers_of_int8(checkpoint: Path) -> None:
    """Every matrix holds whole numbers from -127 to 127, which exact products rely on."""
    for matrix in matrices(checkpoint):
        assert matrix.values.dtype == np.float32
        assert (np.rint(matrix.values) == matrix.values).all()
        assert np.abs(matrix.values).max() == 127
        assert matrix.scale > 0


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 7)])
def test_one_expert_loads_from_its_file_alone(tmp_path: Path, layer: int, expert: int) -> None:
    """An expert needs no file but its own, and nobody else's shows up with it."""
    write_checkpoint(SHAPE, tmp_path)
    whole = load_expert(tmp_path, layer, expert)
    for path in tmp_path.iterdir():
        if path != expert_path(tmp_path, layer, expert):
            path.unlink()
    slots = Slots(tmp_path)
    assert slots.load_from_disk(layer, expert) == 3 * SHAPE.hidden * SHAPE.intermediate
    assert [pair for pair in PAIRS if slots.has(*pair)] == [(layer, expert)]
    assert slots.weights(layer, expert) == expert_bytes(whole)


@pytest.mark.parametrize("pair", PAIRS)
def test_an_expert_from_a_peer_equals_the_one_on_disk(
    checkpoint: Path, tmp_path: Path, pair: tuple[int, int]
) -> None:
    """What one rank sends another, without any disk, is the checkpoint's expert, bit for bit."""
    sender, receiver = Slots(checkpoint), Slots(tmp_path / "nothing")
    assert sender.weights(*pair) is None
    sender.load_from_disk(*pair)
    data = sender.weights(*pair)
    assert data is not None
    assert receiver.load_from_bytes(*pair, data) == 3 * SHAPE.hidden * SHAPE.intermediate
    assert receiver.weights(*pair) == data
    assert same(expert_from_bytes(data), load_expert(checkpoint, *pair))


def test_a_rank_keeps_what_the_map_puts_on_it(checkpoint: Path) -> None:
    """A rank wants its own slots' experts of every layer; a new map drops what it leaves out."""
    slots = Slots(checkpoint)
    before = expert_map([(0,), (1,), (0, 1), (1,)], 2)
    assert slots.wanted(before, 0) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert slots.wanted(before, 1) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    for pair in slots.wanted(before, 0):
        slots.load_from_disk(*pair)
    after = expert_map([(1,), (1,), (0,), (0,)], 2)
    slots.keep_only(slots.wanted(after, 0))
    assert [pair for pair in PAIRS if slots.has(*pair)] == [(0, 2), (1, 2)]


def test_rows_of_an_expert_that_is_not_here_are_refused(checkpoint: Path) -> None:
    """A rank that lacks one of the asked experts answers nothing rather than a part."""
    slots = Slots(checkpoint)
    slots.load_from_disk(0, 4)
    rows, scale = np.ones((2, SHAPE.hidden), np.float32), np.ones((2, 1), np.float32)
    assert slots.compute(0, [4, 4], rows, scale) is not None
    assert slots.compute(0, [4, 5], rows, scale) is None
    assert slots.compute(1, [4, 4], rows, scale) is None


def test_loads_are_told_once(checkpoint: Path) -> None:
    """Each call gives the tokens since the last one, for the layers that had any."""
    client = ExchangeClient("j", 1.0, None)
    experts = Experts(1, EVERYTHING_HERE, 0, Slots(checkpoint), client, {})
    experts.loads[0, 3] += 2
    assert [(row.layer, row.tokens[3], sum(row.tokens)) for row in experts.take_loads()] == [
        (0, 2, 2)
    ]
    experts.loads[1, 1] += 5
    assert [(row.layer, row.tokens[1]) for row in experts.take_loads()] == [(1, 5)]
    assert experts.take_loads() == ()
