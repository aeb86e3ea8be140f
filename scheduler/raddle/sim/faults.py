"""Faults drawn from the seed, and calm: each is one thing that happens to real clusters."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable

from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.model.job import Assignment, AssignmentStage, JobState
from raddle.sim.checks import GARBAGE
from raddle.sim.cluster import SimulatedCluster
from raddle.sim.engine import SimulatedRank
from raddle.sim.ranks import KILLED
from raddle.sim.users import Users
from raddle.wire import records as codec

# Of two faults in a row, this share comes within milliseconds: in the middle of a recovery.
_BURST_SHARE = 0.4
_BURST_MEAN_S = 0.02
_PAUSE_MEAN_S = 2.0
# What takes ranks away is what everything else is about.
_WEIGHTS = {"rank": 4, "die": 3, "dies_of_nodes": 3, "rank_while_others_start": 3, "node": 2}
_NODES_DOWN_MAX = 4
# A killed scheduler is started again at once as often as not.
_SUPERVISED_SHARE = 0.5
# How long the agent of a host that dies a slow death is gone before its ranks.
_HOST_DIES_LATER_S = 8.0
_RESTORED_WITHIN_S = 2.0
_FORGOTTEN_MAX = 10
_MOMENT_S = 0.01
_MOMENTS_MAX = 100
#: Records that may rot: those whose loss the rest of the store, or their writer, makes good.
_MAY_ROT = (
    keys.INCIDENTS,
    keys.ROUTES,
    keys.AUDIT,
    keys.FAULTS,
    keys.ASSIGNMENTS,
    keys.PLACEMENTS,
    keys.EXPERT_MAPS,
    keys.JOBS,
    keys.NAMES,
)


class Faults:
    """Draws faults for one cluster and counts them by kind and by the phase that they hit."""

    def __init__(self, cluster: SimulatedCluster, users: Users, rng: random.Random) -> None:
        self._cluster = cluster
        self._users = users
        self._rng = rng
        #: What records held before they rotted.
        self._rotten: dict[str, bytes] = {}
        self.hits: Counter[tuple[str, str]] = Counter()
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "die": self._die,
            "die_heals": self._die_heals,
            "dies_of_nodes": self._dies_of_nodes,
            "rank": self._rank,
            "rank_while_others_start": self._rank_while_others_start,
            "agent": self._agent,
            "agent_then_host": self._agent_then_host,
            "node": self._node,
            "agents_return": self._agents_return,
            "leader": self._leader,
            "leader_between_parts": self._leader_between_parts,
            "leader_cut": self._leader_cut,
            "agent_cut": self._agent_cut,
            "mend": self._mend,
            "store_elects": self._store_elects,
            "store_away": self._store_away,
            "store_returns": self._store_returns,
            "store_set_back": self._store_set_back,
            "compaction": self._compaction,
            "rot": self._rot,
            **users.kinds,
        }

    async def strike(self, count: int) -> None:
        """This many faults, some far apart, some in the middle of what the last one caused."""
        for _ in range(count):
            burst = self._rng.random() < _BURST_SHARE
            mean_s = _BURST_MEAN_S if burst else _PAUSE_MEAN_S
            await self._cluster.pass_time(self._rng.expovariate(1 / mean_s))
            kind = self._rng.choices(list(self.kinds), [_WEIGHTS.get(k, 1) for k in self.kinds])[0]
            self.hits[kind, self._phase()] += 1
            self._cluster.say(f"fault {kind}")
            await self.kinds[kind]()

    def _phase(self) -> str:
        """The phase of the newest open incident, or `calm`."""
        phases = [i.phase for i in self._cluster.backend.incidents()]
        still = [phase for phase in phases if phase is not IncidentPhase.CLOSED]
        return still[-1].lower() if still else "calm"

    async def calm(self) -> None:
        """Everything is repaired and started again, and users undo what they asked for."""
        self._cluster.say("calm")
        await self._die_heals()
        await self._store_returns()
        await self._mend()
        await self._agents_return()
        self._schedulers_return()
        for scheduler in self._cluster.schedulers.values():
            scheduler.dies_between_parts = False
        await self._repair_records()
        await self._users.undo()

    async def _repair_records(self) -> None:
        """An operator writes what the leader knows, else what a job was; the rest is deleted."""
        cluster, backend = self._cluster, self._cluster.backend
        await cluster.until(lambda: cluster.machine is not None, "a scheduler leads")
        assert cluster.machine is not None
        known = cluster.machine.context.state.records
        for key in sorted(backend.records):
            if backend.records[key].value != GARBAGE:
                continue
            data = codec.encode(key, known[key]) if key in known else None
            if data is None and key.startswith(keys.JOBS):
                data = self._rotten[key]
            backend.overwrite(key, data)

    # --- dies, ranks and nodes -----------------------------------------------------------------

    def _some_node(self) -> str:
        return self._rng.choice(list(self._cluster.nodes))

    async def _die(self) -> None:
        busy = sorted(rank.die for rank in self._cluster.hosts.all() if rank.die)
        if busy:
            die = self._rng.choice(busy)
            self._cluster.nodes["/".join(die.split("/")[:2])].devices.set_faults([die])

    async def _die_heals(self) -> None:
        for node in self._cluster.nodes.values():
            node.devices.heal()

    async def _dies_of_nodes(self) -> None:
        """What cools some nodes fails: many jobs, one incident."""
        for node in self._rng.sample(list(self._cluster.nodes), self._rng.randint(1, 3)):
            dies = sorted(rank.die for rank in self._cluster.hosts.on(node) if rank.die)
            self._cluster.nodes[node].devices.set_faults(dies)

    async def _rank(self) -> None:
        self._kill_one(self._cluster.hosts.all())

    def _kill_one(self, ranks: list[SimulatedRank]) -> None:
        if ranks:
            self._cluster.hosts.end(self._rng.choice(ranks), KILLED)

    async def _rank_while_others_start(self) -> None:
        """A rank is replaced; before the new process is up, another rank of the job goes."""
        ready = {j.uid for j in self._cluster.backend.jobs() if j.state is JobState.READY}
        ranks = [rank for rank in self._cluster.hosts.all() if rank.job_uid in ready]
        if not ranks:
            return
        first = self._rng.choice(ranks)
        self._cluster.hosts.end(first, KILLED)
        for _ in range(_MOMENTS_MAX):
            await self._cluster.pass_time(_MOMENT_S)
            if self._starts(first.job_uid):
                break
        mine = [r for r in self._cluster.hosts.all() if r.job_uid == first.job_uid]
        self._kill_one(mine)

    def _starts(self, job_uid: str) -> bool:
        assignments: list[Assignment] = self._cluster.backend.values(keys.ASSIGNMENTS)
        return any(
            item.job_uid == job_uid and item.stage is AssignmentStage.START
            for assignment in assignments
            for item in assignment.jobs
        )

    async def _agent(self) -> None:
        await self._cluster.nodes[self._some_node()].kill()

    def _may_lose_a_node(self) -> bool:
        down = [node for node in self._cluster.nodes.values() if not node.has_agent]
        return len(down) < _NODES_DOWN_MAX

    async def _agent_then_host(self) -> None:
        """An agent dies and its ranks answer; a while later the whole host is gone."""
        if not self._may_lose_a_node():
            return
        name = self._some_node()
        await self._cluster.nodes[name].kill()
        later_s = self._rng.uniform(0.0, _HOST_DIES_LATER_S)
        self._cluster.go(self._host_dies(name, later_s))

    async def _host_dies(self, name: str, later_s: float) -> None:
        await self._cluster.pass_time(later_s)
        node = self._cluster.nodes[name]
        if not node.has_agent:
            self._cluster.say(f"host {name} dies after its agent")
            await node.lose_power()

    async def _node(self) -> None:
        if self._may_lose_a_node():
            await self._cluster.nodes[self._some_node()].lose_power()

    async def _agents_return(self) -> None:
        for node in self._cluster.nodes.values():
            if not node.has_agent:
                node.start_agent()

    async def _agent_cut(self) -> None:
        self._cluster.nodes[self._some_node()].store.cut()

    # --- schedulers ----------------------------------------------------------------------------

    async def _leader(self) -> None:
        for scheduler in self._cluster.schedulers.values():
            if scheduler.leader is not None:
                await scheduler.kill()
                break
        supervised = self._rng.random() < _SUPERVISED_SHARE
        if supervised or not any(s.is_running for s in self._cluster.schedulers.values()):
            self._schedulers_return()

    async def _leader_between_parts(self) -> None:
        """Whoever leads ends between two commits of the next decision that has several."""
        for scheduler in self._cluster.schedulers.values():
            scheduler.dies_between_parts = True

    def _schedulers_return(self) -> None:
        for scheduler in self._cluster.schedulers.values():
            if not scheduler.is_running:
                scheduler.start()

    async def _leader_cut(self) -> None:
        for scheduler in self._cluster.schedulers.values():
            if scheduler.leader is not None:
                scheduler.store.cut()

    # --- the store -----------------------------------------------------------------------------

    async def _mend(self) -> None:
        """Whoever was cut off alone finds the way again."""
        if not self._cluster.backend.is_away:
            for store in self._cluster.stores():
                store.mend()

    async def _store_elects(self) -> None:
        self._cluster.backend.term += 1

    async def _store_away(self) -> None:
        self._cluster.backend.go_away()
        for store in self._cluster.stores():
            store.cut()

    async def _store_returns(self) -> None:
        if self._cluster.backend.is_away:
            self._cluster.backend.come_back()
            await self._mend()

    async def _store_set_back(self) -> None:
        """The store is lost and restored from a state of some decisions ago."""
        await self._store_away()
        await self._cluster.pass_time(self._rng.uniform(0.0, _RESTORED_WITHIN_S))
        forgotten = self._cluster.backend.set_back(self._rng.randint(0, _FORGOTTEN_MAX))
        self._cluster.say(f"{forgotten} revisions are forgotten")
        await self._store_returns()

    async def _compaction(self) -> None:
        self._cluster.backend.compact(self._cluster.backend.revision)

    async def _rot(self) -> None:
        """One record cannot be read any more."""
        backend = self._cluster.backend
        found = [key for key in sorted(backend.records) if key.startswith(_MAY_ROT)]
        sound = [key for key in found if backend.records[key].value != GARBAGE]
        if sound and not backend.is_away:
            key = self._rng.choice(sound)
            self._cluster.say(f"rot {key}")
            self._rotten[key] = backend.corrupt(key)
