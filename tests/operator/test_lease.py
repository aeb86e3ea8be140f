"""The Lease in virtual time, where the API server answers as slowly as a test wants."""

from __future__ import annotations

import asyncio
import copy
from typing import Any, cast

import pytest

from raddle.model.errors import ConflictError, Reason, TemporaryError
from raddle.operator.cluster import Cluster
from raddle.operator.lease import DEADLINE_S, DURATION_S, RENEW_S, Lease

Object = dict[str, Any]


class ApiServer:
    """One Lease; each call takes a while."""

    def __init__(self) -> None:
        self.lease: Object | None = None
        self.takes_s = 0.0
        self.refuses = False
        #: When the newest change of the Lease was asked for.
        self.asked_at_s = 0.0
        self.changed = asyncio.Event()

    async def get(self, _kind: str, _namespace: str, _name: str) -> Object | None:
        await self._answer()
        return copy.deepcopy(self.lease)

    async def create(self, item: Object) -> Object | None:
        return await self.replace(item) if self.lease is None else None

    async def replace(self, item: Object) -> Object:
        asked_at_s = now_s()
        version = item["metadata"].get("resourceVersion", 0)
        await self._answer()
        if self.lease is not None and self.lease["metadata"]["resourceVersion"] != version:
            raise ConflictError(Reason.STALE_REVISION, "it has changed")
        self.asked_at_s = asked_at_s
        self.changed.set()
        self.lease = copy.deepcopy(item)
        self.lease["metadata"]["resourceVersion"] = version + 1
        return self.lease

    async def _answer(self) -> None:
        await asyncio.sleep(self.takes_s)
        if self.refuses:
            raise TemporaryError(Reason.DEADLINE_EXCEEDED, "it does not answer")


def now_s() -> float:
    return asyncio.get_running_loop().time()


class Candidate:
    """One operator that does nothing but lead; it says from when to when it acted."""

    def __init__(self, api: ApiServer, identity: str) -> None:
        self.lease = Lease(cast("Cluster", api), "default", "raddle-operator", identity)
        self.stop = asyncio.Event()
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self.began_s = self.ended_s = 0.0
        self.task = asyncio.create_task(self.lease.lead(self._work, self.stop))

    async def _work(self) -> None:
        self.began_s = now_s()
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended_s = now_s()
            self.ended.set()

    async def end(self) -> None:
        self.stop.set()
        await self.task


@pytest.mark.looptime
@pytest.mark.parametrize("hangs_s", [DEADLINE_S - 0.1, 1000.0])
async def test_a_holder_stops_in_time_though_its_attempts_hang(hangs_s: float) -> None:
    """It counts from when it asked for the last renewal that it got, while it still asks."""
    api = ApiServer()
    holder = Candidate(api, "one")
    await holder.began.wait()
    await asyncio.sleep(3 * RENEW_S + 0.5)
    api.takes_s, api.refuses = hangs_s, True
    await holder.ended.wait()
    assert api.asked_at_s >= 3 * RENEW_S
    assert holder.ended_s == pytest.approx(api.asked_at_s + DEADLINE_S)
    api.takes_s = 0.0
    await holder.end()


@pytest.mark.looptime
async def test_a_slow_answer_does_not_lengthen_the_term() -> None:
    """Others may count from when the API server had the renewal, not from when it said so."""
    api = ApiServer()
    holder = Candidate(api, "one")
    await holder.began.wait()
    api.takes_s = 2.5
    api.changed.clear()
    await api.changed.wait()
    api.refuses = True
    await holder.ended.wait()
    assert holder.ended_s == pytest.approx(api.asked_at_s + DEADLINE_S)
    api.takes_s = 0.0
    await holder.end()


@pytest.mark.looptime
async def test_troubles_that_pass_in_time_do_not_end_the_term() -> None:
    """A holder tries on after refusals."""
    api = ApiServer()
    holder = Candidate(api, "one")
    await holder.began.wait()
    api.refuses = True
    await asyncio.sleep(DEADLINE_S - 1.5 * RENEW_S)
    api.refuses = False
    await asyncio.sleep(3 * DEADLINE_S)
    assert not holder.ended.is_set()
    await holder.end()


@pytest.mark.looptime
async def test_the_next_one_acts_only_when_the_last_one_does_not() -> None:
    """It waits the whole duration from when it saw the last renewal."""
    api = ApiServer()
    first = Candidate(api, "one")
    await first.began.wait()
    second = Candidate(api, "two")
    await asyncio.sleep(DURATION_S)
    assert not second.began.is_set()
    # The first one is cut off from here on, and nobody releases the Lease.
    first_lease: Any = first.lease
    first_lease._cluster = silent = ApiServer()
    silent.takes_s, silent.refuses = 1000.0, True
    await second.began.wait()
    assert first.ended.is_set()
    assert second.began_s - first.ended_s >= DURATION_S - DEADLINE_S - RENEW_S
    silent.takes_s = 0.0
    await second.end()
    first.task.cancel()
