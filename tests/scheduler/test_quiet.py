"""Agents whose leases nobody renews any more, found before the leases end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from raddle.model import keys
from raddle.scheduler.mirror import Mirror
from raddle.scheduler.quiet import QuietNodes
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Put, Transaction

NODES = [f"sn0/n{number:02d}" for number in range(6)]


class Agents:
    """One lease a node, each from a client of its own; a leader's mirror beside them."""

    def __init__(self) -> None:
        self.backend = MemoryBackend()
        self.clients = {node: MemoryStore(self.backend) for node in NODES}
        self.store = MemoryStore(self.backend)
        self.mirror = Mirror(self.store)
        self.quiet = QuietNodes(
            self.store, self.mirror, asyncio.get_running_loop().time, lambda: NODES
        )

    async def start(self) -> None:
        for node, client in self.clients.items():
            lease = await client.grant(4.0)
            # What it says is not read here.
            put = Put(keys.health(node), b"", lease.lease_id)
            await client.commit(Transaction(writes=(put,)))
        self.following = asyncio.create_task(self.mirror.run())
        await self.mirror.wait_revision(self.backend.revision)


@asynccontextmanager
async def running() -> AsyncIterator[Agents]:
    """Begun in the test: a fixture has another clock than a test of virtual time."""
    found = Agents()
    await found.start()
    yield found
    found.following.cancel()
    for client in found.clients.values():
        await client.close()


@pytest.mark.looptime
async def test_who_does_not_renew_is_quiet_before_the_lease_ends() -> None:
    """Three stop: not yet at once, all of them three seconds later."""
    async with running() as agents:
        await asyncio.sleep(10.0)
        assert await agents.quiet.found() == ()
        for node in NODES[:3]:
            agents.clients[node].cut()
        await asyncio.sleep(0.5)
        assert await agents.quiet.found() == ()
        await asyncio.sleep(2.45)
        assert await agents.quiet.found() == tuple(NODES[:3])
        assert all(keys.health(node) in agents.backend.records for node in NODES)


@pytest.mark.looptime
async def test_a_store_that_is_away_says_nothing() -> None:
    """What cannot be asked is not counted."""
    async with running() as agents:
        for node in NODES[:3]:
            agents.clients[node].cut()
        await asyncio.sleep(2.95)
        agents.store.cut()
        assert await agents.quiet.found() == ()


@pytest.mark.looptime
async def test_a_record_without_a_lease_is_no_sign_of_life() -> None:
    """Health that nobody has to renew keeps no node from being lost."""
    async with running() as agents:
        put = Put(keys.health(NODES[0]), b"")
        await agents.store.commit(Transaction(writes=(put,)))
        await agents.mirror.wait_revision(agents.backend.revision)
        assert await agents.quiet.found() == (NODES[0],)
