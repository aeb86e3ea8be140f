"""The queue of what is to be looked after."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.operator.work import RETRY_S_MAX, Counts, Item, Work
from tests.support import eventually


async def running(
    do: Callable[[Item], Awaitable[bool]], scenario: Callable[[Work], Awaitable[None]]
) -> None:
    work = Work(do, Counts())
    task = asyncio.create_task(work.run())
    await scenario(work)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_marks_while_it_waits_or_runs_are_one() -> None:
    """One attempt at a time for each name, and one more for what came meanwhile."""
    gate, attempts, at_once = asyncio.Event(), [0], [0]

    async def do(_: Item) -> bool:
        attempts[0] += 1
        at_once[0] += 1
        assert at_once[0] == 1
        await gate.wait()
        at_once[0] -= 1
        return True

    async def scenario(work: Work) -> None:
        for _ in range(10):
            work.mark("job", "a", "b")
        await eventually(lambda: attempts[0] == 1, "it is begun")
        for _ in range(10):
            work.mark("job", "a", "b")
        gate.set()
        await eventually(lambda: work.counts.done == 2, "it is done twice")
        assert attempts[0] == 2

    await running(do, scenario)


@pytest.mark.parametrize(
    "error",
    [
        TemporaryError(Reason.NO_LEADER, "away"),
        PermanentError(Reason.DOES_NOT_FIT, "too large"),
        RuntimeError("a mistake"),
    ],
)
async def test_what_fails_is_done_again_later_and_later(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pauses grow, up to a bound; there is no hot loop."""
    pauses: list[float] = []
    tried = [0]

    async def do(_: Item) -> bool:
        tried[0] += 1
        raise error

    async def scenario(work: Work) -> None:
        monkeypatch.setattr(work, "_later", lambda _item, delay_s: pauses.append(delay_s))
        for number in range(12):
            work.mark("job", "a", "b")
            await eventually(lambda n=number: tried[0] == n + 1, "it is tried")  # type: ignore[misc]
            await eventually(lambda n=number: len(pauses) == n + 1, "it waits")  # type: ignore[misc]

    await running(do, scenario)
    assert pauses == sorted(pauses)
    assert pauses[-1] == RETRY_S_MAX
    assert min(pauses) > 0


async def test_what_is_gone_is_not_looked_after_again() -> None:
    """No timer stays behind."""

    async def do(_: Item) -> bool:
        return False

    async def scenario(work: Work) -> None:
        work.mark("job", "a", "b")
        await eventually(lambda: work.counts.done == 1, "it is done")
        assert work._timers == {}

    await running(do, scenario)


async def test_one_that_fails_does_not_hold_up_the_others() -> None:
    """Names are worked on side by side."""
    forever = asyncio.Event()

    async def do(item: Item) -> bool:
        if item.name == "stuck":
            await forever.wait()
        return True

    async def scenario(work: Work) -> None:
        work.mark("job", "a", "stuck")
        work.mark("job", "a", "fine")
        await eventually(lambda: work.counts.done == 1, "the other one is done")

    await running(do, scenario)
