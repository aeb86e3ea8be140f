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
    digits: int = 3,
    **more: Any,
) -> dict[str, Any]:
    """p50, p99, min, max and n of the samples, and the median of each phase in milliseconds."""
    found: dict[str, Any] = {
        "p50": round(quantile(samples, 0.5), digits),
        "p99": round(quantile(samples, 0.99), digits),
        "min": round(min(samples), digits),
        "max": round(max(samples), digits),
        "n": len(samples),
    }
    if phases:
        names = list(dict.fromkeys(name for part in phases for name in part))
        found["phases_ms"] = {
            name: round(median(part[name] for part in phases if name in part), digits)
            for name in names
        }
    return found | more
