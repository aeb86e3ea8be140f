"""The real scheduler and agents over a memory store, a fake wire and a virtual clock."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.job import Job
from raddle.sim.checks import CheckedBackend
from raddle.sim.clock import VirtualClockLoop
from raddle.sim.cluster import SimulatedCluster
from raddle.sim.run import simulate
from raddle.store.protocol import Compare, Put, Transaction
from raddle.wire import records as codec


@pytest.mark.parametrize("seed", range(20))
def test_drawn_faults_keep_the_invariants_and_converge(seed: int) -> None:
    """Faults of dies, ranks, agents, nodes, leaders, network, store: all is well at the end."""
    verdict = simulate(seed)
    assert verdict.failures == ()
    assert verdict.incidents > 0
    assert sum(verdict.hits.values()) == 40


def test_the_same_seed_gives_the_same_trace() -> None:
    """Two runs of one seed agree in every line; another seed gives another run."""
    first, second = simulate(5, faults=25), simulate(5, faults=25)
    assert first.trace == second.trace
    assert len(first.trace) > 200
    assert simulate(6, faults=25).digest != first.digest


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_trace_does_not_hang_on_the_process(hash_seed: str) -> None:
    """Another process with other string hashes gives the same trace, bit for bit."""
    done = subprocess.run(
        [sys.executable, "-m", "raddle.sim.main", "--seed", "5", "--faults", "25", "--output=json"],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["digests"] == {"5": simulate(5, faults=25).digest}


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


async def test_a_writer_without_the_fence_is_caught() -> None:
    """The checks of the simulation see a write to a leader's record without its fence."""
    backend = CheckedBackend(lambda _: None)
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


def test_a_broken_part_ends_the_simulation() -> None:
    """What breaks inside an agent or a scheduler is the verdict, not a log line."""

    async def main() -> None:
        cluster = SimulatedCluster(load_machine("nvl72"), random.Random(1))
        try:
            await cluster.start()
            cluster.nodes["sn0/n00"].devices.set_fault("sn0/n00/npu9/die9", present=True)
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
