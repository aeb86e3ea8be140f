"""Loads that simulated ranks report, and when."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from raddle.agent.core.events import Drive, Event
from raddle.agent.engine.simulated import SimulatedDriver, simulated_loads
from raddle.model.health import RankStatus
from raddle.model.job import AssignmentStage, JobAssignment, ModelSpec, RankAssignment
from raddle.model.kinds import RoleKind
from raddle.model.stats import RankStats
from raddle.model.types import RankKey
from raddle.models import config_text

pytestmark = pytest.mark.asyncio


def drive(stage: AssignmentStage, rank: int, epoch: int = 3) -> Drive:
    key = RankKey(role="decode", instance=0, rank=rank)
    assigned = RankAssignment(rank=key, kind=RoleKind.DECODE, die="sn0/n00/npu0/die0")
    model = ModelSpec(config=config_text("raddle-demo"))
    job = JobAssignment(job_uid="j", epoch=epoch, stage=stage, model=model, ranks=(assigned,))
    return Drive(job, assigned, RankStatus(), 0)


async def test_rank_0_reports_while_it_is_live() -> None:
    """One rank of an instance tells its loads at its epoch, until it is fenced."""
    told: list[tuple[str, RankStats]] = []
    events: list[Event] = []
    waits: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def sleep(seconds: float) -> None:
        if seconds:
            turn = asyncio.Event()
            waits.put_nowait(turn)
            await turn.wait()

    driver = SimulatedDriver(events.append, lambda *said: told.append(said), sleep=sleep)
    for rank in (0, 1):
        await driver.drive(drive(AssignmentStage.LIVE, rank), None)
    (await waits.get()).set()
    turn = await waits.get()
    assert [(uid, stats.rank.rank, stats.epoch) for uid, stats in told] == [("j", 0, 3)]
    assert len(told[0][1].expert_loads) > 0
    await driver.drive(drive(AssignmentStage.PREPARE, 0, epoch=4), None)
    turn.set()
    await asyncio.sleep(0)
    assert len(told) == 1
    assert waits.empty()
    await driver.close()


async def test_loads_are_like_recorded_ones() -> None:
    """The same for the same job, no expert at zero, as skewed as DeepSeek-V3 at decode."""
    loads = simulated_loads("j-1", 58, 256)
    assert loads == simulated_loads("j-1", 58, 256)
    assert loads != simulated_loads("j-2", 58, 256)
    tokens = np.array([row.tokens for row in loads])
    assert tokens.min() > 0
    assert 3 < np.median(tokens.max(axis=1) / tokens.mean(axis=1)) < 10
