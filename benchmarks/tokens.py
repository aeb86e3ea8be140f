"""From the end of a rank to new tokens on the last of its streams, on the reference engine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cluster import say
from benchmarks.figures import figure
from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo.client import get_text, stream_events
from raddle.traces import TraceRequest
from raddle.v1 import incident_pb2, job_pb2, scheduler_pb2
from raddle.wire.parse import job_message

KILLS = 52
HANGS = 10
HOSTS = 5
STREAMS = 16
_MOVE_TIMEOUT_S = 60.0
_RETRY_S = 0.05
# The demonstration's model with two layers: 20 ranks share the two cores of this measurement.
MODEL = str(Path(__file__).parent / "two_layers.json")
SPEC = """
name: small
model: {config: %s, kv_block_tokens: 16}
roles:
  - {name: prefill, kind: prefill, ranks: 2, slots_per_rank: 32, engine: {driver: reference}}
  - {name: decode, kind: decode, ranks: 16, slots_per_rank: 4, spread_nodes: 4,
     max_sequences_per_rank: 16, engine: {driver: reference}}
  - {name: cache, kind: cache, ranks: 2, dram_bytes: 400000000, engine: {driver: reference}}
"""


class Streams:
    """Requests without end: each stream begins its next one at once, and every token is seen."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._requests = traces.load_requests(STREAMS, blocks_max=4)
        #: Incarnation that serves each stream, and when its first token of that one came.
        self.served: dict[int, tuple[str, float]] = {}
        self._changed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._run(n)) for n in range(STREAMS)]

    async def _run(self, number: int) -> None:
        prompt = self._requests[number].prompt
        while True:
            request = TraceRequest(prompt=prompt, output_tokens=2_000)
            try:
                async for event in stream_events(self._address, request):
                    name = event["served_by"]
                    known = self.served.get(number)
                    if event["choices"][0]["tokens"] and (known is None or known[0] != name):
                        self.served[number] = (name, time.monotonic())
                        self._changed.set()
            except (OSError, ValueError) as error:
                say(f"stream {number} broke: {error!r}")
                await asyncio.sleep(_RETRY_S)

    async def all_flow(self) -> None:
        while len(self.served) < STREAMS:
            await self._moved()

    async def _moved(self) -> None:
        """Until the next stream begins to be served by another process.

        Raises:
            TimeoutError: none did, so that the measurement cannot go on.
        """
        self._changed.clear()
        await asyncio.wait_for(self._changed.wait(), _MOVE_TIMEOUT_S)

    def on(self, incarnations: set[str]) -> list[int]:
        return [n for n, (name, _) in self.served.items() if name in incarnations]

    async def moved(self, streams: list[int], lost: set[str]) -> float:
        """When the last of these streams had its first token from another process."""
        while any(self.served[n][0] in lost for n in streams):
            await self._moved()
        return max(self.served[n][1] for n in streams)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Serving:
    """A cluster with the job, its front door and running streams."""

    def __init__(self, cluster: LocalCluster, uid: str, address: str) -> None:
        self.cluster = cluster
        self.uid = uid
        self.address = address

    async def job(self) -> Any:
        found: list[Any] = []
        request = scheduler_pb2.GetJobRequest(job_uid=self.uid)

        async def read() -> bool:
            found.append(await self.cluster.stub.GetJob(request, timeout=5.0))
            return True

        await self.cluster.until(read, "a scheduler answers")
        return found[0]

    async def settled(self, epoch: int) -> None:
        async def ready() -> bool:
            job = (await self.job()).job
            return bool(job.state == job_pb2.JOB_STATE_READY and job.live_epoch >= epoch)

        await self.cluster.until(ready, f"epoch {epoch} is live")

    async def decode_ranks(self) -> dict[str, tuple[int, str]]:
        """Incarnation -> (process, node) of the living decode ranks."""
        processes = self.cluster.rank_processes()
        return {
            r.incarnation: (processes[r.incarnation], "/".join(r.die.split("/")[:2]))
            for r in (await self.job()).ranks
            if r.role == "decode" and r.incarnation in processes
        }

    async def phases(self) -> dict[str, float]:
        """Milliseconds of each phase of the newest incident."""
        request = scheduler_pb2.ListIncidentsRequest(job_uid=self.uid, page_size=1)
        incident = (await self.cluster.stub.ListIncidents(request, timeout=5.0)).incidents[0]
        return {
            incident_pb2.IncidentPhase.Name(e.phase).removeprefix("INCIDENT_PHASE_").lower(): (
                e.duration.seconds * 1e3 + e.duration.nanos / 1e6
            )
            for e in incident.timeline
        }


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Serving]:
    """Start all of it on the small machine: 4 nodes of 8 dies, all real."""
    machine = str(Path(__file__).parent / "four_nodes.yaml")
    with TemporaryDirectory(prefix="raddle-bench-") as folder:
        cluster = LocalCluster(Path(folder), machine=machine, real_nodes=4, forks=False, **options)
        try:
            await cluster.start()
            request = scheduler_pb2.SubmitJobRequest(spec=job_message(SPEC % MODEL, Path(folder)))
            uid = (await cluster.stub.SubmitJob(request, timeout=10.0)).job.uid
            found = Serving(cluster, uid, "")
            await found.settled(1)
            found.address = cluster.start_front_door("default/small", MODEL)

            async def live() -> bool:
                with suppress(OSError):
                    return (await get_text(found.address, "/health"))[0] == 200
                return False

            await cluster.until(live, "the front door has routes")
            yield found
        finally:
            await cluster.stop()


