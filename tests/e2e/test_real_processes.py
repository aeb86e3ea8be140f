"""Real processes, sockets, etcd and SIGKILL: what the main job survives."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo.client import Answers, get_text, send_all
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from raddle.wire.parse import job_message

JOB = """
name: small
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: prefill, kind: prefill, ranks: 2, slots_per_rank: 32, engine: {driver: reference}}
  - {name: decode, kind: decode, ranks: 6, slots_per_rank: 10, spread_nodes: 3,
     max_sequences_per_rank: 16, engine: {driver: reference}}
  - {name: cache, kind: cache, ranks: 2, dram_bytes: 100000000, engine: {driver: reference}}
"""
CLOSED = incident_pb2.INCIDENT_PHASE_CLOSED


class Served:
    """A running cluster with the small job, its front door, and its undisturbed tokens."""

    def __init__(self, cluster: LocalCluster, uid: str, address: str) -> None:
        self.cluster = cluster
        self.uid = uid
        self.address = address
        self.requests = traces.load_requests(16, blocks_max=4)
        self.expected = Answers()

    async def job(self) -> Any:
        request = scheduler_pb2.GetJobRequest(job_uid=self.uid)
        return await self.cluster.stub.GetJob(request, timeout=10.0)

    async def ready_at(self, epoch: int) -> None:
        async def reached() -> bool:
            job = (await self.job()).job
            return bool(job.state == job_pb2.JOB_STATE_READY and job.live_epoch >= epoch)

        await self.cluster.until(reached, f"the job is ready at epoch {epoch}")

    async def incidents(self) -> list[Any]:
        request = scheduler_pb2.ListIncidentsRequest()
        return list((await self.cluster.stub.ListIncidents(request, timeout=10.0)).incidents)

    async def same_tokens_while(self, fault: Any) -> None:
        """Send all requests, run the fault in mid stream, compare every token."""
        assert (await self.job()).job.created_by == "client/admin"
        answers = Answers()
        sending = asyncio.create_task(send_all(self.address, self.requests, answers, 8))

        async def some() -> bool:
            return answers.count >= 10

        try:
            await self.cluster.until(some, "tokens flow")
            await fault()
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert answers.failures == {}
        assert answers.tokens == self.expected.tokens


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    machine = str(Path(__file__).parent / "small_machine.yaml")
    cluster = LocalCluster(tmp_path, machine=machine, real_nodes=4, schedulers=2)
    try:
        await cluster.start()
        spec = job_message(JOB, tmp_path)
        answer = await cluster.stub.SubmitJob(
            scheduler_pb2.SubmitJobRequest(spec=spec), timeout=10.0
        )
        served = Served(cluster, answer.job.uid, "")
        await served.ready_at(1)
        served.address = cluster.start_front_door("default/small", "raddle-demo")

        async def live() -> bool:
            try:
                return (await get_text(served.address, "/health"))[0] == 200
            except OSError:
                return False

        await cluster.until(live, "the front door has routes")
        await send_all(served.address, served.requests, served.expected, 8)
        assert served.expected.failures == {}
        yield served
    finally:
        await cluster.stop()


async def _decode_ranks(served: Served) -> list[tuple[str, int, str]]:
    """(die, process, incarnation) of the living decode ranks."""
    processes = served.cluster.rank_processes()
    ranks = (await served.job()).ranks
    return [
        (r.die, processes[r.incarnation], r.incarnation)
        for r in ranks
        if r.role == "decode" and r.incarnation in processes
    ]


async def test_a_killed_rank_and_a_killed_npu_lose_no_token(served: Served) -> None:
    """SIGKILL of a rank, then of both dies of an NPU: the tokens are the same."""

    async def kill_rank() -> None:
        os.kill((await _decode_ranks(served))[0][1], signal.SIGKILL)
        await served.ready_at(2)

    await served.same_tokens_while(kill_rank)

    async def kill_npu() -> None:
        ranks = await _decode_ranks(served)
        npus = [die.rsplit("/", 1)[0] for die, _, _ in ranks]
        npu = next(name for name in npus if npus.count(name) == 2)
        epoch = (await served.job()).job.epoch
        for die, pid, _ in ranks:
            if die.startswith(npu):
                os.kill(pid, signal.SIGKILL)
        await served.ready_at(epoch + 1)

    await served.same_tokens_while(kill_npu)
    assert all(incident.phase == CLOSED for incident in await served.incidents())


async def test_a_killed_node_loses_no_token(served: Served) -> None:
    """SIGKILL of an agent and all its ranks at once: the survivors go on with the same tokens."""

    async def kill_node() -> None:
        die = (await _decode_ranks(served))[0][0]
        served.cluster.kill_node("/".join(die.split("/")[:2]))
        await served.ready_at(2)

    await served.same_tokens_while(kill_node)


async def test_an_agent_killed_alone_changes_no_epoch(served: Served) -> None:
    """SIGKILL of an agent alone: its ranks go on, the new agent adopts them, nothing moves."""
    before = await _decode_ranks(served)
    node = "/".join(before[0][0].split("/")[:2])

    async def kill_agent() -> None:
        name = f"agent-{node.replace('/', '-')}"
        child = served.cluster.children.pop(name)
        child.process.kill()
        child.process.wait()
        served.cluster.start_real_agent(node)

        async def ready_again() -> bool:
            request = scheduler_pb2.ListNodesRequest()
            nodes = (await served.cluster.stub.ListNodes(request, timeout=10.0)).nodes
            return all(n.state == "READY" for n in nodes)

        await served.cluster.until(ready_again, "the node is ready again")

    await served.same_tokens_while(kill_agent)
    assert (await served.job()).job.epoch == 1
    assert sorted(await _decode_ranks(served)) == sorted(before)


async def test_a_leader_killed_in_a_recovery_is_followed(served: Served) -> None:
    """SIGKILL of a rank and of the leader together: the next leader ends the recovery."""

    async def kill_both() -> None:
        status = await served.cluster.stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=10.0)
        number = int(status.leader_identity.rsplit("-", 1)[1])
        os.kill((await _decode_ranks(served))[0][1], signal.SIGKILL)
        child = served.cluster.children.pop(f"scheduler-{number}")
        child.process.kill()
        child.process.wait()
        await served.cluster.connect(1 - number)
        await served.ready_at(2)

    await served.same_tokens_while(kill_both)
    assert all(incident.phase == CLOSED for incident in await served.incidents())
