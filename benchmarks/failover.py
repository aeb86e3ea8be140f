"""Leaders and nodes that go: until the next decision, until no new work, until the recovery."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from benchmarks.cluster import TimedCluster, say, timed_cluster
from benchmarks.figures import figure
from raddle.core.nodes import LEASE_TTL_S
from raddle.model import keys
from raddle.store.etcd.store import EtcdStore
from raddle.store.follow import follow
from raddle.store.protocol import Snapshot
from raddle.v1 import scheduler_pb2

LEADERS_KILLED = 20
LEADERS_HUNG = 10
NODES = 10
MACHINE = "nvl72"
JOB = """
name: wide
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: decode, kind: decode, ranks: 36, slots_per_rank: 4, spread_nodes: 18,
     engine: {driver: simulated}}
"""


class Incidents:
    """When each incident was first seen in etcd's history."""

    def __init__(self, endpoints: str) -> None:
        self._store = EtcdStore(endpoints.split(","), "default", operation_key="operations/bench")
        self.seen: dict[str, float] = {}
        self._moved = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for item in follow(self._store, keys.INCIDENTS):
            records = (
                item.records if isinstance(item, Snapshot) else [c.record for c in item.changes]
            )
            for record in records:
                if record is not None:
                    self.seen.setdefault(record.key, time.monotonic())
            self._moved.set()

    async def next_after(self, known: set[str]) -> float:
        while True:
            new = [moment for key, moment in self.seen.items() if key not in known]
            if new:
                return min(new)
            self._moved.clear()
            await self._moved.wait()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._store.close()


async def _leader(cluster: TimedCluster) -> int:
    found: list[int] = []

    async def known() -> bool:
        request = scheduler_pb2.GetStatusRequest()
        identity = (await cluster.stub.GetStatus(request, timeout=2.0)).leader_identity
        if identity:
            found.append(int(identity.rsplit("-", 1)[1]))
        return bool(found)

    await cluster.until(known, "somebody leads")
    return found[0]


async def _some_die(cluster: TimedCluster, uid: str) -> str:
    job = await cluster.job(uid)
    return str(next(r.die for p in job.placement.instances for r in p.ranks if r.state == "ACTIVE"))


async def _leader_lost(
    cluster: TimedCluster, incidents: Incidents, number: signal.Signals
) -> float:
    """Seconds until a fault that met no leader is decided by the next one."""
    uid = await cluster.submit(JOB)
    await cluster.ready(uid)
    leader = await _leader(cluster)
    await cluster.connect((leader + 1) % 2)
    die, known = await _some_die(cluster, uid), set(incidents.seen)
    name = f"scheduler-{leader}"
    child = cluster.children.pop(name)
    began = time.monotonic()
    child.process.send_signal(number)
    await cluster.set_fault(die, present=True)
    seconds = await incidents.next_after(known) - began
    if number is signal.SIGKILL:
        child.process.wait()
        cluster.start_scheduler(leader)
    else:
        child.process.send_signal(signal.SIGCONT)
        cluster.children[name] = child
    await cluster.set_fault(die, present=False)
    await cluster.ready(uid, 2)
    await cluster.remove(uid)
    return seconds


async def leaders() -> dict[str, Any]:
    """`leader_killed_to_decision_s` and `leader_hung_to_decision_s`."""
    found: dict[str, list[float]] = {"killed": [], "hung": []}
    for _ in range(LEADERS_KILLED // 10):
        async with timed_cluster(machine=MACHINE, schedulers=2, agent_processes=2) as cluster:
            incidents = Incidents(cluster.etcd_endpoints)
            for _ in range(10):
                found["killed"].append(await _leader_lost(cluster, incidents, signal.SIGKILL))
            await incidents.stop()
        say(f"leader_killed_to_decision_s: {len(found['killed'])} of {LEADERS_KILLED}")
    # A woken leader is slow to take over again, so each hang has a cluster of its own.
    while len(found["hung"]) < LEADERS_HUNG:
        async with timed_cluster(machine=MACHINE, schedulers=2, agent_processes=2) as cluster:
            incidents = Incidents(cluster.etcd_endpoints)
            found["hung"].append(await _leader_lost(cluster, incidents, signal.SIGSTOP))
            await incidents.stop()
        say(f"leader_hung_to_decision_s: {len(found['hung'])} of {LEADERS_HUNG}")
    return {f"leader_{how}_to_decision_s": figure(samples) for how, samples in found.items()}


async def _no_new_work(cluster: TimedCluster, node: str) -> float:
    while True:
        answer = await cluster.stub.ListNodes(scheduler_pb2.ListNodesRequest(), timeout=5.0)
        if next(n.state for n in answer.nodes if n.node == node) != "READY":
            return time.monotonic()
        await asyncio.sleep(0.002)


async def _node_lost(
    cluster: TimedCluster, incidents: Incidents, uid: str, node: str, number: signal.Signals
) -> tuple[float, float]:
    """Seconds until no new work goes to a node, and until its ranks are being recovered."""
    names = list(cluster.supernode.node_names())
    child = cluster.children.pop(f"agents-{names.index(node)}")
    known, epoch = set(incidents.seen), (await cluster.job(uid)).job.epoch
    began = time.monotonic()
    os.kill(child.process.pid, number)
    unused = await _no_new_work(cluster, node) - began
    recovering = await incidents.next_after(known) - began
    if number is signal.SIGSTOP:
        os.kill(child.process.pid, signal.SIGCONT)
        child.process.kill()
    await cluster.ready(uid, epoch + 1)
    return unused, recovering


async def nodes() -> dict[str, Any]:
    """Nodes of which each has an agent process of its own, with its simulated ranks in it."""
    found: dict[str, list[float]] = {"unused": [], "killed": [], "hung": []}
    for number in (signal.SIGKILL, signal.SIGSTOP):
        while len(found["killed" if number is signal.SIGKILL else "hung"]) < NODES:
            async with timed_cluster(machine=MACHINE, agent_processes=18) as cluster:
                incidents = Incidents(cluster.etcd_endpoints)
                uid = await cluster.submit(JOB)
                await cluster.ready(uid)
                # A new leader believes no silence for one lease time.
                await asyncio.sleep(LEASE_TTL_S + 0.5)
                for _ in range(5):
                    die = await _some_die(cluster, uid)
                    node = "/".join(die.split("/")[:2])
                    both = await _node_lost(cluster, incidents, uid, node, number)
                    # The storm brake counts losses of the last eight seconds together.
                    await asyncio.sleep(2.5)
                    if number is signal.SIGKILL:
                        found["unused"].append(both[0])
                        found["killed"].append(both[1])
                    else:
                        found["hung"].append(both[1])
                await incidents.stop()
            say(f"node figures: {len(found['killed'])} killed, {len(found['hung'])} hung")
    return {
        "node_killed_to_no_new_work_s": figure(found["unused"]),
        "node_killed_to_recovering_s": figure(found["killed"]),
        "node_hung_to_recovering_s": figure(found["hung"]),
    }


async def measure() -> dict[str, Any]:
    return await leaders() | await nodes()
