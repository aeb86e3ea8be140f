"""From a fault to the last agent's decoded assignment; the whole machine placed anew."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from benchmarks.cluster import TimedCluster, say, timed_cluster
from benchmarks.figures import figure
from raddle.v1 import incident_pb2, scheduler_pb2

FAULTS = 210
FAULTS_A_JOB = 30
REPLANS = 5
GANGS = 96
# One EP288 instance of DeepSeek-R1 (256 experts, 32 of them twice), 6 dies on each of 48 nodes.
WIDE = """
name: wide
model: {config: deepseek-r1}
roles:
  - {name: decode, kind: decode, ranks: 288, slots_per_rank: 1, spread_nodes: 48,
     engine: {driver: simulated}}
"""
GANG = """
name: gang-%d
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: decode, kind: decode, ranks: 8, slots_per_rank: 4, engine: {driver: simulated}}
"""


async def _one_fault(cluster: TimedCluster, uid: str, nodes: int) -> tuple[float, dict[str, float]]:
    """Milliseconds from the source to the last agent, and of which phase."""
    job = await cluster.job(uid)
    epoch = job.job.epoch + 1
    active = [r for p in job.placement.instances for r in p.ranks if r.state == "ACTIVE"]
    ranks = Counter(r.node for r in active)
    # Of the fullest node, so that the job goes on spanning all of them.
    die = max(active, key=lambda r: ranks[r.node]).die
    await cluster.set_fault(die, present=True)
    await cluster.until_heard(lambda: len(cluster.delivered[uid, epoch]) >= nodes)
    last = max(cluster.delivered[uid, epoch].values())
    await cluster.ready(uid, epoch)
    request = scheduler_pb2.ListIncidentsRequest(job_uid=uid, page_size=1)
    incident = (await cluster.stub.ListIncidents(request, timeout=5.0)).incidents[0]
    total_ms = (last - cluster.faults[die]) / 1e6
    phases = {
        incident_pb2.IncidentPhase.Name(entry.phase).removeprefix("INCIDENT_PHASE_").lower(): (
            entry.duration.seconds * 1e3 + entry.duration.nanos / 1e6
        )
        for entry in incident.timeline
    }
    told = {"gather": phases["detect"], "decide_and_commit": phases["decide"]}
    return total_ms, told | {"report_and_deliver": total_ms - sum(told.values())}


async def fault_to_delivered(cluster: TimedCluster) -> dict[str, Any]:
    """`fault_to_delivered_ms`."""
    nodes = cluster.supernode.nodes
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    while len(samples) < FAULTS:
        uid = await cluster.submit(WIDE)
        await cluster.ready(uid)
        faulty = len(cluster.faults)
        for _ in range(min(FAULTS_A_JOB, FAULTS - len(samples))):
            total_ms, told = await _one_fault(cluster, uid, nodes)
            samples.append(total_ms)
            phases.append(told)
        await cluster.remove(uid)
        for die in list(cluster.faults)[faulty:]:
            await cluster.set_fault(die, present=False)
        say(f"fault_to_delivered_ms: {len(samples)} of {FAULTS}")
        cluster.delivered.clear()
        cluster.faults.clear()
    return figure(samples, phases, agents=nodes, agent_processes=cluster.agent_processes)


async def replan(cluster: TimedCluster) -> dict[str, Any]:
    """`replan_whole_machine_s`: 96 waiting gangs of 8 dies fill the machine at once."""
    samples = []
    for _ in range(REPLANS):
        samples.append(await _one_replan(cluster))
        cluster.delivered.clear()
    return figure(samples, gangs=GANGS)


async def _one_replan(cluster: TimedCluster) -> float:
    """Seconds from the moment the machine may be used until the last gang is delivered."""
    subject = cluster.supernode.name
    await cluster.stub.Cordon(scheduler_pb2.CordonRequest(subject=subject), timeout=5.0)
    uids = [await cluster.submit(GANG % number) for number in range(GANGS)]
    began = time.monotonic_ns()
    await cluster.stub.Uncordon(scheduler_pb2.UncordonRequest(subject=subject), timeout=5.0)
    await cluster.until_heard(lambda: all(cluster.delivered.get((uid, 1)) for uid in uids))
    last = max(t for uid in uids for t in cluster.delivered[uid, 1].values())
    for uid in uids:
        await cluster.ready(uid)
        await cluster.remove(uid)
    return (last - began) / 1e9


async def measure() -> dict[str, Any]:
    """Both figures, on one cluster of 48 agents."""
    async with timed_cluster() as cluster:
        found = {"fault_to_delivered_ms": await fault_to_delivered(cluster)}
        return found | {"replan_whole_machine_s": await replan(cluster)}
