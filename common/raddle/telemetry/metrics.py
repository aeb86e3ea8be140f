"""Prometheus metrics over HTTP, on an address of its own.

Names are API: prefix `raddle_`, base units, no label for layers or experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

PHASE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


def serve_metrics(address: str, registry: CollectorRegistry) -> Callable[[], None]:
    """Serve the registry at `host:port` from a thread; returns the way to stop."""
    host, _, port = address.rpartition(":")
    server: Any
    server, thread = start_http_server(int(port), addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop
