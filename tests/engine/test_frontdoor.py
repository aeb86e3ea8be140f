"""What a front door tells whoever sends it requests."""

from __future__ import annotations

from typing import Any

import pytest

from raddle.agent.engine.reference.frontdoor import FrontDoor
from raddle.agent.engine.reference.routing import Routing
from raddle.model.routes import Routes, RouteState
from tests.engine.small import JOB, SHAPE

STARTING, LIVE, FENCED, ENDED = (
    RouteState.STARTING,
    RouteState.LIVE,
    RouteState.FENCED,
    RouteState.ENDED,
)


async def answers(told: list[tuple[str, RouteState]]) -> tuple[int, int]:
    """What /ready and /health say after the front door was told these routes."""
    routing = Routing("frontdoor", [], "default", "small", SHAPE.digest)
    for epoch, (job_uid, state) in enumerate(told, start=1):
        routing._take(Routes(job_uid=job_uid, epoch=epoch, state=state))
    routes = FrontDoor(routing, SHAPE, "small", 1.0).routes()
    asked: dict[str, Any] = {route.path: route.endpoint for route in routes}
    ready, health = [(await asked[path](None)).status_code for path in ("/ready", "/health")]
    return ready, health


@pytest.mark.parametrize(
    ("told", "ready", "health"),
    [
        ([], 503, 503),
        ([(JOB, STARTING)], 503, 503),
        ([(JOB, STARTING), (JOB, LIVE)], 200, 200),
        ([(JOB, LIVE), (JOB, FENCED)], 200, 503),
        ([(JOB, LIVE), (JOB, FENCED), (JOB, STARTING)], 200, 503),
        ([(JOB, FENCED)], 200, 503),
        ([(JOB, LIVE), (JOB, ENDED)], 503, 503),
        ([(JOB, LIVE), (JOB, ENDED), ("j-2", STARTING)], 503, 503),
    ],
    ids=["unknown", "new", "live", "recovery", "restart", "new-front-door", "ended", "next-job"],
)
async def test_a_front_door_is_ready_while_it_serves_or_holds_requests(
    told: list[tuple[str, RouteState]], ready: int, health: int
) -> None:
    """/ready is about requests, which a recovery only delays; /health is about the job."""
    assert await answers(told) == (ready, health)
