"""Simulated ranks: no process and no tokens, the same acknowledgements after set delays.

They stand for ranks of engines on accelerators, so that placement, recovery and delivery can be
seen at full size on one machine. They live in the agent and end with it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from raddle.agent.core.events import Drive, Driven, RankExited, RankStarted, StartRank, StopRank
from raddle.agent.engine.driver import JobContext, Tell
from raddle.model.health import RankStage
from raddle.model.job import AssignmentStage
from raddle.model.kinds import RoleKind
from raddle.model.llm import parse_config
from raddle.model.stats import ExpertLoad, RankStats
from raddle.model.types import RankKey

LOADS_EVERY_S = 10.0
_TOKENS_AN_EXPERT = 1_000.0


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
        stats: Callable[[str, RankStats], None] | None = None,
        *,
        delays: Delays | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._tell = tell
        self._delays = delays or Delays()
        self._sleep = sleep
        self._alive: dict[tuple[str, RankKey], int] = {}
        self._stats = stats
        #: Who reports loads of experts, and at which epoch.
        self._counting: dict[tuple[str, RankKey], asyncio.Task[None]] = {}

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
        self._stop_counting(slot)
        self._tell(RankExited(*slot, instruction.start_count, 0, "ended on request"))

    async def drive(self, instruction: Drive, context: JobContext | None) -> None:  # noqa: ARG002
        job, rank = instruction.job, instruction.rank
        where = (job.job_uid, rank.rank, rank.start_count, job.epoch)
        if job.stage is AssignmentStage.LIVE:
            await self._sleep(self._delays.resume_s)
            self._tell(Driven(*where, RankStage.LIVE, last=True))
            self._count_loads(instruction)
            return
        self._stop_counting((job.job_uid, rank.rank))
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

    def _count_loads(self, instruction: Drive) -> None:
        """One rank of each instance speaks for all: their tokens are alike, and so are loads."""
        job, key = instruction.job, instruction.rank.rank
        slot = (job.job_uid, key)
        self._stop_counting(slot)
        if self._stats is None or key.rank != 0 or instruction.rank.kind is RoleKind.CACHE:
            return
        shape = parse_config(job.model.config)
        if shape.moe_layers:
            loads = simulated_loads(job.job_uid, shape.moe_layers, shape.experts)
            task = asyncio.get_running_loop().create_task(self._report(slot, job.epoch, loads))
            self._counting[slot] = task

    async def _report(
        self, slot: tuple[str, RankKey], epoch: int, loads: tuple[ExpertLoad, ...]
    ) -> None:
        assert self._stats is not None
        while True:
            await self._sleep(LOADS_EVERY_S)
            self._stats(slot[0], RankStats(rank=slot[1], epoch=epoch, expert_loads=loads))

    def _stop_counting(self, slot: tuple[str, RankKey]) -> None:
        task = self._counting.pop(slot, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        for slot in list(self._counting):
            self._stop_counting(slot)
        self._alive.clear()


def simulated_loads(name: str, layers: int, experts: int) -> tuple[ExpertLoad, ...]:
    """Tokens by expert, the same for the same name: lognormal, sigma 0.4 to 0.9 a layer.

    That is the spread of published recordings of DeepSeek-V3 at decode.
    """
    # Here: an agent without simulated ranks does not pay for it.
    import numpy as np

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.4, 0.9, (layers, 1))
    weights = np.exp(spread * rng.standard_normal((layers, experts)))
    tokens = weights / weights.mean(axis=1, keepdims=True) * _TOKENS_AN_EXPERT
    return tuple(
        ExpertLoad(layer=layer, tokens=tuple(row))
        for layer, row in enumerate(tokens.astype(np.int64).tolist())
    )
