"""Leaders and nodes that go: until the next decision, until no new work, until the recovery."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.cluster import TimedCluster, say, timed_cluster
from benchmarks.figures import figure
from benchmarks.moments import History, Moment, below, decision, phases_ms, with_key
from raddle.core.nodes import LEASE_TTL_S
from raddle.model import keys
from raddle.model.incident import Incident, IncidentPhase
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
#: Seconds, and milliseconds of its phases.

Sample = tuple[float, dict[str, float]]


@asynccontextmanager
async def _watched(**options: Any) -> AsyncIterator[tuple[TimedCluster, History]]:
    """A cluster and the history of its agents and incidents."""
    async with timed_cluster(machine=MACHINE, **options) as cluster:
        history = History(cluster.etcd_endpoints, keys.AGENTS, keys.INCIDENTS)
        await history.start()
        try:
            yield cluster, history
        finally:
            await history.stop()


def _is_plan(value: Any) -> bool:
    return isinstance(value, Incident) and value.phase is IncidentPhase.DECIDE


async def _decided(
    cluster: TimedCluster, history: History, uid: str, epoch: int, began_s: float
) -> tuple[float, list[Moment]]:
    """When the plan for this epoch was seen in etcd's history, and what led to it."""
    incident = await history.closed_incident(uid, epoch, began_s)
    journal = with_key(keys.incident(incident.id))
    committed_s, _ = await history.wait(journal, began_s, lambda value: value is not None)
    known = [*decision(history, cluster.times, incident), ("commit", committed_s)]
    return committed_s, [("loss_known", history.began(incident, IncidentPhase.DETECT)), *known]


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


async def _leader_lost(cluster: TimedCluster, history: History, number: signal.Signals) -> Sample:
    """Seconds until a fault that met no leader is decided by the next one."""
    uid = await cluster.submit(JOB)
    await cluster.ready(uid)
    leader = await _leader(cluster)
    await cluster.connect((leader + 1) % 2)
    die = await _some_die(cluster, uid)
    name = f"scheduler-{leader}"
    child = cluster.children.pop(name)
    began_s = time.monotonic()
    child.process.send_signal(number)
    await cluster.set_fault(die, present=True)
    elected_s, _ = await history.wait(
        with_key(keys.LEADER),
        began_s,
        lambda record: record is not None and record.identity != name,
    )
    # A stopped leader wakes only when the next one has decided.
    await history.wait(below(keys.INCIDENTS), began_s, _is_plan)
    if number is signal.SIGKILL:
        child.process.wait()
        cluster.start_scheduler(leader)
    else:
        child.process.send_signal(signal.SIGCONT)
        cluster.children[name] = child
    await cluster.ready(uid, 2)
    committed_s, known = await _decided(cluster, history, uid, 2, began_s)
    await cluster.set_fault(die, present=False)
    await cluster.remove(uid)
    moments = [
        ("silence_believed", cluster.times.takes(began_s)),
        ("elected", elected_s),
        *known,
    ]
    return committed_s - began_s, phases_ms(began_s, moments)


def _figure_s(samples: Sequence[Sample]) -> dict[str, Any]:
    return figure([total for total, _ in samples], [told for _, told in samples], unit_ms=1e3)


async def leaders(killed: int = LEADERS_KILLED, hung: int = LEADERS_HUNG) -> dict[str, Any]:
    """`leader_killed_to_decision_s` and `leader_hung_to_decision_s`."""
    found: dict[str, list[Sample]] = {"killed": [], "hung": []}
    while len(found["killed"]) < killed:
        async with _watched(schedulers=2, agent_processes=2) as (cluster, history):
            for _ in range(min(10, killed - len(found["killed"]))):
                found["killed"].append(await _leader_lost(cluster, history, signal.SIGKILL))
        say(f"leader_killed_to_decision_s: {len(found['killed'])} of {killed}")
    # A woken leader is slow to take over again, so each hang has a cluster of its own.
    while len(found["hung"]) < hung:
        async with _watched(schedulers=2, agent_processes=2) as (cluster, history):
            found["hung"].append(await _leader_lost(cluster, history, signal.SIGSTOP))
        say(f"leader_hung_to_decision_s: {len(found['hung'])} of {hung}")
    return {f"leader_{how}_to_decision_s": _figure_s(samples) for how, samples in found.items()}


