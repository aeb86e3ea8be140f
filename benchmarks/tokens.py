"""From the end of a rank to new tokens on the last of its streams, on the reference engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.cluster import say
from benchmarks.figures import figure
from benchmarks.moments import History, Moment, phases_ms
from raddle import traces
from raddle.cli.cluster import LocalCluster
from raddle.cli.demo.client import get_text, stream_events
from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.traces import TraceRequest
from raddle.v1 import job_pb2, scheduler_pb2
from raddle.wire.parse import job_message

KILLS = 52
HANGS = 10
HOSTS = 5
STREAMS = 16
DECODE_RANKS = 16
SAMPLES_A_CLUSTER = 13
_MOVE_TIMEOUT_S = 60.0
_RETRY_S = 0.05
# The job has just started: first prompts and new connections are not what is measured.
_SETTLE_S = 1.0
# The demonstration's model with two layers: 20 ranks share the two cores of this measurement.
MODEL = str(Path(__file__).parent / "two_layers.json")
SPEC = """
name: small
model: {config: %s, kv_block_tokens: 16}
roles:
  - {name: prefill, kind: prefill, ranks: 2, slots_per_rank: 32, engine: {driver: reference}}
  - {name: decode, kind: decode, ranks: %d, slots_per_rank: 4, spread_nodes: 4,
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
    """A cluster on which the job is placed anew, with a front door of its own, for each sample."""

    def __init__(self, cluster: LocalCluster, history: History) -> None:
        self.cluster = cluster
        self.history = history
        self.uid = ""
        self.address = ""
        #: What recoveries of decode instances did, by the number of times.
        self.options: Counter[str] = Counter()

    async def _ask(self, call: Callable[[], Any], what: str) -> Any:
        """What a scheduler answers; asked again while it refuses or the lead changes."""
        found: list[Any] = []

        async def answered() -> bool:
            found.append(await call())
            return True

        await self.cluster.until(answered, what)
        return found[0]

    async def job(self) -> Any:
        request = scheduler_pb2.GetJobRequest(job_uid=self.uid)
        return await self._ask(
            lambda: self.cluster.stub.GetJob(request, timeout=5.0), "a scheduler answers"
        )

    async def settled(self, epoch: int) -> None:
        async def ready() -> bool:
            job = (await self.job()).job
            return bool(job.state == job_pb2.JOB_STATE_READY and job.live_epoch >= epoch)

        await self.cluster.until(ready, f"epoch {epoch} is live")

    async def place(self) -> None:
        """Submit the job and start its front door: all ranks and their processes are new."""
        spec = job_message(SPEC % (MODEL, DECODE_RANKS), self.cluster.folder)
        request = scheduler_pb2.SubmitJobRequest(spec=spec)
        self.uid = (await self.cluster.stub.SubmitJob(request, timeout=10.0)).job.uid
        await self.settled(1)
        self.address = self.cluster.start_front_door("default/small", MODEL)

        async def live() -> bool:
            with suppress(OSError):
                return (await get_text(self.address, "/health"))[0] == 200
            return False

        await self.cluster.until(live, "the front door has routes")

    async def remove(self) -> None:
        """End the job and its front door, and wait until no process of it is left."""
        door = self.cluster.children.pop("frontdoor")
        door.process.kill()
        await asyncio.to_thread(door.process.wait)
        stub = self.cluster.stub
        await stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=self.uid), timeout=10.0)
        request = scheduler_pb2.DeleteJobRequest(job_uid=self.uid)
        await self._ask(lambda: stub.DeleteJob(request, timeout=5.0), "the job has ended")

    async def decode_ranks(self) -> dict[str, tuple[int, str]]:
        """Incarnation -> (process, node) of the living decode ranks."""
        processes = self.cluster.rank_processes()
        return {
            r.incarnation: (processes[r.incarnation], "/".join(r.die.split("/")[:2]))
            for r in (await self.job()).ranks
            if r.role == "decode" and r.incarnation in processes
        }

    def _commits(self) -> list[tuple[float, dict[str, int]]]:
        """When the leaders had their commits confirmed, and of which epochs of which jobs."""
        found: list[tuple[float, dict[str, int]]] = []
        for path in self.cluster.folder.glob("logs/scheduler-*.log"):
            for line in path.read_text().splitlines():
                if '"event": "committed"' in line:
                    told = json.loads(line)
                    wall_s = datetime.fromisoformat(told["timestamp"]).timestamp()
                    found.append((self.history.monotonic_s(wall_s), told.get("jobs", {})))
        return sorted(found, key=lambda commit: commit[0])

    async def recovery(self, began_s: float, end_s: float) -> list[Moment]:
        """What led to the epoch that served the last stream's first new token."""
        began, commits = self.history.began, self._commits()
        for epoch in range((await self.job()).job.live_epoch, 1, -1):
            incident = await self.history.closed_incident(self.uid, epoch, began_s)
            publish_s = began(incident, IncidentPhase.PUBLISH) or end_s
            live_s = [s for s, jobs in commits if s >= publish_s and jobs.get(self.uid) == epoch]
            # A second loss may have been dealt with after the streams were back.
            if live_s and live_s[0] <= end_s:
                parts = [part for plan in incident.plans for part in plan.instances]
                self.options.update(str(p.option) for p in parts if p.role == "decode")
                return [
                    ("detect", began(incident, IncidentPhase.DETECT)),
                    ("gather", began(incident, IncidentPhase.DECIDE)),
                    ("decide_and_commit", began(incident, IncidentPhase.FENCE)),
                    ("fence", began(incident, IncidentPhase.REPAIR)),
                    ("repair", publish_s),
                    ("publish", live_s[0]),
                ]
        raise AssertionError(f"{self.uid}: no epoch went live before the last stream's new token")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Serving]:
    """Start the small machine: 4 nodes of 8 dies, all real. Processes are forked, to be quick."""
    machine = str(Path(__file__).parent / "four_nodes.yaml")
    with TemporaryDirectory(prefix="raddle-bench-") as folder:
        cluster = LocalCluster(Path(folder), machine=machine, real_nodes=4, **options)
        history: History | None = None
        try:
            await cluster.start()
            history = History(cluster.etcd_endpoints, keys.INCIDENTS)
            await history.start()
            yield Serving(cluster, history)
        finally:
            if history is not None:
                await history.stop()
            await cluster.stop()


