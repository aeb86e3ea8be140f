"""One simulation: a seed in, a verdict and a trace out."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from dataclasses import dataclass

from raddle.core.requests import SubmitJob
from raddle.machines import load_machine
from raddle.model.job import EngineSpec, JobSpec, ModelSpec, RoleSpec
from raddle.model.kinds import RoleKind
from raddle.models import config_text
from raddle.sim.checks import not_at_rest
from raddle.sim.clock import VirtualClockLoop
from raddle.sim.cluster import SimulatedCluster
from raddle.sim.faults import Faults

CONVERGENCE_MAX_S = 300.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one seed showed."""

    seed: int
    virtual_s: float
    #: Sentences about what did not converge or what broke; empty if all is well.
    failures: tuple[str, ...]
    #: (kind of fault, phase that it hit) -> how often.
    hits: dict[tuple[str, str], int]
    #: Recovery option -> how often it was chosen.
    options: dict[str, int]
    incidents: int
    commits: int
    terms: int
    trace: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Two runs of one seed give the same."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]


def simulate(seed: int, *, machine: str = "nvl72", faults: int = 40, jobs: int = 3) -> Verdict:
    """Run one seed: start, strike, then demand convergence. Never raises for what it tests."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(_simulate(seed, machine, faults, jobs))


async def _simulate(seed: int, machine: str, faults: int, jobs: int) -> Verdict:
    rng = random.Random(seed)
    cluster = SimulatedCluster(load_machine(machine), rng)
    drawn = Faults(cluster, random.Random(rng.random()))
    failures: list[str] = []
    try:
        await cluster.start()
        for number in range(jobs):
            await _submit(cluster, number)
        await drawn.strike(faults)
        await drawn.calm()
        failures = await _converge(cluster)
    except Exception as error:  # noqa: BLE001 - whatever breaks a part is the finding
        failures = [f"{type(error).__name__}: {error}"]
    finally:
        await cluster.stop()
    options: Counter[str] = Counter()
    for incident in cluster.backend.incidents():
        for plan in incident.plans:
            options.update(part.option for part in plan.instances)
    return Verdict(
        seed=seed,
        virtual_s=asyncio.get_running_loop().time(),
        failures=tuple(failures),
        hits=dict(drawn.hits),
        options=dict(options),
        incidents=len(cluster.backend.incidents()),
        commits=cluster.backend.commits,
        terms=sum(s.terms for s in cluster.schedulers.values()),
        trace=tuple(cluster.trace),
    )


async def _submit(cluster: SimulatedCluster, number: int) -> None:
    request = SubmitJob(
        spec=_spec(f"job-{number}"),
        job_uid=f"j-{number}",
        spec_digest=f"digest-{number}",
        idempotency_key=f"key-{number}",
    )
    await cluster.ask(request)


async def _converge(cluster: SimulatedCluster) -> list[str]:
    def at_rest() -> bool:
        return not not_at_rest(cluster.backend, cluster.hosts)

    try:
        await cluster.until(at_rest, "convergence", CONVERGENCE_MAX_S)
    except AssertionError:
        return not_at_rest(cluster.backend, cluster.hosts)
    # A front door's sequences follow within moments.
    await cluster.pass_time(1.0)
    return _strays(cluster)


def _strays(cluster: SimulatedCluster) -> list[str]:
    """Sequences on ranks that do not serve."""
    found = []
    for job in cluster.backend.jobs():
        routes = cluster.front_door.routes.get(job.uid)
        mine = cluster.front_door.sequences.get(job.uid, {})
        serving = {member.rank for member in routes.members} if routes is not None else set()
        lost = [name for name, sequence in mine.items() if sequence.rank not in serving]
        found += [f"{job.uid}: sequence {name} is on no rank that serves" for name in lost]
        if not mine:
            found.append(f"{job.uid} serves no sequence")
    return found


def _spec(name: str) -> JobSpec:
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
            slots_per_rank=24,
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
