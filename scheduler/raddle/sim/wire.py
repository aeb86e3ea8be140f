"""The fake wire: calls with drawn delays, agents' streams to the leader, the leader's own calls."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from raddle.core.events import AgentStreamBroken, AgentStreamOpened, NodeProbed, RankProbed
from raddle.core.instructions import ProbeNode, ProbeRank
from raddle.model import keys
from raddle.scheduler.leader import Leader
from raddle.sim.ranks import Hosts
from raddle.store.memory import MemoryBackend
from raddle.wire import records as codec

_DELAY_MIN_S = 0.0002
_DELAY_MAX_S = 0.004
# One message of a hundred is slow: lost packets, a busy host.
_SLOW_SHARE = 0.01
_SLOW_MAX_S = 0.3
# A process needs a while until it answers: long enough for more to happen meanwhile.
_START_MIN_S = 0.05
_START_MAX_S = 0.8


class Wire:
    """Delays of one simulation, and who leads as the store's record says to everybody."""

    def __init__(self, backend: MemoryBackend, rng: random.Random) -> None:
        self._backend = backend
        self._rng = rng
        #: Those who think that they lead, by identity.
        self._leaders: dict[str, Leader] = {}
        self._told: Leader | None = None
        self._changed = asyncio.Event()
        backend.on_change(self._look)

    async def delay(self) -> None:
        """One message on its way."""
        longest_s = _SLOW_MAX_S if self._rng.random() < _SLOW_SHARE else _DELAY_MAX_S
        await asyncio.sleep(self._rng.uniform(_DELAY_MIN_S, longest_s))

    async def start_delay(self) -> None:
        """A process comes up."""
        await asyncio.sleep(self._rng.uniform(_START_MIN_S, _START_MAX_S))

    @property
    def leader(self) -> Leader | None:
        record = self._backend.records.get(keys.LEADER)
        if record is None:
            return None
        return self._leaders.get(codec.decode(record.key, record.value).identity)

    def leads(self, identity: str, leader: Leader | None) -> None:
        """A replica begins or ends a term."""
        self._leaders.pop(identity, None)
        if leader is not None:
            self._leaders[identity] = leader
        self._look()

    def _look(self) -> None:
        leader = self.leader
        if leader is not self._told:
            self._told = leader
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    async def wait_change(self) -> None:
        await self._changed.wait()


class NodeStream:
    """One node's stream to whoever leads; its end is told to the leader that it was open to."""

    def __init__(self, node: str, wire: Wire) -> None:
        self._node = node
        self._wire = wire

    async def run(self) -> None:
        while True:
            leader = self._wire.leader
            moved = asyncio.create_task(self._wire.wait_change())
            await self._wire.delay()
            if leader is not None:
                leader.tell(AgentStreamOpened(self._node))
            try:
                await moved
            finally:
                moved.cancel()
                if leader is not None:
                    leader.tell(AgentStreamBroken(self._node))


class HostsProber:
    """The leader's own calls: a rank answers as long as its process lives and is reachable."""

    def __init__(self, hosts: Hosts, wire: Wire, reachable: Callable[[], bool]) -> None:
        self._hosts = hosts
        self._wire = wire
        self._reachable = reachable

    async def node(self, probe: ProbeNode) -> NodeProbed:
        await self._wire.delay()
        answered = any(self._answers(incarnation) for _, incarnation in probe.ranks)
        return NodeProbed(probe.node, answered)

    async def rank(self, probe: ProbeRank) -> RankProbed:
        await self._wire.delay()
        return RankProbed(probe.job_uid, probe.incarnation, self._answers(probe.incarnation))

    def _answers(self, incarnation: str) -> bool:
        return self._reachable() and self._hosts.living(incarnation) is not None
