"""The control plane's share of a recovery: the same recovery with ranks that take no time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.cluster import TimedCluster, say, timed_cluster
from benchmarks.figures import figure
from raddle.model.routes import RouteState
from raddle.telemetry.channels import make_channel
from raddle.v1 import incident_pb2, router_pb2, router_pb2_grpc, scheduler_pb2

FOUR_NODES = str(Path(__file__).parent / "four_nodes.yaml")
RECOVERIES = 105
A_JOB = 15
# The job of `rank_killed_to_token_ms` on simulated engines.
SPEC = """
name: small
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: prefill, kind: prefill, ranks: 2, slots_per_rank: 32, engine: {driver: simulated}}
  - {name: decode, kind: decode, ranks: 24, slots_per_rank: 4, spread_nodes: 4,
     max_sequences_per_rank: 16, engine: {driver: simulated}}
  - {name: cache, kind: cache, ranks: 2, dram_bytes: 400000000, engine: {driver: simulated}}
"""


class Router:
    """A router's view: when each epoch's routes went live here."""

    def __init__(self, cluster: TimedCluster) -> None:
        self.live: dict[int, float] = {}
        self._channel = make_channel(cluster.addresses[0], identity="client/bench")
        self._task = asyncio.create_task(self._follow())
        self._moved = asyncio.Event()

    async def _follow(self) -> None:
        stub: Any = router_pb2_grpc.RouterStub(self._channel)
        request = router_pb2.WatchRoutesRequest(
            front_door_id="bench", namespace="default", name="small"
        )
        wanted = router_pb2.RouteState.Value(f"ROUTE_STATE_{RouteState.LIVE}")
        async for message in stub.WatchRoutes(request):
            if message.routes.state == wanted:
                self.live.setdefault(message.routes.epoch, time.monotonic())
                self._moved.set()

    async def is_live(self, epoch: int) -> float:
        while epoch not in self.live:
            self._moved.clear()
            await self._moved.wait()
        return self.live[epoch]

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._channel.close()


async def _recoveries(cluster: TimedCluster, count: int) -> list[tuple[float, dict[str, float]]]:
    uid = await cluster.submit(SPEC)
    await cluster.ready(uid)
    router = Router(cluster)
    found = []
    for _ in range(count):
        job = await cluster.job(uid)
        decode = [p for p in job.placement.instances if p.role == "decode"]
        die = next(r.die for p in decode for r in p.ranks if r.state == "ACTIVE")
        epoch = job.job.epoch + 1
        cluster.faults.pop(die, None)
        await cluster.set_fault(die, present=True)
        live = await router.is_live(epoch)
        await cluster.ready(uid, epoch)
        request = scheduler_pb2.ListIncidentsRequest(job_uid=uid, page_size=1)
        incident = (await cluster.stub.ListIncidents(request, timeout=5.0)).incidents[0]
        phases = {
            incident_pb2.IncidentPhase.Name(e.phase).removeprefix("INCIDENT_PHASE_").lower(): (
                e.duration.seconds * 1e3 + e.duration.nanos / 1e6
            )
            for e in incident.timeline
        }
        # The publish phase ends with the ranks' words, after the routes are live.
        phases.pop("publish", None)
        total_ms = live * 1e3 - cluster.faults[die] / 1e6
        rest = max(0.0, total_ms - sum(phases.values()))
        found.append((total_ms, phases | {"report_and_routes": rest}))
        await cluster.set_fault(die, present=False)
    await router.stop()
    await cluster.remove(uid)
    return found


async def measure() -> dict[str, Any]:
    """`control_plane_ms`: from the source's event to live routes at a router."""
    found: list[tuple[float, dict[str, float]]] = []
    async with timed_cluster(machine=FOUR_NODES, agent_processes=4) as cluster:
        while len(found) < RECOVERIES:
            found += await _recoveries(cluster, min(A_JOB, RECOVERIES - len(found)))
            say(f"control_plane_ms: {len(found)} of {RECOVERIES}")
    return {"control_plane_ms": figure([t for t, _ in found], [p for _, p in found])}
