"""What loads may be, what a check names, and which extra copies a coverage report asks for."""

from __future__ import annotations

import numpy as np
import pytest

from raddle.core.experts.coverage import measure_coverage
from raddle.core.experts.layout import require_loads
from raddle.core.experts.maps import check_map
from raddle.model.errors import PermanentError
from tests.core.expert_cases import make_layout


def test_loads_whose_sums_would_not_be_numbers_are_refused() -> None:
    """Huge loads would make balance infinite and its bound no number."""
    with pytest.raises(PermanentError, match=r"layer 0, expert 1 is above 1e\+100 \(1e\+308\)"):
        require_loads(np.array([[1.0, 1e308]]))
    assert require_loads(np.array([[1e100, 0.0]])).tolist() == [[1e100, 0.0]]


def test_no_extra_copy_is_asked_for_where_none_can_help() -> None:
    """Every die holds every expert: the margin cannot be raised; with one more die it can."""
    full = measure_coverage(np.array([[0, 1, 0, 1]]), 2, make_layout(2, 2))
    assert (full.margin_dies, full.extra_copies_needed, full.extra_copies) == (1, 0, ())
    more = measure_coverage(np.array([[0, 1, 0, 1, -1, -1]]), 2, make_layout(3, 2))
    assert (more.margin_dies, more.extra_copies_needed) == (1, 2)
    assert more.extra_copies == ((0, 0, 2), (0, 1, 2))


def test_a_check_calls_layers_what_the_file_calls_them() -> None:
    """Layers that were left out do not change the numbers of the others."""
    found = check_map(np.array([[0, 0], [1, 1]]), 2, make_layout(2, 1), [3, 7])
    assert found == ["layer 3: expert 1 has no live copy", "layer 7: expert 0 has no live copy"]
