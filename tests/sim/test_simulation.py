"""The real scheduler and agents over a memory store, a fake wire and a virtual clock."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest

from raddle.core.requests import ScaleJob, SubmitJob
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.job import Job
from raddle.model.kinds import RecoveryKind, RoleKind
from raddle.sim.checks import CheckedBackend
from raddle.sim.clock import VirtualClockLoop
from raddle.sim.cluster import REPLICAS, SimulatedCluster
from raddle.sim.findings import Findings
from raddle.sim.ranks import KILLED, Hosts
from raddle.sim.rest import not_at_rest
from raddle.sim.run import simulate
from raddle.sim.users import Users, job_spec
from raddle.store.protocol import Compare, Put, Transaction
from raddle.wire import records as codec

SEEDS = 20
FAULTS = 40
KINDS = {
    *("die", "die_heals", "dies_of_nodes", "rank", "rank_while_others_start"),
    *("agent", "agent_then_host", "agent_cut", "agents_return", "node", "mend"),
    *("leader", "leader_between_parts", "leader_cut"),
    *("store_elects", "store_away", "store_returns", "store_set_back", "compaction", "rot"),
    *("submit", "cancel", "delete", "scale", "update"),
    *("cordon", "uncordon", "drain", "drain_cancel"),
}
_verdict = cache(simulate)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_drawn_faults_keep_the_invariants_and_converge(seed: int) -> None:
    """Faults of dies, ranks, nodes, leaders, network and store while users ask: all is well."""
    verdict = _verdict(seed)
    assert verdict.failures == ()
    assert verdict.incidents > 0
    assert sum(verdict.hits.values()) == FAULTS


def test_the_seeds_hit_every_phase_with_every_kind_of_fault() -> None:
    """No fault is never drawn, no phase of a recovery never hit, no way to recover never taken."""
    verdicts = [_verdict(seed) for seed in range(SEEDS)]
    hits = Counter({hit: n for v in verdicts for hit, n in v.hits.items()})
    assert {kind for kind, _ in hits} == KINDS
    assert {phase for _, phase in hits} >= {"calm", "fence", "repair", "publish"}
    options = {option for v in verdicts for option in v.options}
    assert options >= {RecoveryKind.DONOR_SLOT, RecoveryKind.RESTART, RecoveryKind.REMAP}


def test_a_leader_dies_between_the_parts_of_a_large_decision() -> None:
    """Many jobs lose ranks at once, the leader dies half way: the next one decides the rest."""

    async def main() -> list[str]:
        cluster = SimulatedCluster(load_machine("nvl72"), random.Random(1))
        try:
            await cluster.start()
            for number in range(30):
                await cluster.ask(_two_ranks(number))
            await cluster.until(lambda: not left(cluster), "all jobs run")
            leader = cluster.leader
            assert leader is not None
            leader.dies_between_parts = True
            # It learns of all of them at once.
            leader.store.cut()
            for name in cluster.nodes:
                cluster.nodes[name].devices.set_faults([r.die for r in cluster.hosts.on(name)])
            await cluster.pass_time(0.5)
            leader.store.mend()
            await cluster.until(lambda: len(running(cluster)) < REPLICAS, "the leader dies")
            for node in cluster.nodes.values():
                node.devices.heal()
            await cluster.until(lambda: not left(cluster), "all jobs run again")
            return cluster.findings.trace
        finally:
            await cluster.stop()

    def left(cluster: SimulatedCluster) -> list[str]:
        return not_at_rest(cluster.backend, cluster.hosts, cluster.machine)

    def running(cluster: SimulatedCluster) -> list[str]:
        return [name for name, s in cluster.schedulers.items() if s.is_running]

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        trace = runner.run(main())
    assert sum("dies between two parts" in line for line in trace) == 1


def set_back_by_two_epochs() -> int:
    """The store forgets two recoveries whose epoch ranks are at; gives the job's epoch at rest."""

    async def main() -> int:
        cluster = SimulatedCluster(load_machine("nvl72"), random.Random(1))

        def at_rest() -> bool:
            return not not_at_rest(cluster.backend, cluster.hosts, cluster.machine)

        def epoch() -> int:
            return cluster.backend.jobs()[0].epoch

        try:
            await cluster.start()
            await Users(cluster, random.Random(1)).submit()
            await cluster.until(at_rest, "the job runs")
            cluster.backend.forget_past()
            for number in (2, 3):
                pool = [rank for rank in cluster.hosts.all() if rank.key.role == "cache"]
                cluster.hosts.end(pool[0], KILLED)
                await cluster.until(lambda n=number: epoch() == n, "a recovery")  # type: ignore[misc]
                await cluster.until(at_rest, "the job runs again")
            for store in cluster.stores():
                store.cut()
            await cluster.pass_time(1.0)
            cluster.backend.set_back(changes=10**6)
            for store in cluster.stores():
                store.mend()
            assert epoch() == 1
            await cluster.until(lambda: epoch() > 1 and at_rest(), "the job runs", 120.0)
            return epoch()
        finally:
            await cluster.stop()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main())


