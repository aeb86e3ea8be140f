"""Users drawn from the seed: what they ask for while faults strike, and how they undo it.

Each asks and waits for the answer beside all else; a refusal is an answer too.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

from raddle.core.requests import (
    CancelJob,
    CancelMaintenance,
    Cordon,
    CreateMaintenance,
    DeleteJob,
    Request,
    ScaleJob,
    SubmitJob,
    Uncordon,
    UpdateJob,
)
from raddle.model import keys
from raddle.model.errors import ConflictError, PermanentError
from raddle.model.health import Hold
from raddle.model.incident import MaintenanceState
from raddle.model.job import EngineSpec, Job, JobSpec, ModelSpec, RoleSpec
from raddle.model.kinds import HoldKind, RoleKind
from raddle.models import config_text
from raddle.sim.checks import ENDED
from raddle.sim.cluster import ANSWER_MAX_S, SimulatedCluster

# With room for each at its largest, so that all fit once everything is whole.
_JOBS_MAX = 4
_SIZES = {"prefill": (1, 3), "decode": (6, 10)}
_DRAIN_MIN_S, _DRAIN_MAX_S = 5.0, 120.0
_PRIORITIES = (0, 10)


class Users:
    """Ask for drawn things."""

    def __init__(self, cluster: SimulatedCluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._submitted = 0
        self._drained = 0
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "submit": self._submit,
            "cancel": self._cancel,
            "delete": self._delete,
            "scale": self._scale,
            "update": self._update,
            "cordon": self._cordon,
            "uncordon": self._uncordon,
            "drain": self._drain,
            "drain_cancel": self._drain_cancel,
        }

    async def submit(self) -> None:
        """One more job; returns once it is accepted."""
        number, self._submitted = self._submitted, self._submitted + 1
        request = SubmitJob(
            spec=job_spec(f"job-{number}"),
            job_uid=f"j-{number}",
            spec_digest=f"digest-{number}",
            idempotency_key=f"key-{number}",
        )
        await self._cluster.ask(request)

    async def undo(self) -> None:
        """Wait for all answers, end all drains and lift all holds.

        Raises:
            AssertionError: an answer did not come.
        """
        cluster = self._cluster
        await cluster.until(lambda: not cluster.waiting, "all are answered", 2 * ANSWER_MAX_S)
        for maintenance in cluster.backend.maintenances():
            if maintenance.state in (MaintenanceState.DRAINING, MaintenanceState.DRAINED):
                await self._answered(CancelMaintenance(maintenance_id=maintenance.id))
        for hold in self._holds():
            await self._answered(Uncordon(subject=hold.subject))
        left = [f"{hold.subject} ({hold.message})" for hold in self._holds()]
        cluster.findings.require(not left, f"holds that nobody can lift: {left}")

    async def _answered(self, request: Request) -> None:
        try:
            await self._cluster.ask(request)
        except (PermanentError, ConflictError) as refusal:
            self._cluster.say(f"refused {type(request).__name__}: {refusal.reason}")

    def _ask(self, request: Request) -> None:
        self._cluster.go(self._answered(request))

    def _jobs(self, *, ended: bool) -> list[Job]:
        return [job for job in self._cluster.backend.jobs() if (job.state in ENDED) is ended]

    def _holds(self) -> list[Hold]:
        return self._cluster.backend.values(keys.HOLDS)

    def _subject(self) -> str:
        """A node, an NPU or a die."""
        die = self._rng.choice(self._cluster.supernode_dies)
        return "/".join(die.split("/")[: self._rng.randint(2, 4)])

    # --- one wish each -------------------------------------------------------------------------

    async def _submit(self) -> None:
        if len(self._jobs(ended=False)) < _JOBS_MAX:
            self._cluster.go(self.submit())

    async def _cancel(self) -> None:
        jobs = self._jobs(ended=False)
        if len(jobs) > 1:
            self._ask(CancelJob(job_uid=self._rng.choice(jobs).uid))

    async def _delete(self) -> None:
        for job in self._jobs(ended=True)[:1]:
            self._ask(DeleteJob(job_uid=job.uid))

    async def _scale(self) -> None:
        jobs = self._jobs(ended=False)
        role = self._rng.choice(list(_SIZES))
        ranks = self._rng.randint(*_SIZES[role])
        if jobs:
            self._ask(ScaleJob(job_uid=self._rng.choice(jobs).uid, role=role, ranks=ranks))

    async def _update(self) -> None:
        jobs = self._jobs(ended=False)
        if jobs:
            job = self._rng.choice(jobs)
            spec = replace(job.spec, priority=self._rng.choice(_PRIORITIES))
            self._ask(UpdateJob(job_uid=job.uid, spec=spec, update_mask=("priority",)))

    async def _cordon(self) -> None:
        self._ask(Cordon(subject=self._subject()))

    async def _uncordon(self) -> None:
        holds = [hold for hold in self._holds() if hold.kind is HoldKind.CORDON]
        if holds:
            self._ask(Uncordon(subject=self._rng.choice(holds).subject))

    async def _drain(self) -> None:
        number, self._drained = self._drained, self._drained + 1
        timeout_s = self._rng.uniform(_DRAIN_MIN_S, _DRAIN_MAX_S)
        self._ask(
            CreateMaintenance(
                maintenance_id=f"m-{number}", subject=self._subject(), timeout_s=timeout_s
            )
        )

    async def _drain_cancel(self) -> None:
        found = self._cluster.backend.maintenances()
        if found:
            self._ask(CancelMaintenance(maintenance_id=self._rng.choice(found).id))


def job_spec(name: str) -> JobSpec:
    """A small disaggregated job with spare slots and a pool."""
    engine = EngineSpec(driver="simulated")
    model = ModelSpec(
        name="raddle-demo",
        config=config_text("raddle-demo"),
        weight_dtype="int8",
        kv_dtype="bf16",
        kv_block_tokens=16,
    )
    roles = (
        RoleSpec(
            name="prefill",
            kind=RoleKind.PREFILL,
            instances=1,
            ranks=2,
            tp=1,
            slots_per_rank=32,
            engine=engine,
        ),
        RoleSpec(
            name="decode",
            kind=RoleKind.DECODE,
            instances=1,
            ranks=8,
            tp=1,
            slots_per_rank=6,
            spread_nodes=4,
            max_sequences_per_rank=8,
            engine=engine,
        ),
        RoleSpec(
            name="cache",
            kind=RoleKind.CACHE,
            instances=1,
            ranks=2,
            tp=1,
            dram_bytes=10**9,
            engine=engine,
        ),
    )
    return JobSpec(namespace="default", name=name, queue="default", model=model, roles=roles)
