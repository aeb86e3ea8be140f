"""Public traces as requests: Mooncake's (with block ids), Azure's and ServeGen's (without).

In go files, out come `TraceRequest`s in the order of arrival. What a trace does not say is drawn
from a generator that the caller seeds: arrivals inside a batch, and with `synthetic_prefix` which
blocks requests of a trace without block ids share.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from raddle.model.errors import PermanentError, Reason
from raddle.model.kv import TraceRequest

BLOCK_TOKENS = 512
BATCH_S = 3.0
# Rows of one batch are stamped at most so far apart.
_SAME_BATCH_S = 0.001_5
REQUESTS_MAX = 5_000_000
#: More than any model's context: what is beyond it is no size of a request.
TOKENS_MAX = 1 << 24
_STAMP_MAX_S = 1e12
_SESSIONS = 64
_CONTINUE_SHARE = 0.5
_WINDOW_S = 600.0
#: What reading a window may end with: its numbers and its histograms are anybody's texts.
_UNREADABLE = (
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
)


def read_mooncake(path: Path, rng: random.Random) -> list[TraceRequest]:
    """One JSON object a line: timestamp (ms), input_length, output_length, hash_ids.

    Rows of the same batch are spread over the batch's time, in their order.

    Raises:
        PermanentError: INVALID_ARGUMENT, naming the line.
    """
    rows = [
        _row(path, number, line)
        for number, line in enumerate(io.StringIO(_text(path)), start=1)
        if line.strip()
    ]
    rows.sort(key=lambda row: row.arrival_s)
    arrivals = spread([row.arrival_s for row in rows], rng)
    return [
        TraceRequest(arrival, row.blocks, row.input_tokens, row.output_tokens, row.stamp_s)
        for arrival, row in zip(arrivals, rows, strict=True)
    ]


class _Row(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, le=_STAMP_MAX_S * 1000)]
    input_length: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)], ...]


_ROWS = msgspec.json.Decoder(_Row)


def _row(path: Path, number: int, line: str) -> TraceRequest:
    try:
        row = _ROWS.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _invalid(path, number, f"no request of the mooncake format: {error}") from error
    time_s = row.timestamp / 1000
    return TraceRequest(time_s, row.hash_ids, row.input_length, row.output_length, time_s)


def spread(stamps: Sequence[float], rng: random.Random) -> list[float]:
    """Arrivals of rows whose stamps are batches: spread until the next batch, in their order."""
    starts = [
        at for at, stamp in enumerate(stamps) if at == 0 or stamp - stamps[at - 1] > _SAME_BATCH_S
    ]
    arrivals: list[float] = []
    for start, end in pairwise([*starts, len(stamps)]):
        after = stamps[end] if end < len(stamps) else math.inf
        window_s = min(BATCH_S, after - stamps[start])
        count = end - start
        arrivals += [
            stamps[start] + (window_s * (at + rng.random()) / count if count > 1 else 0.0)
            for at in range(count)
        ]
    return arrivals


def read_azure(path: Path, rng: random.Random, *, synthetic_prefix: bool) -> list[TraceRequest]:
    """CSV with TIMESTAMP, ContextTokens and GeneratedTokens; times count from the earliest row.

    Raises:
        PermanentError: INVALID_ARGUMENT, naming the line.
    """
    found: list[tuple[datetime, int, int]] = []
    reader = csv.DictReader(io.StringIO(_text(path)))
    for number, row in _numbered(path, reader):
        try:
            stamp = datetime.fromisoformat(row["TIMESTAMP"].strip())
            found.append((stamp, _tokens(row["ContextTokens"]), _tokens(row["GeneratedTokens"])))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _invalid(path, number, f"no request of the azure format: {error}") from error
        if (stamp.tzinfo is None) != (found[0][0].tzinfo is None):
            raise _invalid(path, number, "stamps with and without a time zone cannot be compared")
    found.sort()
    rows = [
        ((stamp - found[0][0]).total_seconds(), inputs, outputs) for stamp, inputs, outputs in found
    ]
    return _without_ids(rows, rng, synthetic_prefix=synthetic_prefix)


def _tokens(text: str) -> int:
    """A size of a request.

    Raises:
        ValueError: it is no number, or none that a request can have.
    """
    tokens = int(text)
    if not 0 <= tokens <= TOKENS_MAX:
        raise ValueError(f"{tokens} tokens: a request has 0 to {TOKENS_MAX}")
    return tokens


def read_servegen(path: Path, rng: random.Random, *, synthetic_prefix: bool) -> list[TraceRequest]:
    """A client's `chunk-N-trace.csv`, its histograms in `chunk-N-dataset.json` beside it.

    Each row is a window of ten minutes: begin, requests a second, variation, family of the times
    between arrivals (Gamma or Weibull: shape, scale).

    Raises:
        PermanentError: INVALID_ARGUMENT, naming file and line.
    """
    if not path.name.endswith("-trace.csv"):
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"{path.name}: a servegen trace is named chunk-N-trace.csv."
        )
    beside = path.with_name(path.name.replace("-trace.csv", "-dataset.json"))
    try:
        dataset = json.loads(_text(beside))
    except (ValueError, RecursionError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{beside.name}: {error}.") from error
    found: list[tuple[float, int, int]] = []
    for number, row in _numbered(path, csv.reader(io.StringIO(_text(path)))):
        try:
            window = _Window(row, dataset, rng)
            found += islice(window.requests(), REQUESTS_MAX + 1 - len(found))
        except _UNREADABLE as error:
            raise _invalid(path, number, f"no window of the servegen format: {error}") from error
        if len(found) > REQUESTS_MAX:
            raise _invalid(path, number, f"more than {REQUESTS_MAX} requests")
    return _without_ids(found, rng, synthetic_prefix=synthetic_prefix)


class _Window:
    """Ten minutes of one ServeGen client."""

    def __init__(self, row: Sequence[str], dataset: Any, rng: random.Random) -> None:
        self._begin_s, self._rate = _number(row[0], _STAMP_MAX_S), _number(row[1], REQUESTS_MAX)
        self._rng = rng
        if not self._rate:
            return
        self._gap: Callable[[], float] = lambda: rng.expovariate(self._rate)
        mean_s = 1.0 / self._rate
        family = row[3]
        if family in {"Gamma", "Weibull"}:
            shape, scale = _above_0(row[4]), _above_0(row[5])
            if family == "Gamma":
                self._gap = lambda: rng.gammavariate(shape, scale)
                mean_s = shape * scale
            else:
                self._gap = lambda: rng.weibullvariate(scale, shape)
                mean_s = scale * math.gamma(1.0 + 1.0 / shape)
        # Said at once, not after as many draws.
        if mean_s * REQUESTS_MAX < _WINDOW_S:
            raise ValueError(f"{mean_s:g} s between arrivals are more than {REQUESTS_MAX} requests")
        # Histograms are of longer windows than rates: the last one that began counts.
        begun = max(int(key) for key in dataset if int(key) <= self._begin_s)
        histograms = dataset[str(begun)]
        self._inputs = _histogram(histograms["input_tokens"])
        self._outputs = _histogram(histograms["output_tokens"])

    def requests(self) -> Iterator[tuple[float, int, int]]:
        if not self._rate or not self._inputs[0] or not self._outputs[0]:
            return
        time_s = self._gap()
        while time_s < _WINDOW_S:
            yield self._begin_s + time_s, self._draw(self._inputs), self._draw(self._outputs)
            time_s += self._gap()

    def _draw(self, histogram: tuple[list[int], list[float]]) -> int:
        return self._rng.choices(histogram[0], cum_weights=histogram[1])[0]


def _number(text: str, most: float) -> float:
    """A number from 0 on.

    Raises:
        ValueError: it is none, or above `most`.
    """
    number = float(text)
    if not 0 <= number <= most:
        raise ValueError(f"{text} must be 0 to {most:g}")
    return number


def _above_0(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"shape and scale must be above 0, not {text}")
    return number


def _histogram(text: str) -> tuple[list[int], list[float]]:
    """(values, cumulated weights) of a histogram that is written as a Python dict."""
    parsed = ast.literal_eval(text)
    values = sorted(_tokens(value) for value in parsed)
    total, sums = 0.0, []
    for value in values:
        total += _number(parsed[value], 1e9)
        sums.append(total)
    return values, sums


def _without_ids(
    rows: Sequence[tuple[float, int, int]], rng: random.Random, *, synthetic_prefix: bool
) -> list[TraceRequest]:
    """Requests whose blocks are all their own, unless sharing is made up.

    Made up: half of the requests go on with one of the last 64 conversations, with all of its
    blocks that fit; all begin with the same block, a system prompt.
    """
    found: list[TraceRequest] = []
    recent: list[tuple[int, ...]] = []
    next_id = 1
    for time_s, input_tokens, output_tokens in rows:
        count = -(-input_tokens // BLOCK_TOKENS)
        shared: tuple[int, ...] = ()
        if synthetic_prefix:
            known = bool(recent) and rng.random() < _CONTINUE_SHARE
            # The last block of a prompt is rarely full, so what follows it is another one.
            shared = (rng.choice(recent)[:-1] if known else (0,))[:count]
        new = range(next_id, next_id + count - len(shared))
        next_id = new.stop
        blocks = (*shared, *new)
        if blocks:
            recent = [*recent[-_SESSIONS + 1 :], blocks]
        found.append(TraceRequest(time_s, blocks, input_tokens, output_tokens, time_s))
    return found


def _text(path: Path) -> str:
    """All of a file, whose lines end with nothing but line feeds."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{path} cannot be read: {error}.") from error


def _numbered(path: Path, reader: Any) -> Iterator[tuple[int, Any]]:
    """Line numbers and rows of a CSV reader, blank rows left out."""
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise _invalid(path, reader.line_num, f"no CSV: {error}") from error


def _invalid(path: Path, line: int, message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, f"{path.name}, line {line}: {message}.")
