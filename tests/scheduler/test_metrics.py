"""What a scheduler counts, as Prometheus reads it."""

from __future__ import annotations

import asyncio

from prometheus_client import generate_latest

from raddle.model import keys
from raddle.model.kinds import HoldKind
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Delete, Put, Transaction
from tests.support import eventually


async def test_records_that_cannot_be_read_are_counted() -> None:
    """The gauge follows records that are set aside, and those that are mended or deleted."""
    backend, metrics = MemoryBackend(), Metrics()
    mirror = Mirror(MemoryStore(backend))
    metrics.follow(mirror)

    def shows(count: int) -> bool:
        line = f"raddle_records_set_aside {count:.1f}"
        return line in generate_latest(metrics.registry).decode().splitlines()

    following = asyncio.create_task(mirror.run())
    try:
        assert shows(0)
        names = [keys.hold(f"sn0/n0{number}", HoldKind.CORDON) for number in range(2)]
        backend.commit(Transaction(writes=tuple(Put(name, b"\xff\xff") for name in names)))
        await eventually(lambda: shows(2), "two are set aside")
        backend.commit(Transaction(writes=(Delete(names[0]),)))
        await eventually(lambda: shows(1), "one is left")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
