"""The clock that a leader's decisions measure time with."""

from __future__ import annotations

import time

import pytest

from raddle.scheduler.leader import steady_clock


def test_a_step_of_the_wall_clock_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back or forward by an hour, the host's wall clock changes no duration of a term."""
    monotonic = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: monotonic)
    monkeypatch.setattr(time, "time", lambda: 1_000.0)
    clock = steady_clock()
    for wall in (1_000.0 - 3_600.0, 1_000.0 + 3_600.0):
        monkeypatch.setattr(time, "time", lambda wall=wall: wall)
        monotonic += 2.0
        assert clock() == 1_000.0 + (monotonic - 50.0)
