"""What holds for all tests."""

from __future__ import annotations

import asyncio
import signal

# Fixtures of the tests on Kubernetes: `cluster`, `namespace`, `forward`, `api_server`.
pytest_plugins = ["tests.kubernetes"]

# Until a loop was set once, Python 3.11's `get_event_loop` makes one for whoever asks.
# pytest-asyncio asks before its first test, and nobody would ever close that loop.
asyncio.set_event_loop(None)

# A shell without job control starts what runs in the background with SIGINT ignored, and children
# inherit that; our tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
