"""Prometheus metrics and signs of life over HTTP, on an address of its own.

Names are API: prefix `raddle_`, base units, no label for layers or experts. `/metrics` answers
Prometheus; `/healthz`, `/readyz` and the like answer a kubelet, which has no certificate to show to
the gRPC port.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

PHASE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LOOP_TIMEOUT_S = 2.0

#: Says in one sentence what is wrong, nothing when all is well; called in a thread of the server.
Check = Callable[[], str]


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """A line for each scrape tells nobody anything."""


def serve_metrics(
    address: str, registry: CollectorRegistry, checks: Mapping[str, Check] | None = None
) -> Callable[[], None]:
    """Serve the registry, and the checks by their paths, at `host:port` from a thread.

    Returns the way to stop.
    """
    metrics = make_wsgi_app(registry)
    known = dict(checks or {})

    def answer(environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        check = known.get(environment["PATH_INFO"])
        if check is None:
            return metrics(environment, start_response)
        trouble = check()
        status = "503 Service Unavailable" if trouble else "200 OK"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{trouble or 'ok'}\n".encode()]

    host, _, port = address.rpartition(":")
    server = make_server(host, int(port), answer, ThreadingWSGIServer, handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return stop


def loop_turns(loop: asyncio.AbstractEventLoop) -> Check:
    """Does the event loop still run what it is given?"""

    def check() -> str:
        turned = threading.Event()
        try:
            loop.call_soon_threadsafe(turned.set)
        except RuntimeError:
            return "the event loop is closed"
        if turned.wait(_LOOP_TIMEOUT_S):
            return ""
        return f"the event loop did not turn within {_LOOP_TIMEOUT_S:g} s"

    return check
