"""A running cluster of real processes with the small job, and its undisturbed tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo.client import Answers, get_text, send_all
from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.store.etcd.connection import Connection
from raddle.store.etcd.store import EtcdStore
from raddle.store.follow import follow
from raddle.store.protocol import Snapshot
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from raddle.wire import records as codec
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
        self.answers = Answers()

    async def job(self) -> Any:
        """The job, from whoever leads; asked again while the lead changes."""
        request = scheduler_pb2.GetJobRequest(job_uid=self.uid)
        found = []

        async def answered() -> bool:
            found.append(await self.cluster.stub.GetJob(request, timeout=5.0))
            return True

        await self.cluster.until(answered, "a scheduler answers")
        return found[0]

    async def ready_at(self, epoch: int) -> None:
        async def reached() -> bool:
            job = (await self.job()).job
            return bool(job.state == job_pb2.JOB_STATE_READY and job.live_epoch >= epoch)

        await self.cluster.until(reached, f"the job is ready at epoch {epoch}")

    async def incidents(self) -> list[Any]:
        request = scheduler_pb2.ListIncidentsRequest()
        return list((await self.cluster.stub.ListIncidents(request, timeout=10.0)).incidents)

    async def lost_ranks(self) -> list[Any]:
        """What incidents say of ranks that were lost.

        An epoch in which ranks connect anew, after a step that a busy machine made too long, loses
        nobody.
        """
        faults = [fault for incident in await self.incidents() for fault in incident.faults]
        return [fault for fault in faults if fault.rank.role]

    async def tokens_flow(self) -> None:
        """Wait until ten more tokens came, or all of them."""
        before, whole = self.answers.count, self.expected.count

        async def more() -> bool:
            return self.answers.count >= min(before + 10, whole)

        await self.cluster.until(more, "tokens flow")

    async def same_tokens_while(
        self, fault: Callable[[], Awaitable[None]], requests_at_once: int = 8
    ) -> None:
        """Send all requests, run the fault in mid stream, compare every token."""
        answers = self.answers = Answers()
        sending = asyncio.create_task(
            send_all(self.address, self.requests, answers, requests_at_once)
        )

        try:
            await self.tokens_flow()
            await fault()
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        assert answers.failures == {}
        assert answers.tokens == self.expected.tokens

    async def same_tokens_for(self, seconds: float) -> None:
        """Rounds of requests for at least so long, every token of each compared."""

        async def nothing() -> None:
            pass

        end_s = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end_s:
            await self.same_tokens_while(nothing)

    def send_first(self, requests: Sequence[traces.TraceRequest], tokens: list[list[int]]) -> None:
        """Send these before the others, with what they must give: they were never sent before."""
        known = [*tokens, *(self.expected.tokens[number] for number in range(len(self.requests)))]
        self.requests = [*requests, *self.requests]
        self.expected = Answers(tokens=dict(enumerate(known)))

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
        """SIGKILL the rank of the running sequence with the most tokens to come, else the first."""
        processes = {name: process for _, process, name in await self.decode_ranks()}
        to_come = dict.fromkeys(processes, 0)
        for number, name in self.answers.served_by.items():
            if name in processes:
                left = len(self.expected.tokens[number]) - len(self.answers.tokens[number])
                to_come[name] = max(to_come[name], left)
        os.kill(processes[max(to_come, key=to_come.__getitem__)], signal.SIGKILL)

    async def leader_number(self) -> int:
        """Which of the cluster's schedulers leads."""
        await self.job()
        request = scheduler_pb2.GetStatusRequest()
        status = await self.cluster.stub.GetStatus(request, timeout=10.0)
        return int(status.leader_identity.rsplit("-", 1)[1])

    async def etcd_leader(self) -> int:
        """Which of the cluster's etcd members leads etcd."""
        for number, member in enumerate(self.cluster.etcds):
            if member.process is None or member.process.poll() is not None:
                continue
            connection = Connection([member.endpoint])
            status = await connection.status()
            await connection.close()
            if status.leader == status.header.member_id:
                return number
        raise AssertionError("no etcd member leads")

    async def submit(self, job: str = JOB) -> None:
        """Submit the small job, or another one of its name."""
        spec = job_message(job, self.cluster.folder)
        request = scheduler_pb2.SubmitJobRequest(spec=spec)
        self.uid = (await self.cluster.stub.SubmitJob(request, timeout=10.0)).job.uid

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
async def serving(
    folder: Path,
    on_made: Callable[[LocalCluster], None] = lambda _: None,
    *,
    job: str = JOB,
    **options: Any,
) -> AsyncIterator[Served]:
    """Start a cluster, the small job and its front door; all of it ends with the block."""
    settings: dict[str, Any] = {"machine": SMALL_MACHINE, "real_nodes": 4, "schedulers": 2}
    cluster = LocalCluster(folder, **(settings | options))
    on_made(cluster)
    async with serving_on(cluster, job) as served:
        yield served


@asynccontextmanager
async def serving_on(cluster: LocalCluster, job: str = JOB) -> AsyncIterator[Served]:
    """Start this cluster, the small job and its front door; all of it ends with the block."""
    try:
        await cluster.start()
        served = Served(cluster, "", "")
        await served.submit(job)
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


PHASES = [
    IncidentPhase.DETECT,
    IncidentPhase.DECIDE,
    IncidentPhase.FENCE,
    IncidentPhase.REPAIR,
    IncidentPhase.PUBLISH,
]


async def phase_seen(store: EtcdStore, phase: IncidentPhase, known: set[str]) -> str:
    """Wait until a new incident is in the phase or later; gives its id."""
    async for item in follow(store, keys.INCIDENTS):
        records = item.records if isinstance(item, Snapshot) else [c.record for c in item.changes]
        for record in records:
            if record is None:
                continue
            incident = codec.decode(record.key, record.value)
            reached = PHASES.index(phase) <= _order(incident.phase)
            if incident.id not in known and reached:
                return str(incident.id)
    raise AssertionError("a watch ended")


def _order(phase: IncidentPhase) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)
