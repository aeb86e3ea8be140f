"""How the agent follows a rank that says nothing, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from raddle.agent.core.events import Event, RankSilent, StopRank
from raddle.agent.engine import reference_driver
from raddle.agent.engine.driver import Tell
from raddle.agent.engine.launcher import Running
from raddle.agent.engine.pod import PodLauncher
from raddle.agent.engine.reference.config import RankAddress
from raddle.agent.engine.reference_driver import ReferenceDriver
from raddle.model.types import RankKey
from raddle.sim.clock import VirtualClockLoop
from tests.agent.test_pods import CONFIG

KEY = RankKey(role=CONFIG.role, instance=CONFIG.instance, rank=CONFIG.rank)
ADDRESS = RankAddress(
    pid=0,
    start_time_ticks=0,
    incarnation=CONFIG.incarnation,
    engine_address="10.0.0.1:1",
    data_address="",
    job_uid=CONFIG.job_uid,
    epoch=CONFIG.epoch,
    role=CONFIG.role,
    instance=CONFIG.instance,
    rank=CONFIG.rank,
    start_count=CONFIG.epoch,
)


class HungLife:
    """A rank that does not end, asked or not."""

    async def wait(self) -> int:
        code: int = await asyncio.get_running_loop().create_future()
        return code

    async def end(self) -> None:
        """It does not listen."""

    def close(self) -> None:
        """There is nothing to let go of."""


class SilentChannel:
    """A channel on which reports break off at once, and calls fail in one way."""

    def __init__(self, failure: grpc.StatusCode) -> None:
        self.asked_s: list[float] = []
        self._failure = failure

    def unary_unary(self, *_: Any, **__: Any) -> Callable[..., Awaitable[Any]]:
        return self._call

    async def _call(self, _request: Any, *, timeout: float) -> Any:
        if self._failure is grpc.StatusCode.DEADLINE_EXCEEDED:
            await asyncio.sleep(timeout)
        none = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(self._failure, none, none, "no answer")

    def unary_stream(self, *_: Any, **__: Any) -> Callable[[Any], AsyncIterator[Any]]:
        return self._reports

    async def _reports(self, _request: Any) -> AsyncIterator[Any]:
        self.asked_s.append(asyncio.get_running_loop().time())
        none = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, "silent")
        yield

    async def close(self) -> None:
        """There is nothing to let go of."""


def with_hung_rank(
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[ReferenceDriver], Awaitable[None]],
    failure: grpc.StatusCode = grpc.StatusCode.DEADLINE_EXCEEDED,
    tell: Tell = lambda _: None,
) -> list[float]:
    """When a driver that found a hung rank asked it for reports while `work` ran."""
    channel = SilentChannel(failure)
    monkeypatch.setattr(reference_driver, "make_channel", lambda *_, **__: channel)

    async def run() -> None:
        node, folder = CONFIG.node, Path("/nowhere")
        driver = ReferenceDriver(node, folder, tell, lambda *_: None, PodLauncher())
        driver._begin(Running(ADDRESS, CONFIG, HungLife()))
        await work(driver)
        await driver.close()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(run())
    return channel.asked_s


async def half_a_minute(_driver: ReferenceDriver) -> None:
    await asyncio.sleep(30)


def test_a_rank_that_lets_the_time_pass_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each third answer in a row that does not come in time is told."""
    told: list[Event] = []
    with_hung_rank(monkeypatch, half_a_minute, tell=told.append)
    silent = [event for event in told if isinstance(event, RankSilent)]
    assert [event.message.rpartition("agent ")[2] for event in silent] == [
        f"{times} times in a row" for times in (3, 6, 9, 12)
    ]


def test_a_rank_that_cannot_be_reached_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fails at once says something of the way to the rank, and nothing of the rank."""
    told: list[Event] = []
    with_hung_rank(monkeypatch, half_a_minute, grpc.StatusCode.UNAVAILABLE, told.append)
    assert not [event for event in told if isinstance(event, RankSilent)]


def test_a_silent_rank_is_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that break off are asked for again within 0.1 s, then each second at most."""

    async def a_minute(_driver: ReferenceDriver) -> None:
        await asyncio.sleep(60)

    asked_s = with_hung_rank(monkeypatch, a_minute)
    pauses = [later - earlier for earlier, later in pairwise(asked_s)]
    assert pauses[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert pauses[4:] == pytest.approx([1.0] * len(pauses[4:]))


def test_a_rank_that_is_being_ended_is_asked_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hung rank of a pod stays until its pod is deleted; nobody asks it for reports till then."""

    async def end_it(driver: ReferenceDriver) -> None:
        await asyncio.sleep(10)
        await driver.stop(StopRank(CONFIG.job_uid, KEY, CONFIG.epoch))
        await asyncio.sleep(60)

    assert max(with_hung_rank(monkeypatch, end_it)) < 10


def test_a_new_leader_does_not_wait_for_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is to be told all again has each rank asked at once."""

    async def tell_again(driver: ReferenceDriver) -> None:
        await asyncio.sleep(10.05)
        driver.report_again()
        await asyncio.sleep(0.01)

    assert with_hung_rank(monkeypatch, tell_again)[-1] == pytest.approx(10.05)
