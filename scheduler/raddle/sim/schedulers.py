"""Simulated scheduler replicas: the real mirror, election, leader loop and core."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raddle.core.events import Event
from raddle.core.instructions import Commit, Instruction
from raddle.core.invariants import check_step, placements
from raddle.core.machine import Machine
from raddle.model import keys
from raddle.model.incident import LeaderRecord
from raddle.scheduler.campaign import campaign
from raddle.scheduler.leader import Leader
from raddle.scheduler.metrics import Metrics
from raddle.scheduler.mirror import Mirror
from raddle.sim.checks import CheckedBackend
from raddle.sim.findings import Findings
from raddle.sim.ranks import Hosts
from raddle.sim.wire import HostsProber, Wire
from raddle.store.election import Election, Probe, Term
from raddle.store.memory import MemoryStore
from raddle.store.protocol import CommitResult, Record, Transaction
from raddle.wire import records as codec


class CheckedMachine(Machine):
    """The decision core, with the design's invariants checked after every decision."""

    def __init__(
        self,
        records: Mapping[str, Any],
        *,
        now: float,
        term: int,
        findings: Findings,
        decided: Callable[[int], None],
    ) -> None:
        super().__init__(records, now=now, term=term)
        self._findings = findings
        #: Told how many transactions each decision is made of.
        self._decided = decided

    def handle(self, events: Sequence[Event], *, now: float) -> list[Instruction]:
        before = placements(self.context)
        out = super().handle(events, now=now)
        try:
            self.validate()
            check_step(self.context, before)
        except AssertionError as error:
            self._findings.broke(str(error))
            raise
        self._decided(sum(isinstance(instruction, Commit) for instruction in out))
        return out


class SchedulersStore(MemoryStore):
    """A scheduler's way to the store; its process can be made to end between two commits."""

    def __init__(self, backend: CheckedBackend, wire: Wire) -> None:
        super().__init__(backend, delay=wire.delay)
        if backend.is_away:
            self.cut()
        #: Called after each commit, before its answer is on the way.
        self.after_commit: Callable[[], None] = lambda: None

    async def commit(self, transaction: Transaction, *, timeout_s: float = 5.0) -> CommitResult:
        result = await super().commit(transaction, timeout_s=timeout_s)
        self.after_commit()
        return result


class SimulatedScheduler:
    """One replica that can be killed, started again, and cut off from its neighbours."""

    def __init__(
        self,
        identity: str,
        backend: CheckedBackend,
        hosts: Hosts,
        findings: Findings,
        wire: Wire,
        probe: Callable[[SimulatedScheduler, LeaderRecord], Probe],
        clock: Callable[[], float],
    ) -> None:
        self.identity = identity
        self._backend = backend
        self._hosts = hosts
        self._findings = findings
        self._wire = wire
        self._probe_of = probe
        self._clock = clock
        self._metrics = Metrics()
        self._tasks: list[asyncio.Task[None]] = []
        self._killing: asyncio.Task[None] | None = None
        self._parts_left = 0
        self.store = SchedulersStore(backend, wire)
        #: The machine of the running term.
        self.machine: Machine | None = None
        #: End the process between two commits of the next decision that has several.
        self.dies_between_parts = False
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
        self.store = SchedulersStore(self._backend, self._wire)
        self.store.after_commit = self._committed
        mirror = Mirror(self.store)
        self.starts += 1
        record = LeaderRecord(
            identity=self.identity,
            address=self.identity,
            version="sim",
            incarnation=self.incarnation,
        )
        election = Election(self.store, codec.encode("leader", record), self._probe)

        def make_leader(won: Term) -> Leader:
            def make_machine(records: Mapping[str, Any], *, now: float, term: int) -> Machine:
                self._require_caught_up(mirror, won)
                self.machine = CheckedMachine(
                    records,
                    now=now,
                    term=term,
                    findings=self._findings,
                    decided=self._has_decided,
                )
                return self.machine

            prober = HostsProber(self._hosts, self._wire, lambda: not self.store.is_cut)
            return Leader(
                self.store,
                mirror,
                won,
                prober,
                self._metrics,
                clock=self._clock,
                make_machine=make_machine,
            )

        campaigning = campaign(self.store, mirror, election, make_leader, self._leads)
        self._tasks = [
            asyncio.create_task(mirror.run(), name=f"mirror {self.identity}"),
            asyncio.create_task(campaigning, name=f"campaign {self.identity}"),
        ]

    def _require_caught_up(self, mirror: Mirror, term: Term) -> None:
        """As long as we lead nobody else writes a leader's records: ours must be the store's."""
        leader = self._backend.records.get(keys.LEADER)
        if leader is None or leader.mod_revision != term.fence.mod_revision:
            return
        for key, record in self._backend.records.items():
            if not key.startswith((keys.AGENTS, keys.OPERATIONS)):
                self._findings.require(
                    mirror.mod_revision(key) == record.mod_revision,
                    f"{self.identity} decides without the store's newest {key}",
                )

    def _has_decided(self, commits: int) -> None:
        self._parts_left = commits if self.dies_between_parts else 0

    def _committed(self) -> None:
        """One part of a decision is in the store; with others to come, it may be our last deed."""
        self._parts_left -= 1
        if self._parts_left > 0 and self.dies_between_parts:
            self.dies_between_parts = False
            self._findings.say(f"{self.identity} dies between two parts of a decision")
            self.store.cut()
            self._killing = asyncio.create_task(self.kill())

    async def _leads(self, leader: Leader | None) -> None:
        self.terms += leader is not None
        self._wire.leads(self.identity, leader)
        self.leader = leader

    async def _probe(self, record: Record) -> Probe:
        await self._wire.delay()
        leader: LeaderRecord = codec.decode("leader", record.value)
        return self._probe_of(self, leader)

    async def kill(self) -> None:
        """SIGKILL: nothing is resigned or revoked."""
        self.machine = None
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
