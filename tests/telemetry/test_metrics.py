"""Metrics and probes over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import threading

import pytest
from prometheus_client import CollectorRegistry, Gauge

from raddle.store.ports import free_port
from raddle.telemetry import metrics
from raddle.telemetry.addresses import host_port, split_address
from raddle.telemetry.metrics import serve_metrics, turning


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_probes_stand_beside_the_metrics() -> None:
    """A probe answers 200, or 503 with its sentence; every other path has the metrics."""
    registry = CollectorRegistry()
    Gauge("raddle_some", "Some.", registry=registry).set(7)
    why = ["no node yet"]
    port = free_port()
    stop = serve_metrics(f"127.0.0.1:{port}", registry, {"/ready": lambda: why[0]})
    try:
        assert get(port, "/ready") == (503, "no node yet\n")
        why[0] = ""
        assert get(port, "/ready") == (200, "ok\n")
        status, text = get(port, "/metrics")
        assert status == 200
        assert "raddle_some 7.0" in text
    finally:
        stop()


async def test_a_loop_that_hangs_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that turns is live; one that is held up is not."""
    probe = turning(asyncio.get_running_loop())
    assert await asyncio.to_thread(probe) == ""
    monkeypatch.setattr(metrics, "TURN_TIMEOUT_S", 0.01)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(probe()))
    asking.start()
    asking.join()  # the loop waits here
    assert "has not turned for 0.01 s" in found[0]


@pytest.mark.parametrize(
    ("host", "text"), [("10.0.0.5", "10.0.0.5:7400"), ("fd00::5", "[fd00::5]:7400")]
)
def test_addresses_with_colons_stand_in_brackets(host: str, text: str) -> None:
    """Host and port make one text, and come out of it again."""
    assert host_port(host, 7400) == text
    assert split_address(text) == (host, 7400)
