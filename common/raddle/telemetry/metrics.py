"""Prometheus metrics and probes over HTTP, on an address of their own.

Names are API: prefix `raddle_`, base units, no label for layers or experts. A probe answers 200, or
503 with a sentence that says why not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

from raddle.telemetry.addresses import split_address

PHASE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TURN_TIMEOUT_S = 5.0
#: Why the process is not what the probe asks for; empty when it is. Called from another thread.
Probe = Callable[[], str]


def turning(loop: asyncio.AbstractEventLoop) -> Probe:
    """Does the event loop still turn? One that hangs does nothing of what the process is for."""

    def probe() -> str:
        turned = threading.Event()
        loop.call_soon_threadsafe(turned.set)
        if turned.wait(TURN_TIMEOUT_S):
            return ""
        return f"the event loop has not turned for {TURN_TIMEOUT_S:g} s"

    return probe


def serve_metrics(
    address: str, registry: CollectorRegistry, probes: Mapping[str, Probe]
) -> Callable[[], None]:
    """Serve the registry and the probes, by path, at `host:port` from a thread.

    Returns the way to stop.
    """
    host, port = split_address(address)
    metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        probe = probes.get(environ["PATH_INFO"])
        if probe is None:
            return metrics(environ, start_response)
        why = probe()
        status = "503 Service Unavailable" if why else "200 OK"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{why or 'ok'}\n".encode()]

    server: Any
    server, thread = start_http_server(port, addr=host, registry=registry)
    server.set_app(answer)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop
