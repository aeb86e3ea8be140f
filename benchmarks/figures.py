"""One figure: samples, what their time went into, and the summary that is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that `share` of all do not exceed; below 100 samples p99 is the max."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figure(
    samples: Sequence[float],
    phases: Sequence[Mapping[str, float]] = (),
    *,
    unit_ms: float = 1.0,
    digits: int = 3,
    **more: Any,
) -> dict[str, Any]:
    """p50, p99, min, max and n of the samples; the median of each phase, and those of the p99.

    Phases are milliseconds, samples are in units of `unit_ms` milliseconds. The phases of each
    sample add up to it; medians need not.
    """
    found: dict[str, Any] = {
        "p50": round(quantile(samples, 0.5), digits),
        "p99": round(quantile(samples, 0.99), digits),
        "min": round(min(samples), digits),
        "max": round(max(samples), digits),
        "n": len(samples),
    }
    if phases:
        found |= _phases(samples, phases, unit_ms)
    return found | more


def _phases(
    samples: Sequence[float], phases: Sequence[Mapping[str, float]], unit_ms: float
) -> dict[str, Any]:
    for sample, part in zip(samples, phases, strict=True):
        assert math.isclose(sum(part.values()), sample * unit_ms, abs_tol=0.1), (sample, part)
    names = dict.fromkeys(name for part in phases for name in part)
    slow = phases[samples.index(quantile(samples, 0.99))]
    return {
        # A phase that a sample did not have took no time in it.
        "phases_ms": {n: round(median(part.get(n, 0.0) for part in phases), 3) for n in names},
        "phases_of_p99_ms": {name: round(spent_ms, 3) for name, spent_ms in slow.items()},
    }
