"""Gangs of eight dies, decided and committed to one etcd with fsync."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cluster import say
from benchmarks.decisions import GANG, spec_of
from benchmarks.figures import figure
from raddle.core.events import NodeProbed, RankProbed
from raddle.core.instructions import ProbeNode, ProbeRank
from raddle.core.requests import ApplySuperNode, CancelJob, Cordon, SubmitJob, Uncordon
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.health import AgentHealth, AgentRegistration
from raddle.model.incident import LeaderRecord
from raddle.model.job import JobState
from raddle.scheduler.collector import calm_collector
from raddle.scheduler.leader import Leader
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.store.election import Election, Probe
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Put, Record, Transaction
from raddle.wire import records as wire

ACCEPTED = 16_000
WINDOWS = 10
# 86 of the 96 gangs that the machine holds.
RUNNING = 86


class _NobodyAnswers:
    """There are no ranks: nothing starts the gangs, they are placed and end again."""

    async def node(self, probe: ProbeNode) -> NodeProbed:
        return NodeProbed(probe.node, answered=True)

    async def rank(self, probe: ProbeRank) -> RankProbed:
        return RankProbed(probe.job_uid, probe.incarnation, answered=True)


async def _alive(_record: Record) -> Probe:
    return Probe.ALIVE


class Placing:
    """Counts placements as they are committed, and ends the oldest gangs to keep the use level."""

    def __init__(self, leader: Leader, mirror: Mirror) -> None:
        self._leader = leader
        self._running: dict[str, None] = {}
        self._ending: set[asyncio.Task[Any]] = set()
        self.placed = 0
        self._is_over = False
        mirror.listen(self._changed)

    def _changed(self, key: str, value: Any, _revision: int) -> None:
        if key.startswith(keys.JOBS) and value is not None and value.state is JobState.STARTING:
            self.placed += 1
            self._running[value.uid] = None
            while len(self._running) > RUNNING and not self._is_over:
                uid = next(iter(self._running))
                del self._running[uid]
                asyncio.get_running_loop().call_soon(self._end, uid)

    def _end(self, uid: str) -> None:
        task = asyncio.create_task(self._leader.ask(CancelJob(job_uid=uid), "bench", 30.0))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def settle(self) -> None:
        """End no more gangs, and wait for those that are ending."""
        self._is_over = True
        await asyncio.gather(*self._ending, return_exceptions=True)


async def _nodes_ready(store: EtcdStore) -> None:
    supernode = load_machine("cloudmatrix384")
    for node in supernode.node_names():
        health = AgentHealth(node=node)
        registration = AgentRegistration(
            node=node, drivers=("simulated",), host_memory_bytes=supernode.host_memory_bytes
        )
        writes = (
            Put(keys.health(node), wire.encode(keys.health(node), health)),
            Put(keys.registration(node), wire.encode(keys.registration(node), registration)),
        )
        await store.commit(Transaction(writes=writes))


async def gangs_committed() -> dict[str, Any]:
    """`gangs_committed_per_s`."""
    with TemporaryDirectory(prefix="raddle-bench-") as folder:
        etcd = EmbeddedEtcd(Path(folder) / "etcd")
        await etcd.start()
        store = EtcdStore([etcd.endpoint], "default", operation_key="operations/bench")
        await _nodes_ready(store)
        mirror = Mirror(store)
        following = asyncio.create_task(mirror.run())
        await mirror.wait_revision(1)
        record = wire.encode(keys.LEADER, LeaderRecord(identity="bench"))
        term = await Election(store, record, _alive).campaign()
        leader = Leader(store, mirror, term, _NobodyAnswers(), Metrics())
        leading = asyncio.create_task(leader.run())
        try:
            rates = await _measure(leader, mirror)
        finally:
            for task in (leading, following):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await term.lease.revoke()
            await store.close()
            await etcd.stop()
    version = ".".join(map(str, etcd.binary.version))
    return figure(rates, digits=1, etcd=version, running=RUNNING)


async def _measure(leader: Leader, mirror: Mirror) -> list[float]:
    supernode = load_machine("cloudmatrix384")
    await leader.ask(ApplySuperNode(supernode=supernode), "bench", 10.0)
    # Nothing is placed while the gangs are being accepted.
    await leader.ask(Cordon(subject=supernode.name), "bench", 10.0)
    spec = spec_of(GANG)
    for start in range(0, ACCEPTED, 500):
        asks = [
            SubmitJob(spec=replace(spec, name=f"g-{n}"), job_uid=f"j-{n:06d}", spec_digest="d")
            for n in range(start, start + 500)
        ]
        await asyncio.gather(*(leader.ask(ask, "bench", 60.0) for ask in asks))
    say(f"gangs_committed_per_s: {ACCEPTED} gangs are accepted")
    # As the daemon does at the start of each term.
    calm_collector()
    placing = Placing(leader, mirror)
    await leader.ask(Uncordon(subject=supernode.name), "bench", 10.0)
    await asyncio.sleep(1.0)
    rates = []
    for _ in range(WINDOWS):
        before, began = placing.placed, time.monotonic()
        await asyncio.sleep(1.0)
        rates.append((placing.placed - before) / (time.monotonic() - began))
    await placing.settle()
    return rates


def measure() -> dict[str, Any]:
    return {"gangs_committed_per_s": asyncio.run(gangs_committed())}