# Makes a fault happen to the busiest rank; gives the moment and what was lost.
Fault = Callable[[Serving, Streams], Awaitable[tuple[float, set[str]]]]


async def _busiest(run: Serving, streams: Streams) -> tuple[str, int, str]:
    """(incarnation, process, node) of the decode rank with the most streams."""
    ranks = await run.decode_ranks()
    assert len(ranks) == DECODE_RANKS, f"{len(ranks)} decode ranks live"
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


async def _sample(run: Serving, fault: Fault, detect: str) -> tuple[float, dict[str, float]]:
    """Milliseconds from a fault to the last stream's new token, and of which phase."""
    await run.place()
    streams = Streams(run.address)
    try:
        await streams.all_flow()
        await asyncio.sleep(_SETTLE_S)
        began_s, lost = await fault(run, streams)
        touched = streams.on(lost)
        end_s = await streams.moved(touched, lost)
        await run.settled(2)
    finally:
        await streams.stop()
    (_, detected_s), *recovery = await run.recovery(began_s, end_s)
    moments = [(detect, detected_s), *recovery, ("new_tokens", end_s)]
    return (end_s - began_s) * 1e3, phases_ms(began_s, moments)


async def _figure(
    name: str, count: int, a_cluster: int, fault: Fault, detect: str, **options: Any
) -> dict[str, Any]:
    """A job of its own for each sample, since lost ranks are not replaced."""
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    recovered_by: Counter[str] = Counter()
    while len(samples) < count:
        async with serving(**options) as run:
            for number in range(min(a_cluster, count - len(samples))):
                if number:
                    await run.remove()
                total_ms, told = await _sample(run, fault, detect)
                samples.append(total_ms)
                phases.append(told)
            recovered_by += run.options
        say(f"{name}: {len(samples)} of {count}, last {samples[-1]:.0f} ms")
    more: dict[str, Any] = {"decode_ranks": DECODE_RANKS, "streams": STREAMS}
    more["recovered_by"] = dict(recovered_by)
    return figure(samples, phases, **more)


async def killed(count: int = KILLS) -> dict[str, Any]:
    name = "rank_killed_to_token_ms"
    return await _figure(name, count, SAMPLES_A_CLUSTER, _kill, "end_seen_and_told")


async def hung(count: int = HANGS) -> dict[str, Any]:
    name = "rank_hung_to_token_ms"
    return await _figure(name, count, SAMPLES_A_CLUSTER, _stop, "step_deadline_and_probe")


async def host_lost(count: int = HOSTS) -> dict[str, Any]:
    name = "host_with_leader_to_token_ms"
    return await _figure(name, count, 1, _kill_host, "takeover_and_judgement", schedulers=2)


async def measure() -> dict[str, Any]:
    return {
        "rank_killed_to_token_ms": await killed(),
        "rank_hung_to_token_ms": await hung(),
        "host_with_leader_to_token_ms": await host_lost(),
    }
