"""What a kubelet asks of a daemon beside its metrics."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge

from raddle.store.ports import free_port
from raddle.telemetry.metrics import Check, loop_turns, serve_metrics


@contextmanager
def served(checks: dict[str, Check]) -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("raddle_something", "A metric.", registry=registry).set(7)
    address = f"127.0.0.1:{free_port()}"
    stop = serve_metrics(address, registry, checks)
    try:
        yield f"http://{address}"
    finally:
        stop()


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_checks_and_metrics_share_an_address() -> None:
    """A check that finds nothing is 200, one that finds something 503 with the sentence."""
    with served({"/healthz": lambda: "", "/readyz": lambda: "the store is not read yet"}) as url:
        assert get(f"{url}/healthz") == (200, "ok\n")
        assert get(f"{url}/readyz") == (503, "the store is not read yet\n")
        assert "raddle_something 7.0" in get(f"{url}/metrics")[1]


async def test_a_loop_that_turns_is_told_from_one_that_does_not() -> None:
    """The check, asked from another thread, waits for the loop; a blocked or closed one fails."""
    check = loop_turns(asyncio.get_running_loop())
    assert await asyncio.to_thread(check) == ""
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(check()))
    asking.start()
    asking.join()  # blocks the loop until the check has given up
    assert "did not turn" in answers[0]
    other = asyncio.new_event_loop()
    other.close()
    assert loop_turns(other)() == "the event loop is closed"