# Makes a fault happen to the busiest rank; gives the moment and what was lost.
Fault = Callable[[Serving, Streams], Awaitable[tuple[float, set[str]]]]


async def _busiest(run: Serving, streams: Streams) -> tuple[str, int, str]:
    """(incarnation, process, node) of the decode rank with the most streams."""
    ranks = await run.decode_ranks()
    name = max(ranks, key=lambda n: (len(streams.on({n})), n))
    return name, *ranks[name]


async def _kill(run: Serving, streams: Streams) -> tuple[float, set[str]]:
    name, pid, _ = await _busiest(run, streams)
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return began, {name}


async def _stop(run: Serving, streams: Streams) -> tuple[float, set[str]]:
    name, pid, _ = await _busiest(run, streams)
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    return began, {name}


async def _kill_host(run: Serving, streams: Streams) -> tuple[float, set[str]]:
    _, _, node = await _busiest(run, streams)
    lost = {name for name, (_, where) in (await run.decode_ranks()).items() if where == node}
    status = await run.cluster.stub.GetStatus(scheduler_pb2.GetStatusRequest(), timeout=5.0)
    number = int(status.leader_identity.rsplit("-", 1)[1])
    child = run.cluster.children.pop(f"scheduler-{number}")
    await run.cluster.connect(1 - number)
    began = time.monotonic()
    child.process.kill()
    run.cluster.kill_node(node)
    return began, lost


async def _sample(run: Serving, fault: Fault, rest: str) -> tuple[float, dict[str, float]]:
    """Milliseconds from a fault to the last stream's new token; what the incident took of it."""
    streams = Streams(run.address)
    try:
        await streams.all_flow()
        epoch = (await run.job()).job.epoch
        began, lost = await fault(run, streams)
        touched = streams.on(lost)
        total_ms = (await streams.moved(touched, lost) - began) * 1e3
        await run.settled(epoch + 1)
        phases = await run.phases()
        return total_ms, phases | {rest: max(0.0, total_ms - sum(phases.values()))}
    finally:
        await streams.stop()


async def _figure(
    name: str, count: int, a_cluster: int, fault: Fault, rest: str, **options: Any
) -> dict[str, Any]:
    """A fresh cluster after each few samples, since lost ranks are not replaced."""
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    while len(samples) < count:
        async with serving(**options) as run:
            for _ in range(min(a_cluster, count - len(samples))):
                total_ms, told = await _sample(run, fault, rest)
                samples.append(total_ms)
                phases.append(told)
        say(f"{name}: {len(samples)} of {count}, last {samples[-1]:.0f} ms")
    return figure(samples, phases, decode_ranks=16, streams=STREAMS)


async def killed(count: int = KILLS) -> dict[str, Any]:
    return await _figure("rank_killed_to_token_ms", count, 6, _kill, "notice_and_tokens")


async def hung(count: int = HANGS) -> dict[str, Any]:
    return await _figure("rank_hung_to_token_ms", count, 5, _stop, "step_deadline_and_tokens")


async def host_lost(count: int = HOSTS) -> dict[str, Any]:
    name = "host_with_leader_to_token_ms"
    return await _figure(name, count, 1, _kill_host, "takeover_and_tokens", schedulers=2)


async def measure() -> dict[str, Any]:
    return {
        "rank_killed_to_token_ms": await killed(),
        "rank_hung_to_token_ms": await hung(),
        "host_with_leader_to_token_ms": await host_lost(),
    }
