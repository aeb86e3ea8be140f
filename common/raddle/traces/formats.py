"""Public traces as requests: Mooncake's (with block ids), Azure's and ServeGen's (without).

In go files, out come `TraceRequest`s in the order of arrival. What a trace does not say is drawn
from a generator that the caller seeds: arrivals inside a batch, and with `synthetic_prefix` which
blocks requests of a trace without block ids share.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
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
_SESSIONS = 64
_CONTINUE_SHARE = 0.5
_WINDOW_S = 600.0


def read_mooncake(path: Path, rng: random.Random) -> list[TraceRequest]:
    """One JSON object a line: timestamp (ms), input_length, output_length, hash_ids.

    Rows of the same batch are spread over the batch's time, in their order.

    Raises:
        PermanentError: INVALID_ARGUMENT, naming the line.
    """
    rows = [
        _row(path, number, line)
        for number, line in enumerate(_lines(path), start=1)
        if line.strip()
    ]
    rows.sort(key=lambda row: row.arrival_s)
    arrivals = spread([row.arrival_s for row in rows], rng)
    return [
        TraceRequest(arrival, row.blocks, row.input_tokens, row.output_tokens, row.stamp_s)
        for arrival, row in zip(arrivals, rows, strict=True)
    ]


class _Row(msgspec.Struct):
    timestamp: Annotated[float, msgspec.Meta(ge=0, lt=1e15)]
    input_length: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    output_length: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)], ...]


_ROWS = msgspec.json.Decoder(_Row)


def _row(path: Path, number: int, line: str) -> TraceRequest:
    try:
        row = _ROWS.decode(line)
    except msgspec.DecodeError as error:
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
    """CSV with TIMESTAMP, ContextTokens and GeneratedTokens; times count from the first row.

    Raises:
        PermanentError: INVALID_ARGUMENT, naming the line.
    """
    found: list[tuple[float, int, int]] = []
    begin: datetime | None = None
    for number, row in enumerate(csv.DictReader(_lines(path)), start=2):
        try:
            # Seven fractional digits, of which a datetime takes six.
            stamp = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
            sizes = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _invalid(path, number, f"no request of the azure format: {error}") from error
        begin = begin or stamp
        found.append(((stamp - begin).total_seconds(), *sizes))
    found.sort()
    return _without_ids(found, rng, synthetic_prefix=synthetic_prefix)


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
        dataset = json.loads("\n".join(_lines(beside)))
    except ValueError as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{beside.name}: {error}.") from error
    found: list[tuple[float, int, int]] = []
    for number, row in enumerate(csv.reader(_lines(path)), start=1):
        try:
            window = _Window(row, dataset, rng)
            found += window.requests()
        except (ValueError, KeyError, IndexError, TypeError, SyntaxError) as error:
            raise _invalid(path, number, f"no window of the servegen format: {error}") from error
        if len(found) > REQUESTS_MAX:
            raise _invalid(path, number, f"more than {REQUESTS_MAX} requests")
    return _without_ids(found, rng, synthetic_prefix=synthetic_prefix)


class _Window:
    """Ten minutes of one ServeGen client."""

    def __init__(self, row: Sequence[str], dataset: Any, rng: random.Random) -> None:
        self._begin_s, self._rate = float(row[0]), float(row[1])
        self._rng = rng
        if not self._rate:
            return
        family, shape, scale = row[3], float(row[4]), float(row[5])
        self._gap: Callable[[], float]
        if family == "Gamma":
            self._gap = lambda: rng.gammavariate(shape, scale)
        elif family == "Weibull":
            self._gap = lambda: rng.weibullvariate(scale, shape)
        else:
            self._gap = lambda: rng.expovariate(self._rate)
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


def _histogram(text: str) -> tuple[list[int], list[float]]:
    """(values, cumulated weights) of a histogram that is written as a Python dict."""
    parsed = ast.literal_eval(text)
    values = sorted(int(value) for value in parsed)
    total, sums = 0.0, []
    for value in values:
        total += float(parsed[value])
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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{path} cannot be read: {error}.") from error


def _invalid(path: Path, line: int, message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, f"{path.name}, line {line}: {message}.")
