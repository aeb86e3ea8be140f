"""What tests of the core share."""

from __future__ import annotations

import pytest

from tests.core.world import World, ready_world


@pytest.fixture
def world() -> World:
    """A whole nvl72, ready, with a leader that has led for a while."""
    return ready_world()
