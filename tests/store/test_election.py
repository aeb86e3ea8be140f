"""Leader election in virtual time: who leads, when a standby may take over, and who must wait."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from itertools import pairwise
from typing import Any

from raddle.model import keys
from raddle.sim.clock import VirtualClockLoop
from raddle.store.election import DEPOSED_WAIT_S, LEADER_TTL_S, SILENCE_MAX_S, Election, Probe
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Put, Record, Transaction


def in_virtual_time(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(work())


def now() -> float:
    return asyncio.get_running_loop().time()


def seen(verdict: Probe) -> Callable[[Record], Awaitable[Probe]]:
    async def probe(_record: Record) -> Probe:
        return verdict

    return probe


def test_one_of_three_leads_and_its_fence_holds() -> None:
    """Of three candidates one leads; a deposed leader's fenced write fails."""

    async def work() -> None:
        backend = MemoryBackend()
        stores = [MemoryStore(backend) for _ in range(3)]
        elections = [
            Election(store, name.encode(), seen(Probe.ALIVE))
            for store, name in zip(stores, "abc", strict=True)
        ]
        campaigns = [asyncio.create_task(e.campaign()) for e in elections]
        await asyncio.sleep(5)
        (won,) = [task for task in campaigns if task.done()]
        term = won.result()
        assert backend.records[keys.LEADER].mod_revision == term.revision
        taker = Election(MemoryStore(backend), b"d", seen(Probe.GONE))
        newer = await taker.campaign()
        assert newer.revision > term.revision
        write = (Put("x", b""),)
        assert not (await stores[0].commit(Transaction((term.fence,), write))).succeeded
        assert (await stores[0].commit(Transaction((newer.fence,), write))).succeeded
        for task in campaigns:
            task.cancel()
        await asyncio.gather(*campaigns, return_exceptions=True)

    in_virtual_time(work)


def test_a_leader_whose_process_is_gone_is_followed_at_once() -> None:
    """A refused connection after an established one is proof: no silence is waited out."""

    async def work() -> None:
        backend = MemoryBackend()
        await Election(MemoryStore(backend), b"a", seen(Probe.ALIVE)).campaign()
        started = now()
        await Election(MemoryStore(backend), b"b", seen(Probe.GONE)).campaign()
        assert now() - started < 0.2

    in_virtual_time(work)


def test_a_silent_leader_is_followed_after_a_while() -> None:
    """Silence alone proves nothing at once: a standby waits 2.5 s, well before the lease ends."""

    async def work() -> None:
        backend = MemoryBackend()
        await Election(MemoryStore(backend), b"a", seen(Probe.ALIVE)).campaign()
        started = now()
        await Election(MemoryStore(backend), b"b", seen(Probe.SILENT)).campaign()
        assert SILENCE_MAX_S <= now() - started < SILENCE_MAX_S + 0.3 < LEADER_TTL_S

    in_virtual_time(work)


def test_two_that_cannot_see_each_other_do_not_duel() -> None:
    """A replica deposed while alive waits 10 s, doubled each time, before it takes over again."""

    async def work() -> None:
        backend = MemoryBackend()
        elections = [
            Election(MemoryStore(backend), name, seen(Probe.SILENT)) for name in (b"a", b"b")
        ]
        takeovers: list[float] = []

        async def live(election: Election) -> None:
            while True:
                term = await election.campaign()
                takeovers.append(now())
                while backend.records[keys.LEADER].mod_revision == term.revision:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                await term.lease.revoke()
                election.deposed()

        lives = [asyncio.create_task(live(election)) for election in elections]
        await asyncio.sleep(600)
        for task in lives:
            task.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        gaps = [b - a for a, b in pairwise(takeovers)]
        assert len(takeovers) <= 14, "a duel"
        assert gaps[0] < DEPOSED_WAIT_S
        assert max(gaps[-2:]) > 2 * DEPOSED_WAIT_S

    in_virtual_time(work)


def test_a_leader_that_resigns_is_followed_without_a_wait() -> None:
    """Giving the key back spares the standby the silence."""

    async def work() -> None:
        backend = MemoryBackend()
        store = MemoryStore(backend)
        term = await Election(store, b"a", seen(Probe.ALIVE)).campaign()
        standby = asyncio.create_task(
            Election(MemoryStore(backend), b"b", seen(Probe.ALIVE)).campaign()
        )
        await asyncio.sleep(20)
        assert not standby.done()
        await term.resign(store)
        started = now()
        await standby
        assert now() - started < 0.2

    in_virtual_time(work)
