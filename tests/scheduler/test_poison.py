"""A request that meets a mistake of the program: it alone fails, and the term goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from raddle.core.events import Event, RequestReceived
from raddle.core.instructions import Commit, Instruction
from raddle.core.machine import Machine
from raddle.core.requests import Cordon
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.kinds import HoldKind
from raddle.v1 import scheduler_pb2
from tests.scheduler.conftest import Served, refusal
from tests.support import eventually

POISON = "poison"


def is_poison(event: Event) -> bool:
    return (
        isinstance(event, RequestReceived)
        and isinstance(event.request, Cordon)
        and event.request.message == POISON
    )


class Raises(Machine):
    """A core with a mistake: after it staged a poisoned cordon, it stumbles."""

    def handle(self, events: Sequence[Event], *, now: float) -> list[Instruction]:
        out = super().handle(events, now=now)
        if any(is_poison(event) for event in events):
            raise KeyError("a mistake")
        return out


class Unwritable(Machine):
    """A core with a mistake: what it writes for a poisoned cordon cannot be encoded."""

    def handle(self, events: Sequence[Event], *, now: float) -> list[Instruction]:
        return [self._spoilt(i) for i in super().handle(events, now=now)]

    @staticmethod
    def _spoilt(instruction: Instruction) -> Instruction:
        if not isinstance(instruction, Commit):
            return instruction
        writes = tuple(
            replace(w, value=replace(w.value, create_time=1e30))
            if w.key.startswith(keys.HOLDS) and w.value.message == POISON
            else w
            for w in instruction.writes
        )
        return replace(instruction, writes=writes)


@pytest.fixture(params=[Raises, Unwritable])
def make_machine(request: pytest.FixtureRequest) -> Callable[..., Machine]:
    machine: Callable[..., Machine] = request.param
    return machine


def cordon(served: Served, node: str, message: str = "") -> Any:
    request = scheduler_pb2.CordonRequest(subject=f"sn0/{node}", message=message)
    return served.stub("client/mallory").Cordon(request, timeout=10.0)


async def test_only_the_poisoned_request_fails(served: Served) -> None:
    """Of many requests at once all are carried out but the poisoned one, which is told INTERNAL."""
    await served.submit("before")
    nodes = [f"n{number:02d}" for number in range(8)]
    poisoned = cordon(served, "n08", POISON)
    others = [cordon(served, node) for node in nodes]
    error = await refusal(poisoned)
    assert error.reason is Reason.INTERNAL
    assert isinstance(error, PermanentError)
    assert "report it" in error.message
    assert error.details["request"] in error.message
    await asyncio.gather(*others)
    holds = sorted(key for key in served.backend.records if key.startswith(keys.HOLDS))
    assert holds == [keys.hold(f"sn0/{node}", HoldKind.CORDON) for node in nodes]
    assert served.counted("raddle_unforeseen_errors_total") == 1
    await served.submit("after")


async def test_a_batch_with_several_poisons_is_sorted_out(
    served: Served, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taken in one batch, each poisoned request fails, the rest is committed once and in order."""
    ask = served.leader.ask
    requests = [Cordon(subject=f"sn0/n{n:02d}", message=POISON if n % 2 else "") for n in range(6)]
    calls = [asyncio.create_task(ask(r, "client/mallory", 10.0)) for r in requests]
    found = await asyncio.gather(*calls, return_exceptions=True)
    failed = [isinstance(answer, PermanentError) for answer in found]
    assert failed == [bool(n % 2) for n in range(6)]
    assert served.counted("raddle_unforeseen_errors_total") == 3
    events = [r.key for r in served.backend.records.values() if r.key.startswith(keys.AUDIT)]
    assert len(events) == 1 + 3
    told = caplog.text + capsys.readouterr().out
    assert "client/mallory" in told
    assert "Traceback" in told


async def test_what_agents_and_front_doors_said_survives(served: Served) -> None:
    """The machine that is built anew still knows the open streams and the running sequences."""
    asked = asyncio.Event()

    async def reports() -> Any:
        yield scheduler_pb2.ReportStatsRequest(node="sn0/n00")
        await asked.wait()

    stream = served.stub().ReportStats(reports())
    await cordon(served, "n01")
    nodes = served.leader.nodes()
    assert nodes is not None
    await eventually(lambda: nodes.node("sn0/n00").has_stream, "the stream is open")
    assert (await refusal(cordon(served, "n02", POISON))).reason is Reason.INTERNAL
    after = served.leader.nodes()
    assert after is not None
    assert after is not nodes
    assert after.node("sn0/n00").has_stream
    asked.set()
    await stream


async def test_a_mistake_outside_the_core_is_told_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that stumbles ends with INTERNAL and a reason, in a call and in a stream."""

    def stumble(*_: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr("raddle.scheduler.inventory.nodes", stumble)
    error = await refusal(served.stub().ListNodes(scheduler_pb2.ListNodesRequest()))
    assert (error.reason, "ListNodes" in error.message) == (Reason.INTERNAL, True)
    monkeypatch.setattr(served.watches, "follow", stumble)
    stream = served.stub().WatchJobs(scheduler_pb2.WatchJobsRequest())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert served.counted("raddle_unforeseen_errors_total") == 2
