"""One simulated node: the real agent over simulated devices and ranks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from raddle.agent.core.events import Event
from raddle.agent.core.machine import AgentMachine
from raddle.agent.engine.driver import EngineDriver
from raddle.agent.health.simulated import SimulatedSource
from raddle.agent.node import NodeAgent, NodeFacts
from raddle.model.health import ActiveFault, FaultLevel, PartIdentity
from raddle.model.topology import SuperNode
from raddle.sim.checks import CheckedBackend
from raddle.sim.findings import Findings
from raddle.sim.ranks import KILLED, Hosts, RankDriver
from raddle.sim.wire import NodeStream, Wire
from raddle.store.memory import MemoryStore

# A hardware fault of level SeparateNPU in the site's tables.
FAULT_CODE = "80E18005"


class CheckedAgentMachine(AgentMachine):
    """The agent's machine, with its invariants checked at every step."""

    def handle(self, events):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        out = super().handle(events)
        self.validate()
        return out


class Devices:
    """A node's dies; they keep their faults whatever becomes of the agent."""

    def __init__(self, source: SimulatedSource) -> None:
        self._source = source
        self._faults: dict[str, ActiveFault] = {}
        self._changed: list[asyncio.Event] = []

    def set_faults(self, dies: Sequence[str], *, present: bool = True) -> None:
        """These dies report a severe fault from now on, or none any more; all in one report."""
        for die in dies:
            self._faults.pop(die, None)
            if present:
                self._faults[die] = ActiveFault(
                    code=FAULT_CODE, subject_kind="die", subject=die, level=FaultLevel.SEPARATE_NPU
                )
        self._tell()

    def heal(self) -> None:
        """No die reports a fault any more."""
        self._faults.clear()
        self._tell()

    def _tell(self) -> None:
        for changed in self._changed:
            changed.set()

    def parts(self) -> tuple[PartIdentity, ...]:
        return self._source.parts()

    async def follow(self) -> AsyncGenerator[tuple[ActiveFault, ...], None]:
        changed = asyncio.Event()
        self._changed.append(changed)
        try:
            while True:
                changed.clear()
                yield tuple(self._faults.values())
                await changed.wait()
        finally:
            self._changed.remove(changed)


class SimulatedNode:
    """A node that can lose its agent, its power, or its way to the store."""

    def __init__(
        self,
        name: str,
        supernode: SuperNode,
        backend: CheckedBackend,
        hosts: Hosts,
        findings: Findings,
        wire: Wire,
        clock: Callable[[], float],
    ) -> None:
        self.name = name
        self._supernode = supernode
        self._backend = backend
        self._hosts = hosts
        self._findings = findings
        self._wire = wire
        self._clock = clock
        self._boots = 0
        self._task: asyncio.Task[None] | None = None
        self.store = MemoryStore(backend, delay=wire.delay)
        self.devices = Devices(SimulatedSource(name, supernode, self.store))

    @property
    def has_agent(self) -> bool:
        return self._task is not None

    def start_agent(self) -> None:
        """A new agent process; it adopts the ranks that run."""
        self._boots += 1
        self.store = MemoryStore(self._backend, delay=self._wire.delay)
        if self._backend.is_away:
            self.store.cut()
        facts = NodeFacts(
            name=self.name,
            version="sim",
            host_memory_bytes=self._supernode.host_memory_bytes,
            boot_id=f"boot-{self._boots}",
        )

        def drivers(tell: Callable[[Event], None]) -> list[EngineDriver]:
            wire = self._wire
            driver = RankDriver(
                self.name, self._hosts, self._findings, tell, wire.delay, wire.start_delay
            )
            return [driver]

        agent = NodeAgent(
            facts,
            self.store,
            self.devices,
            NodeStream(self.name, self._wire),
            drivers,
            clock=self._clock,
            make_machine=CheckedAgentMachine,
        )
        self._task = asyncio.create_task(agent.run(), name=f"agent {self.name}")

    async def kill(self) -> None:
        """SIGKILL of the agent alone: nothing is revoked, its ranks go on."""
        if self._task is None:
            return
        task, self._task = self._task, None
        self.store.cut()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.store.close()

    async def lose_power(self) -> None:
        """The agent and all ranks at once."""
        await self.kill()
        for rank in self._hosts.on(self.name):
            self._hosts.end(rank, KILLED)

    def check(self) -> None:
        """Raise what broke the agent, if anything did."""
        if self._task is not None and self._task.done():
            self._task.result()
