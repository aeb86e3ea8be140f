"""Simulated rank processes: they outlive their agent, end with their node, and keep their fence.

A rank acts only at the newest epoch that it was told; an older one is refused. When a rank ends,
its living peers notice after a while and say so through their agents, as real ones do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

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
from raddle.model.health import PeerSuspicion, RankStage
from raddle.model.job import AssignmentStage
from raddle.model.types import RankKey

KILLED = -9
Delay = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class SimulatedRank:
    """One process."""

    node: str
    job_uid: str
    key: RankKey
    start_count: int
    die: str
    incarnation: str
    epoch: int
    alive: bool = True


class Hosts:
    """All rank processes of the machine, and the agents' drivers that watch them."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._ranks: dict[str, SimulatedRank] = {}
        self._drivers: dict[str, RankDriver] = {}
        self._started = 0

    def on(self, node: str) -> list[SimulatedRank]:
        return [rank for rank in self._ranks.values() if rank.node == node]

    def all(self) -> list[SimulatedRank]:
        return list(self._ranks.values())

    def answers(self, incarnation: str) -> bool:
        return incarnation in self._ranks

    def attach(self, driver: RankDriver) -> None:
        self._drivers[driver.node] = driver

    def detach(self, driver: RankDriver) -> None:
        if self._drivers.get(driver.node) is driver:
            del self._drivers[driver.node]

    def start(self, node: str, job_uid: str, key: RankKey, start_count: int, die: str) -> None:
        self._started += 1
        name = f"{job_uid}-{key.role}-{key.instance}-{key.rank}-{start_count}-{self._started}"
        rank = SimulatedRank(node, job_uid, key, start_count, die, name, start_count)
        self._ranks[name] = rank
        self._say(f"rank {name} starts on {die or node}")

    def end(self, rank: SimulatedRank, exit_code: int) -> None:
        """The process is gone; its agent sees it at once, its peers a little later."""
        if not rank.alive:
            return
        rank.alive = False
        del self._ranks[rank.incarnation]
        self._say(f"rank {rank.incarnation} ends with {exit_code}")
        driver = self._drivers.get(rank.node)
        if driver is not None:
            driver.tell_exit(rank, exit_code)
        for peer in self.all():
            if peer.job_uid == rank.job_uid and peer.node in self._drivers:
                self._drivers[peer.node].tell_suspicion(peer, rank)


class RankDriver:
    """The engine driver of one node's agent over `Hosts`."""

    name = "simulated"
    needs_context = True
    verbs: tuple[str, ...] = ()

    def __init__(self, node: str, hosts: Hosts, tell: Tell, delay: Delay) -> None:
        self.node = node
        self._hosts = hosts
        self._tell = tell
        self._delay = delay
        self._unwanted: set[tuple[str, RankKey, int]] = set()

    async def adopt(self) -> None:
        self._hosts.attach(self)
        for rank in self._hosts.on(self.node):
            self._tell_started(rank)

    def _tell_started(self, rank: SimulatedRank) -> None:
        address = f"{rank.node}:{rank.incarnation}"
        self._tell(
            RankStarted(
                rank.job_uid,
                rank.key,
                rank.start_count,
                rank.die,
                rank.incarnation,
                address,
                address,
                rank.epoch,
            )
        )

    def _find(self, job_uid: str, key: RankKey, start_count: int) -> SimulatedRank | None:
        for rank in self._hosts.on(self.node):
            if (rank.job_uid, rank.key, rank.start_count) == (job_uid, key, start_count):
                return rank
        return None

    def tell_exit(self, rank: SimulatedRank, exit_code: int) -> None:
        self._tell(RankExited(rank.job_uid, rank.key, rank.start_count, exit_code, "gone"))

    def tell_suspicion(self, accuser: SimulatedRank, lost: SimulatedRank) -> None:
        suspicion = PeerSuspicion(
            role=lost.key.role,
            instance=lost.key.instance,
            rank=lost.key.rank,
            incarnation=lost.incarnation,
            reason="CONNECTION_BROKEN",
            epoch=accuser.epoch,
        )
        self._tell(PeerSuspected(accuser.job_uid, accuser.key, accuser.start_count, suspicion))

    async def start(self, instruction: StartRank) -> None:
        job, want = instruction.job, instruction.rank
        slot = (job.job_uid, want.rank, want.start_count)
        await self._delay()
        if slot in self._unwanted:
            self._unwanted.discard(slot)
            self._tell(RankExited(*slot, 0, "ended on request"))
            return
        self._hosts.start(self.node, *slot, want.die)
        rank = self._find(*slot)
        assert rank is not None
        self._tell_started(rank)

    async def stop(self, instruction: StopRank) -> None:
        slot = (instruction.job_uid, instruction.key, instruction.start_count)
        rank = self._find(*slot)
        if rank is None:
            self._unwanted.add(slot)
            return
        await self._delay()
        self._hosts.end(rank, 0)

    async def drive(self, instruction: Drive, context: JobContext | None) -> None:
        job, want = instruction.job, instruction.rank
        slot = (job.job_uid, want.rank, want.start_count)
        prepare = job.stage is AssignmentStage.PREPARE
        if prepare:
            assert context is not None, f"{slot}: no routes at stage PREPARE"
        live = job.stage is AssignmentStage.LIVE
        stages = [RankStage.LIVE] if live else [RankStage.FENCED]
        stages += [RankStage.REPAIRED] if prepare else []
        for stage in stages:
            await self._delay()
            rank = self._find(*slot)
            if rank is None:
                return
            if job.epoch < rank.epoch or (job.epoch > rank.epoch and live):
                message = f"epoch {job.epoch} is not this rank's epoch {rank.epoch}"
                self._tell(DriveFailed(*slot, job.epoch, message, final=False))
                return
            rank.epoch = job.epoch
            last = stage is stages[-1]
            self._tell(Driven(*slot, job.epoch, stage, last=last, experts_loaded=len(want.moves)))

    async def close(self) -> None:
        self._hosts.detach(self)
