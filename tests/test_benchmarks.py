"""What `make -s bench` promises of its output, without running it."""

from __future__ import annotations

import subprocess

import pytest
from benchmarks.figures import figure
from benchmarks.moments import phases_ms

from tests.support import ROOT


@pytest.mark.parametrize("target", ["bench", "bench-experts", "bench-kv", "soak"])
def test_only_the_last_command_writes_to_stdout(target: str) -> None:
    """One JSON object is all of stdout: what runs before it, the building of etcd, says nothing."""
    # The tests may themselves be run by a make, whose flags a make within it takes over.
    command = ["make", "--dry-run", "--silent", "--no-print-directory", target]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *before, last = listed.splitlines()
    assert "python -m" in last
    assert ">&2" not in last
    assert [line for line in before if "tools/build.py" in line and ">&2" not in line] == []


def test_phases_add_up_to_what_they_are_phases_of() -> None:
    """A moment that did not come has no phase, and its time is in the next one."""
    told = phases_ms(10.0, [("report", 10.5), ("gather", None), ("decide", 12.0)])
    assert told == {"report": 500.0, "decide": 1500.0}
    with pytest.raises(AssertionError):
        figure([2.1], [told], unit_ms=1e3)


def test_a_figure_has_the_phases_of_the_middle_and_of_the_slowest() -> None:
    """Below 100 samples p99 is the maximum, and a phase that a sample lacks took no time."""
    phases = [{"a": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 7.0}]
    found = figure([1.0, 3.0, 9.0], phases)
    assert (found["p50"], found["p99"], found["n"]) == (3.0, 9.0, 3)
    assert found["phases_ms"] == {"a": 1.0, "b": 2.0}
    assert found["phases_of_p99_ms"] == {"a": 2.0, "b": 7.0}
