"""Simulated ranks: no process and no tokens, the same acknowledgements after set delays.

They stand for ranks of engines on accelerators, so that placement, recovery and delivery can be
seen at full size on one machine. They live in the agent and end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from raddle.agent.core.events import Drive, Driven, RankExited, RankStarted, StartRank, StopRank
from raddle.agent.engine.driver import JobContext, Tell
from raddle.model.health import RankStage
from raddle.model.job import AssignmentStage
from raddle.model.types import RankKey


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds that a simulated rank takes; all zero unless a scenario says otherwise."""

    start_s: float = 0.0
    fence_s: float = 0.0
    repair_s: float = 0.0
    resume_s: float = 0.0


class SimulatedDriver:
    """Acknowledges every stage. `sleep` can be a virtual clock's."""

    name = "simulated"
    needs_context = False
    verbs: tuple[str, ...] = (
        "quiesce",
        "set_members",
        "set_expert_map",
        "load_experts",
        "restore_kv",
        "resume",
    )

    def __init__(
        self,
        tell: Tell,
        *,
        delays: Delays | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tell = tell
        self._delays = delays or Delays()
        self._sleep = sleep
        self._alive: dict[tuple[str, RankKey], int] = {}

    async def adopt(self) -> None:
        """Simulated ranks do not outlive their agent."""

    async def start(self, instruction: StartRank) -> None:
        job, rank = instruction.job, instruction.rank
        await self._sleep(self._delays.start_s)
        self._alive[job.job_uid, rank.rank] = rank.start_count
        key = rank.rank
        name = f"{job.job_uid}-{key.role}-{key.instance}-{key.rank}-{rank.start_count}"
        self._tell(
            RankStarted(
                job.job_uid, key, rank.start_count, rank.die, f"{name}-simulated", "", "", job.epoch
            )
        )

    async def stop(self, instruction: StopRank) -> None:
        slot = (instruction.job_uid, instruction.key)
        if self._alive.get(slot) == instruction.start_count:
            del self._alive[slot]
        self._tell(RankExited(*slot, instruction.start_count, 0, "ended on request"))

    async def drive(self, instruction: Drive, context: JobContext | None) -> None:  # noqa: ARG002
        job, rank = instruction.job, instruction.rank
        where = (job.job_uid, rank.rank, rank.start_count, job.epoch)
        if job.stage is AssignmentStage.LIVE:
            await self._sleep(self._delays.resume_s)
            self._tell(Driven(*where, RankStage.LIVE, last=True))
            return
        await self._sleep(self._delays.fence_s)
        prepare = job.stage is AssignmentStage.PREPARE
        self._tell(Driven(*where, RankStage.FENCED, last=not prepare))
        if prepare:
            await self._sleep(self._delays.repair_s)
            loaded = len(rank.moves)
            restored = sum(restore.tokens_restored for restore in rank.restores)
            self._tell(
                Driven(
                    *where,
                    RankStage.REPAIRED,
                    last=True,
                    experts_loaded=loaded,
                    kv_tokens_restored=restored,
                )
            )

    async def close(self) -> None:
        self._alive.clear()
