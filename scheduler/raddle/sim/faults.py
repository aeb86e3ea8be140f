"""Faults drawn from the seed, and calm: each is one thing that happens to real clusters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable

from raddle.model.incident import IncidentPhase
from raddle.sim.cluster import SimulatedCluster
from raddle.sim.ranks import KILLED

# Of two faults in a row, this share comes within milliseconds: in the middle of a recovery.
_BURST_SHARE = 0.4
_BURST_MEAN_S = 0.02
_PAUSE_MEAN_S = 2.0
_NODES_DOWN_MAX = 4
# A killed scheduler is started again at once as often as not.
_SUPERVISED_SHARE = 0.5


class Faults:
    """Draws faults for one cluster and counts them by kind and by the phase that they hit."""

    def __init__(self, cluster: SimulatedCluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self.hits: Counter[tuple[str, str]] = Counter()
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "die": self._die,
            "die_heals": self._die_heals,
            "rank": self._rank,
            "agent": self._agent,
            "node": self._node,
            "agents_return": self._agents_return,
            "leader": self._leader,
            "leader_cut": self._leader_cut,
            "agent_cut": self._agent_cut,
            "mend": self._mend,
            "store_elects": self._store_elects,
            "compaction": self._compaction,
        }

    async def strike(self, count: int) -> None:
        """This many faults, some far apart, some in the middle of what the last one caused."""
        for _ in range(count):
            burst = self._rng.random() < _BURST_SHARE
            mean_s = _BURST_MEAN_S if burst else _PAUSE_MEAN_S
            await self._cluster.pass_time(self._rng.expovariate(1 / mean_s))
            kind = self._rng.choice(list(self._kinds))
            self.hits[kind, self._phase()] += 1
            self._cluster.say(f"fault {kind}")
            await self._kinds[kind]()

    def _phase(self) -> str:
        """The phase of the newest open incident, or `calm`."""
        phases = [i.phase for i in self._cluster.backend.incidents()]
        still = [phase for phase in phases if phase is not IncidentPhase.CLOSED]
        return still[-1].lower() if still else "calm"

    async def calm(self) -> None:
        """Everything is repaired and started again; no fault from now on."""
        self._cluster.say("calm")
        for node in self._cluster.nodes.values():
            for die in node.devices.faulty:
                node.devices.set_fault(die, present=False)
        await self._mend()
        await self._agents_return()
        self._schedulers_return()

    # --- one fault each ------------------------------------------------------------------------

    def _some_node(self) -> str:
        return self._rng.choice(list(self._cluster.nodes))

    async def _die(self) -> None:
        busy = sorted(rank.die for rank in self._cluster.hosts.all() if rank.die)
        if busy:
            die = self._rng.choice(busy)
            node = self._cluster.nodes["/".join(die.split("/")[:2])]
            node.devices.set_fault(die, present=True)

    async def _die_heals(self) -> None:
        for node in self._cluster.nodes.values():
            for die in node.devices.faulty:
                node.devices.set_fault(die, present=False)

    async def _rank(self) -> None:
        ranks = self._cluster.hosts.all()
        if ranks:
            self._cluster.hosts.end(self._rng.choice(ranks), KILLED)

    async def _agent(self) -> None:
        await self._cluster.nodes[self._some_node()].kill()

    async def _node(self) -> None:
        down = [node for node in self._cluster.nodes.values() if not node.has_agent]
        if len(down) < _NODES_DOWN_MAX:
            await self._cluster.nodes[self._some_node()].lose_power()

    async def _agents_return(self) -> None:
        for node in self._cluster.nodes.values():
            if not node.has_agent:
                node.start_agent()

    async def _leader(self) -> None:
        for scheduler in self._cluster.schedulers.values():
            if scheduler.leader is not None:
                await scheduler.kill()
                break
        supervised = self._rng.random() < _SUPERVISED_SHARE
        if supervised or not any(s.is_running for s in self._cluster.schedulers.values()):
            self._schedulers_return()

    def _schedulers_return(self) -> None:
        for scheduler in self._cluster.schedulers.values():
            if not scheduler.is_running:
                scheduler.start()

    async def _leader_cut(self) -> None:
        for scheduler in self._cluster.schedulers.values():
            if scheduler.leader is not None:
                scheduler.store.cut()

    async def _agent_cut(self) -> None:
        self._cluster.nodes[self._some_node()].store.cut()

    async def _mend(self) -> None:
        for part in self._cluster.parts():
            part.store.mend()

    async def _store_elects(self) -> None:
        self._cluster.backend.term += 1

    async def _compaction(self) -> None:
        self._cluster.backend.compact(self._cluster.backend.revision)
