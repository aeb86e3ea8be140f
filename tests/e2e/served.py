"""A running cluster of real processes with the small job, and its undisturbed tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo.client import Answers, get_text, send_all
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from raddle.wire.parse import job_message

SMALL_MACHINE = str(Path(__file__).parent / "small_machine.yaml")
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

    async def same_tokens_while(self, fault: Callable[[], Awaitable[None]]) -> None:
        """Send all requests, run the fault in mid stream, compare every token."""
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

    async def decode_ranks(self) -> list[tuple[str, int, str]]:
        """(die, process, incarnation) of the living decode ranks."""
        processes = self.cluster.rank_processes()
        ranks = (await self.job()).ranks
        return [
            (r.die, processes[r.incarnation], r.incarnation)
            for r in ranks
            if r.role == "decode" and r.incarnation in processes
        ]

    async def kill_decode_rank(self) -> None:
        os.kill((await self.decode_ranks())[0][1], signal.SIGKILL)

    async def leader_number(self) -> int:
        """Which of the cluster's schedulers leads."""
        request = scheduler_pb2.GetStatusRequest()
        status = await self.cluster.stub.GetStatus(request, timeout=10.0)
        return int(status.leader_identity.rsplit("-", 1)[1])

    async def kill_leader(self) -> int:
        """SIGKILL the leader, talk to another one; gives the number of the killed one."""
        number = await self.leader_number()
        child = self.cluster.children.pop(f"scheduler-{number}")
        child.process.kill()
        child.process.wait()
        other = (number + 1) % len(self.cluster.addresses)
        await self.cluster.connect(other)
        return number


@asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[Served]:
    """Start a cluster, the small job and its front door; all of it ends with the block."""
    settings: dict[str, Any] = {"machine": SMALL_MACHINE, "real_nodes": 4, "schedulers": 2}
    cluster = LocalCluster(folder, **(settings | options))
    try:
        await cluster.start()
        spec = job_message(JOB, folder)
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
