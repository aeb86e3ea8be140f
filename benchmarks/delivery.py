"""From a fault to the last agent's decoded assignment; the whole machine placed anew."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from benchmarks.cluster import TimedCluster, say, timed_cluster
from benchmarks.figures import figure
from benchmarks.moments import History, decision, phases_ms, with_key
from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.model.job import JobState
from raddle.v1 import scheduler_pb2

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


async def _one_fault(
    cluster: TimedCluster, history: History, uid: str
) -> tuple[float, dict[str, float]]:
    """Milliseconds from the source to the last agent, and of which phase."""
    job = await cluster.job(uid)
    epoch = job.job.epoch + 1
    active = [r for p in job.placement.instances for r in p.ranks if r.state == "ACTIVE"]
    ranks = Counter(r.node for r in active)
    # Of the fullest node, so that the job goes on spanning all of them.
    die = max(active, key=lambda r: ranks[r.node]).die
    await cluster.set_fault(die, present=True)
    agents = cluster.supernode.nodes
    await cluster.until_heard(lambda: len(cluster.delivered[uid, epoch]) >= agents)
    last = max(cluster.delivered[uid, epoch].values(), key=lambda told: told.decoded)
    await cluster.ready(uid, epoch)
    began_s = cluster.faults[die] / 1e9
    incident = await history.closed_incident(uid, epoch, began_s)
    journal = with_key(keys.incident(incident.id))
    committed = history.find(journal, began_s, lambda value: value is not None)
    assert committed is not None
    moments = [
        # The agent's transaction, and the leader's watch.
        ("report", history.began(incident, IncidentPhase.DETECT)),
        *decision(history, cluster.times, incident),
        ("commit", committed[0]),
        # The processes' event loops are part of it: six agents share one, and the machine is full.
        ("etcd_to_agent", last.arrived / 1e9),
        ("decode", last.decoded / 1e9),
    ]
    return (last.decoded - cluster.faults[die]) / 1e6, phases_ms(began_s, moments)


async def fault_to_delivered(
    cluster: TimedCluster, history: History, count: int = FAULTS
) -> dict[str, Any]:
    """`fault_to_delivered_ms`."""
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    while len(samples) < count:
        uid = await cluster.submit(WIDE)
        await cluster.ready(uid)
        faulty = len(cluster.faults)
        for _ in range(min(FAULTS_A_JOB, count - len(samples))):
            total_ms, told = await _one_fault(cluster, history, uid)
            samples.append(total_ms)
            phases.append(told)
        await cluster.remove(uid)
        for die in list(cluster.faults)[faulty:]:
            await cluster.set_fault(die, present=False)
        say(f"fault_to_delivered_ms: {len(samples)} of {count}")
        cluster.delivered.clear()
        cluster.faults.clear()
    agents = cluster.supernode.nodes
    return figure(samples, phases, agents=agents, agent_processes=cluster.agent_processes)


async def replan(cluster: TimedCluster, history: History, count: int = REPLANS) -> dict[str, Any]:
    """`replan_whole_machine_s`: 96 waiting gangs of 8 dies fill the machine at once."""
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    for _ in range(count):
        seconds, told = await _one_replan(cluster, history)
        samples.append(seconds)
        phases.append(told)
        cluster.delivered.clear()
    return figure(samples, phases, unit_ms=1e3, gangs=GANGS)


async def _one_replan(cluster: TimedCluster, history: History) -> tuple[float, dict[str, float]]:
    """Seconds from the moment the machine may be used until the last gang is delivered."""
    subject = cluster.supernode.name
    await cluster.stub.Cordon(scheduler_pb2.CordonRequest(subject=subject), timeout=5.0)
    uids = [await cluster.submit(GANG % number) for number in range(GANGS)]
    began_s = time.monotonic()
    await cluster.stub.Uncordon(scheduler_pb2.UncordonRequest(subject=subject), timeout=5.0)
    await cluster.until_heard(lambda: all(cluster.delivered.get((uid, 1)) for uid in uids))
    told = [told for uid in uids for told in cluster.delivered[uid, 1].values()]
    last = max(told, key=lambda one: one.decoded)
    placed_s = [await _placed(history, uid, began_s) for uid in uids]
    for uid in uids:
        await cluster.ready(uid)
        await cluster.remove(uid)
    moments = [
        # Each transaction takes as many gangs as it has room for.
        ("first_decided_and_committed", min(placed_s)),
        ("others_decided_and_committed", max(placed_s)),
        ("etcd_to_agent", last.arrived / 1e9),
        ("decode", last.decoded / 1e9),
    ]
    return last.decoded / 1e9 - began_s, phases_ms(began_s, moments)


async def _placed(history: History, uid: str, after_s: float) -> float:
    """When the job was seen to be placed."""
    moment_s, _ = await history.wait(
        with_key(keys.job(uid)), after_s, lambda job: job and job.state is JobState.STARTING
    )
    return moment_s


async def measure(faults: int = FAULTS, replans: int = REPLANS) -> dict[str, Any]:
    """Both figures, on one cluster of 48 agents."""
    async with timed_cluster() as cluster:
        history = History(cluster.etcd_endpoints, keys.INCIDENTS, keys.JOBS)
        await history.start()
        try:
            return {
                "fault_to_delivered_ms": await fault_to_delivered(cluster, history, faults),
                "replan_whole_machine_s": await replan(cluster, history, replans),
            }
        finally:
            await history.stop()
