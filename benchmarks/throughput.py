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

ETCD = "3.7.3"
ACCEPTED = 16_000
WINDOWS = 10
WINDOW_S = 1.0
USE_EVERY_S = 0.02
GANG_DIES = 8
# What waits takes every die that it may take. So that the use stays near 90 %, it may take those of
# 43 of the 48 nodes: 86 gangs.
NODES_KEPT_FREE = 5
# What is over that is told to end: ten gangs are always on their way out.
RUNNING = 76


class _NobodyAnswers:
    """There are no ranks: nothing starts the gangs, they are placed and end again."""

    async def node(self, probe: ProbeNode) -> NodeProbed:
        return NodeProbed(probe.node, answered=True)

    async def rank(self, probe: ProbeRank) -> RankProbed:
        return RankProbed(probe.job_uid, probe.incarnation, answered=True)


async def _alive(_record: Record) -> Probe:
    return Probe.ALIVE


class Placing:
    """Counts placements and releases as they are committed, and ends the oldest gangs."""

    def __init__(self, leader: Leader, mirror: Mirror) -> None:
        self._leader = leader
        self._running: dict[str, None] = {}
        self._ending: set[asyncio.Task[Any]] = set()
        #: Gangs that were placed; a set, so that none counts twice.
        self.placed: set[str] = set()
        #: Gangs whose placement is in the store, and of those that were, how many are not any more.
        self.holding: set[str] = set()
        self.released = 0
        self._is_over = False
        mirror.listen(self._changed)

    def _changed(self, key: str, value: Any, _revision: int) -> None:
        if key.startswith(keys.PLACEMENTS):
            self._placement_changed(key.removeprefix(keys.PLACEMENTS), is_there=value is not None)
        elif key.startswith(keys.JOBS) and value is not None and value.state is JobState.STARTING:
            if value.uid in self.placed:
                # A commit's echo may come before its answer: the mirror tells of both.
                return
            self.placed.add(value.uid)
            self._running[value.uid] = None
            while len(self._running) > RUNNING and not self._is_over:
                uid = next(iter(self._running))
                del self._running[uid]
                asyncio.get_running_loop().call_soon(self._end, uid)

    def _placement_changed(self, uid: str, *, is_there: bool) -> None:
        if is_there:
            self.holding.add(uid)
        elif uid in self.holding:
            self.holding.remove(uid)
            self.released += 1

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
        version = ".".join(map(str, etcd.binary.version))
        if version != ETCD:
            raise SystemExit(
                f"gangs_committed_per_s is defined on etcd {ETCD}, and {etcd.binary.path} is"
                f" {version}: run `make tools` and unset RADDLE_ETCD."
            )
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
            rates, more = await _measure(leader, mirror)
        finally:
            for task in (leading, following):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await term.lease.revoke()
            await store.close()
            await etcd.stop()
    return figure(rates, digits=1, etcd=version, **more)


async def _measure(leader: Leader, mirror: Mirror) -> tuple[list[float], dict[str, Any]]:
    """Gangs a second in each window; what was released, and how full the machine was."""
    supernode = load_machine("cloudmatrix384")
    await leader.ask(ApplySuperNode(supernode=supernode), "bench", 10.0)
    # Nothing is placed while the gangs are being accepted.
    for subject in (supernode.name, *list(supernode.node_names())[:NODES_KEPT_FREE]):
        await leader.ask(Cordon(subject=subject), "bench", 10.0)
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
    rates: list[float] = []
    use_percent: list[float] = []
    released = placing.released
    for _ in range(WINDOWS):
        before, began = len(placing.placed), time.monotonic()
        while (left_s := began + WINDOW_S - time.monotonic()) > 0:
            use_percent.append(len(placing.holding) * GANG_DIES / supernode.dies * 100)
            await asyncio.sleep(min(USE_EVERY_S, left_s))
        rates.append((len(placing.placed) - before) / (time.monotonic() - began))
    released = placing.released - released
    await placing.settle()
    assert len(placing.placed) - placing.released == len(placing.holding)
    return rates, {"released": released, "use_percent": figure(use_percent, digits=1)}


def measure() -> dict[str, Any]:
    return {"gangs_committed_per_s": asyncio.run(gangs_committed())}
