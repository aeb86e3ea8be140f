"""Simulated rank processes on their hosts, and the driver through which an agent commands them.

They outlive their agent and end with their node. Living peers that serve notice the end of a rank
a little later and say so through their agents, as real ones do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from raddle.agent.core.events import (
    Drive,
    DriveFailed,
    Driven,
    PeerSuspected,
    RankExited,
    RankStarted,
    StartRank,
    StopRank,
)
from raddle.agent.engine.driver import JobContext, Tell
from raddle.model.health import RankStage
from raddle.model.job import AssignmentStage, JobAssignment, RankAssignment
from raddle.model.types import RankKey
from raddle.sim.engine import Refused, SimulatedRank
from raddle.sim.findings import Findings

KILLED = -9
# What a broken connection takes to be noticed.
_NOTICE_S = 0.002
_RETRY_S = 0.1
Slot = tuple[str, RankKey, int]
Delay = Callable[[], Awaitable[None]]


class Hosts:
    """All rank processes of the machine, and the agents' drivers that watch them."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._ranks: dict[str, SimulatedRank] = {}
        self._drivers: dict[str, RankDriver] = {}
        self._started = 0

    def on(self, node: str) -> list[SimulatedRank]:
        return [rank for rank in self._ranks.values() if rank.node == node]

    def all(self) -> list[SimulatedRank]:
        return list(self._ranks.values())

    def living(self, incarnation: str) -> SimulatedRank | None:
        return self._ranks.get(incarnation)

    def at(self, address: str) -> SimulatedRank | None:
        """The living process that listens there."""
        return self._ranks.get(address.rpartition(":")[2])

    def attach(self, driver: RankDriver) -> None:
        self._drivers[driver.node] = driver

    def detach(self, driver: RankDriver) -> None:
        if self._drivers.get(driver.node) is driver:
            del self._drivers[driver.node]

    def start(self, node: str, slot: Slot, die: str) -> SimulatedRank:
        """A new process: at the epoch that started it, without members, maps or experts."""
        self._started += 1
        job_uid, key, start_count = slot
        name = f"{job_uid}-{key.role}-{key.instance}-{key.rank}-{start_count}-{self._started}"
        rank = SimulatedRank(node, job_uid, key, start_count, die, name, start_count)
        self._ranks[name] = rank
        self._findings.say(f"rank {name} starts on {die or node}")
        return rank

    def end(self, rank: SimulatedRank, exit_code: int) -> None:
        """The process is gone; its agent sees it at once, its peers a little later."""
        if not rank.alive:
            return
        rank.alive = False
        del self._ranks[rank.incarnation]
        self._findings.say(f"rank {rank.incarnation} ends with {exit_code}")
        driver = self._drivers.get(rank.node)
        if driver is not None:
            driver.tell_exit(rank, exit_code)
        asyncio.get_running_loop().call_later(_NOTICE_S, self._notice)

    def _notice(self) -> None:
        for rank in self.all():
            if rank.stage is RankStage.LIVE:
                self.connect(rank)

    def connect(self, rank: SimulatedRank) -> None:
        """A rank that serves talks to its peers: what it cannot reach it reports, once."""
        for peer in rank.peers():
            if self.at(peer.engine_address) is None and peer.incarnation not in rank.suspicions:
                rank.suspect(peer)
                self._findings.say(f"rank {rank.incarnation} lost {peer.incarnation or peer.rank}")
        self.report(rank)

    def report(self, rank: SimulatedRank) -> None:
        """Tell its agent whom the rank lost."""
        driver = self._drivers.get(rank.node)
        if driver is not None:
            driver.tell_suspicions(rank)


class _Gone(Exception):  # noqa: N818 - an event of a process's life, not a mistake
    """The process ended; its agent has been told."""


