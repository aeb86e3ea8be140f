"""The control plane's share of a recovery: the same recovery with ranks that take no time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.cluster import TimedCluster, say, timed_cluster
from benchmarks.figures import figure
from benchmarks.moments import History, decision, phases_ms
from benchmarks.timed_agents import BLOCKS_A_SEQUENCE, SEQUENCES, block_hashes
from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.model.routes import RouteState
from raddle.telemetry.channels import make_channel
from raddle.v1 import router_pb2, router_pb2_grpc, types_pb2

FOUR_NODES = str(Path(__file__).parent / "four_nodes.yaml")
RECOVERIES = 105
DECODE_RANKS = 16
BLOCK_TOKENS = 16
# The job of `rank_killed_to_token_ms` on simulated engines.
SPEC = """
name: small
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: prefill, kind: prefill, ranks: 2, slots_per_rank: 32, engine: {driver: simulated}}
  - {name: decode, kind: decode, ranks: 16, slots_per_rank: 4, spread_nodes: 4,
     max_sequences_per_rank: 16, engine: {driver: simulated}}
  - {name: cache, kind: cache, ranks: 2, dram_bytes: 400000000, engine: {driver: simulated}}
"""


class Router:
    """A front door's part: it reports a sequence on each decode rank and follows the routes."""

    def __init__(self, cluster: TimedCluster, uid: str) -> None:
        #: When each epoch's routes went live here.
        self.live: dict[int, float] = {}
        self._uid = uid
        self._channel = make_channel(cluster.addresses[0], identity="frontdoor")
        self._moved = asyncio.Event()
        stub: Any = router_pb2_grpc.RouterStub(self._channel)
        self._tasks = [
            asyncio.create_task(self._follow(stub)),
            asyncio.create_task(self._report(stub)),
        ]

    async def _follow(self, stub: Any) -> None:
        request = router_pb2.WatchRoutesRequest(front_door_id="frontdoor/bench", job_uid=self._uid)
        wanted = router_pb2.RouteState.Value(f"ROUTE_STATE_{RouteState.LIVE}")
        async for message in stub.WatchRoutes(request):
            if message.routes.state == wanted:
                self.live.setdefault(message.routes.epoch, time.monotonic())
                self._moved.set()

    async def _report(self, stub: Any) -> None:
        await stub.ReportSequences(self._sequences())

    async def _sequences(self) -> AsyncIterator[router_pb2.ReportSequencesRequest]:
        tokens = BLOCKS_A_SEQUENCE * BLOCK_TOKENS
        reports = [
            router_pb2.SequenceReport(
                sequence_id=f"s-{number}",
                rank=types_pb2.RankKey(role="decode", rank=number % DECODE_RANKS),
                prompt_tokens=tokens // 2,
                sent_tokens=tokens // 2,
                block_hashes=block_hashes(number),
            )
            for number in range(SEQUENCES)
        ]
        yield router_pb2.ReportSequencesRequest(
            front_door_id="frontdoor/bench", job_uid=self._uid, snapshot=True, updated=reports
        )
        # The stream's end would say that the front door has left.
        await asyncio.Event().wait()

    async def is_live(self, epoch: int) -> float:
        while epoch not in self.live:
            self._moved.clear()
            await self._moved.wait()
        return self.live[epoch]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()


async def _blocks_known(cluster: TimedCluster, uid: str) -> None:
    """The leader knows two copies of every sequence's blocks: the plan restores from the pool."""

    async def known() -> bool:
        status = await cluster.kv_status(uid)
        return bool(sum(status.blocks_by_copies[2:]) == SEQUENCES * BLOCKS_A_SEQUENCE)

    await cluster.until(known, "the leader knows all blocks")


async def _recovery(cluster: TimedCluster, history: History) -> tuple[float, dict[str, float]]:
    """Milliseconds from the end of one of 16 decode ranks to live routes, on a job of its own."""
    uid = await cluster.submit(SPEC)
    await cluster.ready(uid)
    router = Router(cluster, uid)
    await router.is_live(1)
    await _blocks_known(cluster, uid)
    job = await cluster.job(uid)
    decode = next(p for p in job.placement.instances if p.role == "decode")
    ranks = [rank for rank in decode.ranks if rank.state == "ACTIVE"]
    assert len(ranks) == DECODE_RANKS, ranks
    rank = ranks[0]
    cluster.faults.pop(rank.die, None)
    await cluster.end_rank(rank.die)
    live_s = await router.is_live(2)
    began_s = cluster.faults[rank.die] / 1e9
    await cluster.ready(uid, 2)
    incident = await history.closed_incident(uid, 2, began_s)
    assert incident.plans[0].instances[0].kv_tokens_restored, incident.plans
    await router.stop()
    await cluster.remove(uid)
    moments = [
        # The agent's transaction, and the leader's watch.
        ("report", history.began(incident, IncidentPhase.DETECT)),
        *decision(history, cluster.times, incident),
        ("commit", history.began(incident, IncidentPhase.FENCE)),
        ("fence", history.began(incident, IncidentPhase.REPAIR)),
        ("repair", history.began(incident, IncidentPhase.PUBLISH)),
        ("publish", live_s),
    ]
    return (live_s - began_s) * 1e3, phases_ms(began_s, moments)


async def measure(count: int = RECOVERIES) -> dict[str, Any]:
    """`control_plane_ms`: from the end of a rank's process at its agent to live routes at a router.

    The control plane's share of `rank_killed_to_token_ms`: the same job, 16 decode ranks at every
    fault, a sequence of 512 tokens on each of them in the front door's report, their KV blocks in
    the pool, so that the plan restores the lost one. Every agent, the leader, etcd and the stages
    of the protocol are real; the ranks are simulated and acknowledge at once. Not in it: the kernel
    telling an agent that a process ended, RPCs between agents and ranks, what ranks do at each
    stage (members, experts, KV), the front door's part after it has the routes, and waiting for a
    core behind 20 rank processes.
    """
    found: list[tuple[float, dict[str, float]]] = []
    async with timed_cluster(machine=FOUR_NODES, agent_processes=4) as cluster:
        history = History(cluster.etcd_endpoints, keys.INCIDENTS)
        await history.start()
        try:
            while len(found) < count:
                found.append(await _recovery(cluster, history))
                if len(found) % 15 == 0:
                    say(f"control_plane_ms: {len(found)} of {count}")
        finally:
            await history.stop()
    samples, phases = [total for total, _ in found], [told for _, told in found]
    more = {"decode_ranks": DECODE_RANKS, "sequences": SEQUENCES}
    return {"control_plane_ms": figure(samples, phases, **more)}
