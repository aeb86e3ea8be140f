"""Expert loads as files: `.npy`, CSV, or JSON as a list of lists or SGLang's `logical_count`.

In goes a file, out comes an array [layers, experts]. Whether its numbers can be loads is checked
where they are used.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raddle.model.errors import PermanentError, Reason

FloatArray = npt.NDArray[np.float64]
FILE_BYTES_MAX = 1_000_000_000


def read_loads(path: Path) -> FloatArray:
    """Loads [layers, experts]; the name's ending says the format.

    Raises:
        PermanentError: NOT_FOUND, or INVALID_ARGUMENT with the line or row.
    """
    readers = {".npy": _npy, ".csv": _csv, ".json": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise _invalid(path, f"must end in {', '.join(readers)}")
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise _invalid(path, f"is over {FILE_BYTES_MAX} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise PermanentError(Reason.NOT_FOUND, f"{path}: {error.strerror}.") from error
    return reader(path, data)


def _invalid(path: Path, message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, f"{path}: {message}.")


def _npy(path: Path, data: bytes) -> FloatArray:
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:
        # The header is Python text: a damaged one fails as whatever its tokenizer meets.
        raise _invalid(path, f"is no .npy file of numbers ({error})") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iuf":
        raise _invalid(path, "must hold whole or floating-point numbers")
    return found.astype(np.float64)


def _csv(path: Path, data: bytes) -> FloatArray:
    try:
        # Spreadsheets put a byte order mark before the text.
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _invalid(path, "is no text") from error
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError as error:
            raise _invalid(path, f"line {number}: {error}") from error
    return _rectangle(path, rows)


def _json(path: Path, data: bytes) -> FloatArray:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"is no JSON ({error})") from error
    if isinstance(found, dict):
        if "logical_count" not in found:
            raise _invalid(path, "must hold a list of layers, or logical_count with one")
        found = found["logical_count"]
    if not isinstance(found, list) or not all(isinstance(row, list) for row in found):
        raise _invalid(path, "must be two-dimensional, a list of layers that are lists of loads")
    for layer, row in enumerate(found):
        if not all(type(item) in (int, float) for item in row):
            raise _invalid(path, f"layer {layer} must hold numbers alone")
    return _rectangle(path, found)


def _rectangle(path: Path, rows: list[list[Any]]) -> FloatArray:
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise _invalid(
                path, f"ragged: layer {layer} has {len(row)} experts, layer 0 has {len(rows[0])}"
            )
    try:
        return np.array(rows, dtype=np.float64)
    except OverflowError as error:
        raise _invalid(path, "holds a number that is too large") from error
