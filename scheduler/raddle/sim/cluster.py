"""A whole cluster in one process: store, replicas, agents, ranks and a front door, in virtual time.

Everything but devices, ranks and the wire is the real code. All randomness comes from one seed.
Every wait ends: with what was waited for, with what broke, or with a sentence at its limit.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

from raddle.core.machine import Machine
from raddle.core.requests import ApplySuperNode, Request
from raddle.model import keys
from raddle.model.errors import TemporaryError
from raddle.model.incident import LeaderRecord
from raddle.model.topology import SuperNode
from raddle.sim.checks import CheckedBackend
from raddle.sim.findings import Findings
from raddle.sim.front_door import SimulatedFrontDoor
from raddle.sim.nodes import SimulatedNode
from raddle.sim.ranks import Hosts
from raddle.sim.schedulers import SimulatedScheduler
from raddle.sim.wire import Wire
from raddle.store.election import Probe
from raddle.store.memory import MemoryStore

REPLICAS = 3
# Clocks of hosts differ by minutes: nothing may compare two of them.
CLOCK_SKEW_MAX_S = 300.0
_EPOCH_S = 1_800_000_000.0
_ASK_TIMEOUT_S = 5.0
# No drawn trouble lasts as long as this; who is not answered by then never will be.
ANSWER_MAX_S = 300.0
_RETRY_S = 0.1


class SimulatedCluster:
    """Describe it with a machine and a seed, then `await start()`."""

    def __init__(self, supernode: SuperNode, rng: random.Random) -> None:
        self.supernode = supernode
        self.supernode_dies = [supernode.die_position(die) for die in range(supernode.dies)]
        self.findings = Findings()
        self.hosts = Hosts(self.findings)
        self.backend = CheckedBackend(self.findings, self.hosts)
        self.wire = Wire(self.backend, random.Random(rng.random()))
        self._clocks = random.Random(rng.random())
        parts = (self.backend, self.hosts, self.findings, self.wire)
        self.nodes = {
            name: SimulatedNode(name, supernode, *parts, self._skewed_clock())
            for name in supernode.node_names()
        }
        self.schedulers = {
            name: SimulatedScheduler(name, *parts, self._probe, self._skewed_clock())
            for name in [f"scheduler-{number}" for number in range(REPLICAS)]
        }
        self.doors_store = MemoryStore(self.backend, delay=self.wire.delay)
        self.front_door = SimulatedFrontDoor(self.doors_store, self.wire)
        #: The front door, and users who wait for an answer.
        self._tasks: list[asyncio.Task[None]] = []

    def say(self, what: str) -> None:
        self.findings.say(what)

    def _skewed_clock(self) -> Callable[[], float]:
        base_s = _EPOCH_S + self._clocks.uniform(-CLOCK_SKEW_MAX_S, CLOCK_SKEW_MAX_S)
        return lambda: base_s + asyncio.get_running_loop().time()

    def _probe(self, asking: SimulatedScheduler, leader: LeaderRecord) -> Probe:
        asked = self.schedulers[leader.identity]
        if not asked.is_running or asked.incarnation != leader.incarnation:
            return Probe.GONE
        return Probe.SILENT if asked.store.is_cut or asking.store.is_cut else Probe.ALIVE

    def parts(self) -> list[SimulatedScheduler | SimulatedNode]:
        """Everything that can be killed and cut off."""
        return [*self.schedulers.values(), *self.nodes.values()]

    def stores(self) -> list[MemoryStore]:
        """Everybody's way to the store."""
        return [self.doors_store, *(part.store for part in self.parts())]

    @property
    def leader(self) -> SimulatedScheduler | None:
        """The replica that leads, as far as agents can tell."""
        for scheduler in self.schedulers.values():
            if scheduler.leader is not None and scheduler.leader is self.wire.leader:
                return scheduler
        return None

    @property
    def machine(self) -> Machine | None:
        """The decision core of the replica that leads."""
        leader = self.leader
        return leader.machine if leader is not None else None

    async def start(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.start()
        for node in self.nodes.values():
            node.start_agent()
        self.go(self.front_door.run())
        await self.ask(ApplySuperNode(supernode=self.supernode))
        await self.until(self._has_health, "all agents report")
        self.backend.forget_past()

    def _has_health(self) -> bool:
        return all(keys.health(name) in self.backend.records for name in self.nodes)

    def go(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something run beside; what breaks it breaks the simulation."""
        self._tasks.append(asyncio.create_task(work))

    @property
    def waiting(self) -> int:
        """Users who have not been answered yet; the front door is none of them."""
        return sum(not task.done() for task in self._tasks) - 1

    async def ask(self, request: Request) -> Any:
        """Ask whoever leads until it is answered; refusals are raised.

        Raises:
            AssertionError: something broke, or nobody answered within `ANSWER_MAX_S`.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + ANSWER_MAX_S
        while True:
            try:
                if self.wire.leader is not None:
                    return await self.wire.leader.ask(request, "client/sim", _ASK_TIMEOUT_S)
            except TemporaryError as error:
                self.say(f"asked in vain: {error.reason}")
            self.findings.require(
                loop.time() < end_s,
                f"nobody answered {type(request).__name__} within {ANSWER_MAX_S:g} virtual s",
            )
            await self.pass_time(_RETRY_S)

    async def until(self, condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        """Let virtual time pass until a condition holds.

        Raises:
            AssertionError: it did not within the limit, or something broke.
        """
        loop = asyncio.get_running_loop()
        end_s = loop.time() + limit_s
        while not condition():
            assert loop.time() < end_s, f"not within {limit_s:g} virtual s: {what}"
            await self.pass_time(_RETRY_S)

    async def pass_time(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.check()

    def check(self) -> None:
        """Raise whatever broke a part of the cluster."""
        self.findings.check()
        for part in self.parts():
            part.check()
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        for part in self.parts():
            await part.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
