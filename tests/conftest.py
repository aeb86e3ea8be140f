"""What holds for all tests."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import pytest
import structlog

# Fixtures of the tests on Kubernetes: `cluster`, `namespace`, `forward`, `api_server`.
pytest_plugins = ["tests.kubernetes"]

# Until a loop was set once, Python 3.11's `get_event_loop` makes one for whoever asks.
# pytest-asyncio asks before its first test, and nobody would ever close that loop.
asyncio.set_event_loop(None)

# A shell without job control starts what runs in the background with SIGINT ignored, and children
# inherit that; our tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A test that runs a program's `main` sets up logging for itself, not for those after it."""
    kept = structlog.get_config()
    yield
    structlog.configure(**kept)
    structlog.contextvars.clear_contextvars()
