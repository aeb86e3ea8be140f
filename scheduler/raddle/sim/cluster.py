"""A whole cluster in one process: store, replicas, agents, ranks and a front door, in virtual time.

Everything but devices, ranks and the wire is the real code. All randomness comes from one seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from raddle.core.requests import ApplySuperNode, Request
from raddle.model import keys
from raddle.model.errors import TemporaryError
from raddle.model.incident import LeaderRecord
from raddle.model.topology import SuperNode
from raddle.sim.checks import CheckedBackend
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
_RETRY_S = 0.1


class SimulatedCluster:
    """Describe it with a machine and a seed, then `await start()`."""

    def __init__(self, supernode: SuperNode, rng: random.Random) -> None:
        self.supernode = supernode
        self.trace: list[str] = []
        self.backend = CheckedBackend(self.trace.append)
        self.wire = Wire(random.Random(rng.random()))
        self.hosts = Hosts(self.say)
        self._clocks = random.Random(rng.random())
        self.nodes = {
            name: SimulatedNode(
                name, supernode, self.backend, self.hosts, self.wire, self._skewed_clock()
            )
            for name in supernode.node_names()
        }
        self.schedulers = {
            name: SimulatedScheduler(
                name, self.backend, self.hosts, self.wire, self._probe, self._skewed_clock()
            )
            for name in [f"scheduler-{number}" for number in range(REPLICAS)]
        }
        store = MemoryStore(self.backend, delay=self.wire.delay)
        self.front_door = SimulatedFrontDoor(store, self.wire)
        self._door_task: asyncio.Task[None] | None = None

    def say(self, what: str) -> None:
        """One line of the trace, and one step: every part still works."""
        self.trace.append(f"{asyncio.get_running_loop().time():.6f} {what}")

    def _skewed_clock(self) -> Callable[[], float]:
        base_s = _EPOCH_S + self._clocks.uniform(-CLOCK_SKEW_MAX_S, CLOCK_SKEW_MAX_S)
        return lambda: base_s + asyncio.get_running_loop().time()

    def _probe(self, asking: SimulatedScheduler, leader: LeaderRecord) -> Probe:
        asked = self.schedulers[leader.identity]
        if not asked.is_running or asked.incarnation != leader.incarnation:
            return Probe.GONE
        return Probe.SILENT if asked.store.is_cut or asking.store.is_cut else Probe.ALIVE

    def parts(self) -> list[SimulatedScheduler | SimulatedNode]:
        """Everything that can be killed, cut off and mended."""
        return [*self.schedulers.values(), *self.nodes.values()]

    async def start(self) -> None:
        for scheduler in self.schedulers.values():
            scheduler.start()
        for node in self.nodes.values():
            node.start_agent()
        self._door_task = asyncio.create_task(self.front_door.run(), name="front door")
        await self.ask(ApplySuperNode(supernode=self.supernode))
        await self.until(self._has_health, "all agents report")

    def _has_health(self) -> bool:
        return all(keys.health(name) in self.backend.records for name in self.nodes)

    async def ask(self, request: Request) -> Any:
        """Ask whoever leads until it is answered; refusals are raised."""
        while True:
            try:
                if self.wire.leader is not None:
                    return await self.wire.leader.ask(request, "client/sim", _ASK_TIMEOUT_S)
            except TemporaryError as error:
                self.say(f"asked in vain: {error.reason}")
            await asyncio.sleep(_RETRY_S)

    async def until(self, condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        """Let virtual time pass until a condition holds.

        Raises:
            AssertionError: it did not within the limit.
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
        for part in self.parts():
            part.check()
        if self._door_task is not None and self._door_task.done():
            self._door_task.result()

    async def stop(self) -> None:
        for part in self.parts():
            await part.kill()
        if self._door_task is not None:
            self._door_task.cancel()
            await asyncio.gather(self._door_task, return_exceptions=True)