def test_a_store_that_forgot_epochs_is_overtaken() -> None:
    """Ranks live at epoch 3, the restored store knows of 1: the next epoch is above both."""
    assert set_back_by_two_epochs() > 3


def _two_ranks(number: int) -> SubmitJob:
    spec = job_spec(f"two-{number}")
    decode = next(role for role in spec.roles if role.kind is RoleKind.DECODE)
    role = replace(decode, ranks=2, slots_per_rank=32, spread_nodes=0)
    spec = replace(spec, roles=(role,))
    return SubmitJob(spec=spec, job_uid=f"j-{number}", spec_digest="d")


def test_the_same_seed_gives_the_same_trace() -> None:
    """Two runs of one seed agree in every line; another seed gives another run."""
    first = _verdict(5)
    assert simulate(5).trace == first.trace
    assert len(first.trace) > 200
    assert _verdict(6).digest != first.digest


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_trace_does_not_hang_on_the_process(hash_seed: str) -> None:
    """Another process with other string hashes gives the same trace, bit for bit."""
    done = subprocess.run(
        [sys.executable, "-m", "raddle.sim.main", "--seed", "5", "--output=json"],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["digests"] == {"5": _verdict(5).digest}


def test_virtual_time_passes_only_when_everything_waits() -> None:
    """An hour of sleep costs no time, timers fire in order, and a dead end is told."""
    fired: list[int] = []

    async def sleeper(seconds: int) -> None:
        await asyncio.sleep(seconds)
        fired.append(seconds)

    async def main() -> float:
        await asyncio.gather(*(sleeper(s) for s in (3600, 1, 60)))
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        assert runner.run(main()) == pytest.approx(3600)
        assert fired == [1, 60, 3600]
        with pytest.raises(RuntimeError, match="stuck"):
            runner.run(asyncio.Event().wait())


def test_a_loop_that_runs_in_circles_is_told() -> None:
    """Parts that wake each other for ever, while no time passes, end with a sentence."""

    async def main() -> None:
        while True:  # noqa: ASYNC110 - the circle itself
            await asyncio.sleep(0)

    with (
        asyncio.Runner(loop_factory=VirtualClockLoop) as runner,
        pytest.raises(RuntimeError, match="runs in circles"),
    ):
        runner.run(main())


async def test_a_writer_without_the_fence_is_caught() -> None:
    """The checks of the simulation see a write to a leader's record without its fence."""
    findings = Findings()
    backend = CheckedBackend(findings, Hosts(findings))
    job = Job(uid="j-1", epoch=2)
    backend.commit(Transaction(writes=(Put(keys.LEADER, b""),)))
    fence = Compare(keys.LEADER, backend.revision)
    key = keys.job("j-1")
    backend.commit(Transaction((fence,), (Put(key, codec.encode(key, job)),)))
    with pytest.raises(AssertionError, match="fence"):
        backend.commit(Transaction(writes=(Put(key, codec.encode(key, job)),)))
    older = codec.encode(key, replace(job, epoch=1))
    with pytest.raises(AssertionError, match="epoch 1 after 2"):
        backend.commit(Transaction((fence,), (Put(key, older),)))
    with pytest.raises(AssertionError, match="fence"):
        findings.check()


def test_a_broken_part_ends_the_simulation() -> None:
    """What breaks inside an agent or a scheduler is the verdict, not a log line."""

    async def main() -> None:
        cluster = SimulatedCluster(load_machine("nvl72"), random.Random(1))
        try:
            await cluster.start()
            cluster.nodes["sn0/n00"].devices.set_faults(["sn0/n00/npu9/die9"])
            broken = cluster.nodes["sn0/n01"]
            broken.devices.follow = None  # type: ignore[assignment,method-assign]
            await broken.kill()
            broken.start_agent()
            await cluster.pass_time(1.0)
        finally:
            await cluster.stop()

    with (
        asyncio.Runner(loop_factory=VirtualClockLoop) as runner,
        pytest.raises(TypeError, match="not callable"),
    ):
        runner.run(main())


def test_a_question_that_nobody_answers_ends() -> None:
    """With every scheduler gone a wait ends with what was waited for, not never."""

    async def main() -> None:
        cluster = SimulatedCluster(load_machine("nvl72"), random.Random(1))
        try:
            await cluster.start()
            for scheduler in cluster.schedulers.values():
                await scheduler.kill()
            await cluster.ask(ScaleJob(job_uid="j-0", role="decode", ranks=2))
        finally:
            await cluster.stop()

    with (
        asyncio.Runner(loop_factory=VirtualClockLoop) as runner,
        pytest.raises(AssertionError, match="nobody answered ScaleJob"),
    ):
        runner.run(main())