async def _no_new_work(cluster: TimedCluster, node: str) -> float:
    while True:
        answer = await cluster.stub.ListNodes(scheduler_pb2.ListNodesRequest(), timeout=5.0)
        if next(n.state for n in answer.nodes if n.node == node) != "READY":
            return time.monotonic()
        await asyncio.sleep(0.002)


async def _node_lost(
    cluster: TimedCluster, history: History, uid: str, node: str, number: signal.Signals
) -> tuple[float, Sample]:
    """Seconds until no new work goes to a node, and until its ranks are being recovered."""
    names = list(cluster.supernode.node_names())
    child = cluster.children.pop(f"agents-{names.index(node)}")
    epoch = (await cluster.job(uid)).job.epoch + 1
    began_s = time.monotonic()
    os.kill(child.process.pid, number)
    unused_s = await _no_new_work(cluster, node)
    await history.wait(below(keys.INCIDENTS), began_s, _is_plan)
    if number is signal.SIGSTOP:
        os.kill(child.process.pid, signal.SIGCONT)
        child.process.kill()
    await cluster.ready(uid, epoch)
    committed_s, known = await _decided(cluster, history, uid, epoch, began_s)
    lapsed = history.find(with_key(keys.health(node)), began_s, lambda value: value is None)
    assert lapsed is not None or number is signal.SIGKILL
    noticed: Moment = ("stream_ended", unused_s)
    if number is signal.SIGSTOP and lapsed is not None:
        noticed = ("lease_lapsed", lapsed[0])
    (_, judged_s), *decided = known
    moments = [noticed, ("probed_and_judged", judged_s), *decided]
    return unused_s - began_s, (committed_s - began_s, phases_ms(began_s, moments))


async def _some_nodes(number: signal.Signals, count: int) -> list[tuple[float, Sample]]:
    """Nodes of one cluster, lost one after the other."""
    found: list[tuple[float, Sample]] = []
    async with _watched(agent_processes=18) as (cluster, history):
        uid = await cluster.submit(JOB)
        await cluster.ready(uid)
        # A new leader believes no silence for one lease time.
        await asyncio.sleep(LEASE_TTL_S + 0.5)
        for _ in range(count):
            node = "/".join((await _some_die(cluster, uid)).split("/")[:2])
            found.append(await _node_lost(cluster, history, uid, node, number))
            # The storm brake counts losses of the last eight seconds together.
            await asyncio.sleep(2.5)
    return found


async def nodes(count: int = NODES) -> dict[str, Any]:
    """Nodes of which each has an agent process of its own, with its simulated ranks in it."""
    found: dict[str, list[tuple[float, Sample]]] = {"killed": [], "hung": []}
    for how, number in (("killed", signal.SIGKILL), ("hung", signal.SIGSTOP)):
        while len(found[how]) < count:
            found[how] += await _some_nodes(number, min(5, count - len(found[how])))
            say(f"node figures: {len(found['killed'])} killed, {len(found['hung'])} hung")
    unused = [(unused_s, {"stream_ended": unused_s * 1e3}) for unused_s, _ in found["killed"]]
    return {
        "node_killed_to_no_new_work_s": _figure_s(unused),
        "node_killed_to_recovering_s": _figure_s([sample for _, sample in found["killed"]]),
        "node_hung_to_recovering_s": _figure_s([sample for _, sample in found["hung"]]),
    }


async def measure() -> dict[str, Any]:
    return await leaders() | await nodes()
