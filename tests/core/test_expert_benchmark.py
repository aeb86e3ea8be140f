"""What the benchmark of experts measures with: its loads and how it counts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from benchmarks.experts import LAYERS, layout_of, loads_of, sharing


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calibrated_loads_are_as_uneven_as_recorded_ones(seed: int) -> None:
    """Recorded: low indices are hotter, and the hottest experts of adjacent layers overlap."""
    loads = loads_of("calibrated", seed)
    hot = np.argsort(-loads, axis=1)[:, :32]
    overlap = [len(np.intersect1d(one, other)) / 32 for one, other in itertools.pairwise(hot)]
    low_share = loads[:, :64].sum(axis=1) / loads.sum(axis=1)
    assert 0.35 <= low_share.mean() <= 0.41
    assert 0.54 <= (hot < 64).mean() <= 0.73
    assert 0.22 <= min(overlap) <= max(overlap) <= 0.35
    assert loads.min() > 0


def test_copies_do_not_share_for_want_of_dead_npus() -> None:
    """Two copies on the only NPU that is left could not be apart."""
    table = np.full((LAYERS, 4), -1)
    table[:, :2] = 0
    assert sharing(table, layout_of(4, 4, [2, 3]), 1) == 0
    assert sharing(table, layout_of(4, 4), 1) == LAYERS
