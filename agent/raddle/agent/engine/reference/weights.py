"""INT8 weights of the reference model: made from a seed, kept in files, loaded one expert a time.

A matrix is an int8 array [inputs, outputs] with one float32 scale. `write_checkpoint` writes
everything once; ranks read what they need, so that a moved expert is really loaded.
"""

from __future__ import annotations

import io
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raddle.agent.engine.reference.shape import Shape

F32 = np.float32
FloatArray = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Integer values as float32 [inputs, outputs] (so that BLAS multiplies them) and a scale."""

    values: FloatArray
    scale: np.float32

    @staticmethod
    def of(quantised: Int8Array, scale: float) -> Matrix:
        return Matrix(np.ascontiguousarray(quantised.astype(F32)), F32(scale))


@dataclass(frozen=True, slots=True)
class Expert:
    """One routed expert of one layer: gate and up [hidden, intermediate], down back."""

    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class Layer:
    """What every rank has of a layer."""

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    router: Matrix


@dataclass(frozen=True, slots=True)
class Shared:
    """Embedding [vocabulary, hidden], the head back, and the layers."""

    embedding: FloatArray
    head: Matrix
    layers: tuple[Layer, ...]


def _random(shape: Shape, name: tuple[int, ...], rows: int, columns: int) -> Int8Array:
    generator = np.random.Generator(np.random.Philox(key=[shape.seed, _key(name)]))
    drawn: Int8Array = generator.integers(-127, 128, size=(rows, columns), dtype=np.int8)
    return drawn


def _key(name: tuple[int, ...]) -> int:
    key = 0
    for part in name:
        key = key * 4099 + part + 1
    return key


def _scale(inputs: int, gain: float = 1.0) -> float:
    """Uniform int8 has a deviation of about 73; outputs keep the inputs' size."""
    return gain / (73.3 * float(np.sqrt(inputs)))


_LAYER_PARTS = ("query", "key", "value", "output", "router")
_EXPERT_PARTS = ("gate", "up", "down")


def _layer_arrays(shape: Shape, layer: int) -> dict[str, Int8Array]:
    sizes = {
        "query": (shape.hidden, shape.attention),
        "key": (shape.hidden, shape.attention),
        "value": (shape.hidden, shape.attention),
        "output": (shape.attention, shape.hidden),
        "router": (shape.hidden, shape.experts),
    }
    return {
        part: _random(shape, (1, layer, number), *sizes[part])
        for number, part in enumerate(_LAYER_PARTS)
    }


def _expert_arrays(shape: Shape, layer: int, expert: int) -> dict[str, Int8Array]:
    wide, narrow = shape.hidden, shape.intermediate
    sizes = {"gate": (wide, narrow), "up": (wide, narrow), "down": (narrow, wide)}
    return {
        part: _random(shape, (2, layer, expert, number), *sizes[part])
        for number, part in enumerate(_EXPERT_PARTS)
    }


def _write(path: Path, arrays: dict[str, Int8Array]) -> None:
    # Several processes may write the same checkpoint at once: each has its own temporary name.
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def expert_path(folder: Path, layer: int, expert: int) -> Path:
    return folder / f"layer-{layer:03d}-expert-{expert:04d}.npz"


def write_checkpoint(shape: Shape, folder: Path) -> None:
    """Write all weights of the model; a folder that is complete for this model is left alone."""
    mark = folder / "digest"
    if mark.exists() and mark.read_text() == shape.digest:
        return
    folder.mkdir(parents=True, exist_ok=True)
    embedding = {
        "embedding": _random(shape, (0,), shape.vocabulary, shape.hidden),
        "head": _random(shape, (3,), shape.hidden, shape.vocabulary),
    }
    _write(folder / "embedding.npz", embedding)
    for layer in range(shape.layers):
        _write(folder / f"layer-{layer:03d}.npz", _layer_arrays(shape, layer))
        for expert in range(shape.experts):
            _write(expert_path(folder, layer, expert), _expert_arrays(shape, layer, expert))
    temporary = folder / f"digest.{secrets.token_hex(4)}.tmp"
    temporary.write_text(shape.digest)
    temporary.replace(mark)


def load_shared(shape: Shape, folder: Path) -> Shared:
    with np.load(folder / "embedding.npz") as file:
        embedding, output = file["embedding"], file["head"]
    layers = []
    for layer in range(shape.layers):
        with np.load(folder / f"layer-{layer:03d}.npz") as file:
            arrays = {part: file[part] for part in _LAYER_PARTS}
        parts = {
            part: Matrix.of(array, _scale(array.shape[0], 8.0 if part == "router" else 1.0))
            for part, array in arrays.items()
        }
        layers.append(Layer(**parts))
    head = Matrix.of(output, _scale(shape.hidden))
    return Shared(embedding.astype(F32) / F32(73.3), head, tuple(layers))


def load_expert(folder: Path, layer: int, expert: int) -> Expert:
    """One expert from the checkpoint."""
    return expert_from_bytes(expert_path(folder, layer, expert).read_bytes())


def expert_bytes(expert: Expert) -> bytes:
    """An expert as one rank sends it to another: three int8 matrices with their sizes."""
    parts = []
    for name in _EXPERT_PARTS:
        values = getattr(expert, name).values.astype(np.int8)
        parts += [np.array(values.shape, dtype=np.int32).tobytes(), values.tobytes()]
    return b"RDX1" + b"".join(parts)


def expert_from_bytes(data: bytes) -> Expert:
    """The expert behind a peer's bytes or a checkpoint file's."""
    arrays: dict[str, Int8Array] = {}
    if data[:4] == b"RDX1":
        at = 4
        for name in _EXPERT_PARTS:
            rows, columns = np.frombuffer(data, np.int32, 2, at)
            at += 8
            flat = np.frombuffer(data, np.int8, int(rows) * int(columns), at)
            arrays[name] = flat.reshape(int(rows), int(columns))
            at += int(rows) * int(columns)
    else:
        with np.load(io.BytesIO(data)) as file:
            arrays = {name: file[name] for name in _EXPERT_PARTS}
    return Expert(**{n: Matrix.of(a, _scale(a.shape[0], 1.4)) for n, a in arrays.items()})
