"""One simulation: a seed in, a verdict and a trace out."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from dataclasses import dataclass

from raddle.machines import load_machine
from raddle.model.job import JobState
from raddle.sim.clock import VirtualClockLoop
from raddle.sim.cluster import SimulatedCluster
from raddle.sim.faults import Faults
from raddle.sim.rest import not_at_rest
from raddle.sim.users import Users

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
    rng = random.Random(seed)
    cluster = SimulatedCluster(load_machine(machine), rng)
    users = Users(cluster, random.Random(rng.random()))
    drawn = Faults(cluster, users, random.Random(rng.random()))
    loop = VirtualClockLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        try:
            failures = runner.run(_simulate(cluster, users, drawn, faults, jobs))
        except RuntimeError as error:
            # Nothing can go on, or nothing ever ends: the loop itself gave up.
            failures = [str(error)]
    options: Counter[str] = Counter()
    for incident in cluster.backend.incidents():
        for plan in incident.plans:
            options.update(part.option for part in plan.instances)
    return Verdict(
        seed=seed,
        virtual_s=loop.time(),
        failures=tuple(failures),
        hits=dict(drawn.hits),
        options=dict(options),
        incidents=len(cluster.backend.incidents()),
        commits=cluster.backend.commits,
        terms=sum(s.terms for s in cluster.schedulers.values()),
        trace=tuple(cluster.findings.trace),
    )


async def _simulate(
    cluster: SimulatedCluster, users: Users, drawn: Faults, faults: int, jobs: int
) -> list[str]:
    try:
        await cluster.start()
        for _ in range(jobs):
            await users.submit()
        await drawn.strike(faults)
        await drawn.calm()
        return await _converge(cluster)
    except Exception as error:  # noqa: BLE001 - whatever breaks a part is the finding
        return [f"{type(error).__name__}: {error}"]
    finally:
        await cluster.stop()


async def _converge(cluster: SimulatedCluster) -> list[str]:
    def left() -> list[str]:
        return not_at_rest(cluster.backend, cluster.hosts, cluster.machine)

    try:
        await cluster.until(lambda: not left(), "convergence", CONVERGENCE_MAX_S)
    except AssertionError:
        # What broke a part goes before what could not converge after it.
        cluster.check()
        return left()
    # A front door's sequences follow within moments, and nothing stirs any more.
    await cluster.pass_time(1.0)
    return left() + _strays(cluster)


def _strays(cluster: SimulatedCluster) -> list[str]:
    """Sequences on ranks that do not serve."""
    found = []
    for job in cluster.backend.jobs():
        if job.state is not JobState.READY:
            continue
        routes = cluster.front_door.routes.get(job.uid)
        mine = cluster.front_door.sequences.get(job.uid, {})
        serving = {member.rank for member in routes.members} if routes is not None else set()
        lost = [name for name, sequence in mine.items() if sequence.rank not in serving]
        found += [f"{job.uid}: sequence {name} is on no rank that serves" for name in lost]
        if not mine:
            found.append(f"{job.uid} serves no sequence")
    return found
