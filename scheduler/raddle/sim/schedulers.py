"""Simulated scheduler replicas: the real mirror, election, leader loop and core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raddle.core.machine import Machine
from raddle.model.incident import LeaderRecord
from raddle.scheduler.campaign import campaign
from raddle.scheduler.leader import Leader
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.sim.ranks import Hosts
from raddle.sim.wire import HostsProber, Wire
from raddle.store.election import Election, Probe, Term
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Record
from raddle.wire import records as codec


class CheckedMachine(Machine):
    """The decision core, with the design's invariants checked after every decision."""

    def handle(self, events, *, now):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        out = super().handle(events, now=now)
        self.validate()
        return out


class SimulatedScheduler:
    """One replica that can be killed, started again, and cut off from its neighbours."""

    def __init__(
        self,
        identity: str,
        backend: MemoryBackend,
        hosts: Hosts,
        wire: Wire,
        probe: Callable[[SimulatedScheduler, LeaderRecord], Probe],
        clock: Callable[[], float],
    ) -> None:
        self.identity = identity
        self._backend = backend
        self._hosts = hosts
        self._wire = wire
        self._probe_of = probe
        self._clock = clock
        self._metrics = Metrics()
        self._tasks: list[asyncio.Task[None]] = []
        self.store = MemoryStore(backend, delay=wire.delay)
        self.terms = 0
        self.starts = 0
        self.leader: Leader | None = None

    @property
    def incarnation(self) -> str:
        """Names one process of this replica."""
        return f"{self.identity}-{self.starts}"

    @property
    def is_running(self) -> bool:
        return bool(self._tasks)

    def start(self) -> None:
        self.store = MemoryStore(self._backend, delay=self._wire.delay)
        mirror = Mirror(self.store)
        self.starts += 1
        record = LeaderRecord(
            identity=self.identity,
            address=self.identity,
            version="sim",
            incarnation=self.incarnation,
        )
        election = Election(self.store, codec.encode("leader", record), self._probe)

        def make_leader(term: Term) -> Leader:
            prober = HostsProber(self._hosts, self._wire, lambda: not self.store.is_cut)
            return Leader(
                self.store,
                mirror,
                term,
                prober,
                self._metrics,
                clock=self._clock,
                make_machine=CheckedMachine,
            )

        campaigning = campaign(self.store, mirror, election, make_leader, self._leads)
        self._tasks = [
            asyncio.create_task(mirror.run(), name=f"mirror {self.identity}"),
            asyncio.create_task(campaigning, name=f"campaign {self.identity}"),
        ]

    async def _leads(self, leader: Leader | None) -> None:
        if leader is not None:
            self.terms += 1
            self._wire.leads(leader)
        elif self._wire.leader is self.leader:
            self._wire.leads(None)
        self.leader = leader

    async def _probe(self, record: Record) -> Probe:
        await self._wire.delay()
        leader: LeaderRecord = codec.decode("leader", record.value)
        return self._probe_of(self, leader)

    async def kill(self) -> None:
        """SIGKILL: nothing is resigned or revoked."""
        tasks, self._tasks = self._tasks, []
        self.store.cut()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.store.close()

    def check(self) -> None:
        """Raise what broke the replica, if anything did."""
        unforeseen = self._metrics.registry.get_sample_value("raddle_unforeseen_errors_total")
        assert not unforeseen, f"{self.identity}: {unforeseen} requests met a mistake"
        for task in self._tasks:
            if task.done():
                task.result()
