"""The garbage collector's part in the latency of a decision."""

from __future__ import annotations

import gc

# Records are frozen values without cycles: counting references frees them. A full pass over those
# of 10,000 jobs takes tens of milliseconds and finds nothing, so it has to be rare.
_THRESHOLDS = (100_000, 50, 1_000)


def calm_collector() -> None:
    """Collect seldom from now on, and never again what is there already."""
    gc.set_threshold(*_THRESHOLDS)
    gc.freeze()