class RankDriver:
    """The engine driver of one node's agent over `Hosts`."""

    name = "simulated"
    needs_context = True
    verbs: tuple[str, ...] = ()

    def __init__(
        self, node: str, hosts: Hosts, findings: Findings, tell: Tell, delay: Delay, start: Delay
    ) -> None:
        self.node = node
        self._hosts = hosts
        self._findings = findings
        self._tell = tell
        #: One call to a rank; the start of a process.
        self._delay = delay
        self._start_delay = start
        self._unwanted: set[Slot] = set()

    async def adopt(self) -> None:
        self._hosts.attach(self)
        for rank in self._hosts.on(self.node):
            self._tell_started(rank)

    def _tell_started(self, rank: SimulatedRank) -> None:
        self._tell(
            RankStarted(
                rank.job_uid,
                rank.key,
                rank.start_count,
                rank.die,
                rank.incarnation,
                rank.address,
                rank.address,
                rank.epoch,
            )
        )
        self.tell_suspicions(rank)

    def _find(self, slot: Slot) -> SimulatedRank | None:
        for rank in self._hosts.on(self.node):
            if (rank.job_uid, rank.key, rank.start_count) == slot:
                return rank
        return None

    def tell_exit(self, rank: SimulatedRank, exit_code: int) -> None:
        self._tell(RankExited(rank.job_uid, rank.key, rank.start_count, exit_code, "gone"))

    def tell_suspicions(self, rank: SimulatedRank) -> None:
        for suspicion in rank.suspicions.values():
            self._tell(PeerSuspected(rank.job_uid, rank.key, rank.start_count, suspicion))

    async def start(self, instruction: StartRank) -> None:
        slot = _slot(instruction.job, instruction.rank)
        await self._start_delay()
        if slot in self._unwanted:
            self._unwanted.discard(slot)
            self._tell(RankExited(*slot, 0, "ended on request"))
            return
        self._tell_started(self._hosts.start(self.node, slot, instruction.rank.die))

    async def stop(self, instruction: StopRank) -> None:
        slot = (instruction.job_uid, instruction.key, instruction.start_count)
        rank = self._find(slot)
        if rank is None:
            self._unwanted.add(slot)
            return
        await self._delay()
        self._hosts.end(rank, 0)

    async def drive(self, instruction: Drive, context: JobContext | None) -> None:
        job, want = instruction.job, instruction.rank
        await asyncio.sleep(_RETRY_S * instruction.attempts)
        try:
            if job.stage is AssignmentStage.LIVE:
                await self._resume(job, want)
                return
            (await self._reach(job, want)).quiesce(job.epoch)
            prepare = job.stage is AssignmentStage.PREPARE
            self._driven(job, want, RankStage.FENCED, last=not prepare)
            if prepare:
                await self._prepare(job, want, context)
        except Refused as refusal:
            slot = _slot(job, want)
            self._findings.say(f"refused {slot}: {refusal}")
            self._tell(DriveFailed(*slot, job.epoch, str(refusal), final=False))
        except _Gone:
            return

    async def _reach(self, job: JobAssignment, want: RankAssignment) -> SimulatedRank:
        await self._delay()
        rank = self._find(_slot(job, want))
        if rank is None:
            raise _Gone
        return rank

    async def _prepare(
        self, job: JobAssignment, want: RankAssignment, context: JobContext | None
    ) -> None:
        if context is None:
            raise Refused("the job has no routes")
        rank = await self._reach(job, want)
        rank.set_members(job.epoch, context.routes.members)
        loaded = 0
        for part in context.maps.instances:
            if (part.role, part.instance) == (want.rank.role, want.rank.instance):
                rank = await self._reach(job, want)
                rank.set_expert_map(job.epoch, part.expert_map)
                rank = await self._reach(job, want)
                loaded = self._load(rank, job, want)
        rank = await self._reach(job, want)
        rank.repaired(job.epoch)
        self._driven(job, want, RankStage.REPAIRED, last=True, experts_loaded=loaded)

    def _load(self, rank: SimulatedRank, job: JobAssignment, want: RankAssignment) -> int:
        """A job's first processes load their share of the map; else the plan names all loads."""
        of_a_plan = job.incident_id != "" and rank.start_count == job.epoch
        named = {(move.layer, move.expert) for move in want.moves}
        wanted = rank.wanted(rank.expert_map) if rank.expert_map is not None else set()
        self._findings.require(
            named <= wanted, f"{rank.incarnation} is to load what its map does not put there"
        )
        loaded = rank.load(
            job.epoch, want.moves, all_of_it=rank.is_new and not of_a_plan, find=self._hosts.at
        )
        self._hosts.report(rank)
        return loaded

    async def _resume(self, job: JobAssignment, want: RankAssignment) -> None:
        rank = await self._reach(job, want)
        told_too_early = rank.epoch == job.epoch and not rank.is_repaired
        self._findings.require(
            not told_too_early, f"{rank.incarnation} is told to serve while it is {rank.stage}"
        )
        rank.resume(job.epoch)
        self._driven(job, want, RankStage.LIVE, last=True)
        self._hosts.connect(rank)

    def _driven(
        self,
        job: JobAssignment,
        want: RankAssignment,
        stage: RankStage,
        *,
        last: bool,
        experts_loaded: int = 0,
    ) -> None:
        slot = _slot(job, want)
        self._tell(Driven(*slot, job.epoch, stage, last=last, experts_loaded=experts_loaded))

    async def close(self) -> None:
        self._hosts.detach(self)


def _slot(job: JobAssignment, want: RankAssignment) -> Slot:
    return (job.job_uid, want.rank, want.start_count)
