"""CPU time of pure decisions: a long queue, and machines of growing size."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cluster import say
from benchmarks.figures import figure
from raddle.core.cluster import Cluster
from raddle.core.events import RecordChanged, RequestReceived, Woken
from raddle.core.instructions import Commit, WakeAt
from raddle.core.machine import Machine
from raddle.core.placement.gang import PlacedJob, place_job
from raddle.core.requests import ApplySuperNode, CancelJob, SubmitJob
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.health import AgentHealth, AgentRegistration
from raddle.model.job import JobSpec, JobState
from raddle.wire import parse
from raddle.wire.parse import job_message

WAITING = 10_000
DECISIONS = 200
SUPERNODES = (1, 2, 4, 8, 16, 32, 64, 128)
GANG = """
name: gang
model: {config: raddle-demo, kv_block_tokens: 16}
roles:
  - {name: decode, kind: decode, ranks: 8, slots_per_rank: 4, engine: {driver: simulated}}
"""
EP320 = """
name: ep320
model: {config: deepseek-r1}
roles:
  - {name: decode, kind: decode, ranks: 320, slots_per_rank: 1, engine: {driver: simulated}}
"""


def spec_of(text: str) -> JobSpec:
    return parse.job_spec(job_message(text, Path()))


class Driven:
    """A machine whose commits always succeed at once."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.machine = Machine({}, now=self.now)
        self._requests = 0
        supernode = load_machine("cloudmatrix384")
        self.ask(ApplySuperNode(supernode=supernode))
        for node in supernode.node_names():
            registration = AgentRegistration(
                node=node, drivers=("simulated",), host_memory_bytes=10**12
            )
            self.handle(RecordChanged(keys.health(node), AgentHealth(node=node)))
            self.handle(RecordChanged(keys.registration(node), registration))

    def handle(self, *events: Any) -> float:
        """CPU milliseconds of one decision; what it asks to be looked at again is done untimed."""
        self.now += 0.001
        began = time.thread_time()
        out = self.machine.handle(events, now=self.now)
        spent_ms = (time.thread_time() - began) * 1e3
        while any(isinstance(i, WakeAt) and i.time_s <= self.now for i in out) and any(
            isinstance(i, Commit) for i in out
        ):
            self.now += 0.001
            out = self.machine.handle([Woken()], now=self.now)
        return spent_ms

    def ask(self, request: Any) -> float:
        self._requests += 1
        return self.handle(RequestReceived(f"r{self._requests}", "client/bench", request))


def decision_with_waiting(waiting: int = WAITING, decisions: int = DECISIONS) -> dict[str, Any]:
    """`decision_10000_waiting_ms`: a gang ends, and of 10,000 that wait the next one is placed."""
    driven = Driven()
    spec = spec_of(GANG)
    for number in range(waiting + 96):
        named = replace(spec, name=f"gang-{number}", priority=number % 7)
        driven.ask(SubmitJob(spec=named, job_uid=f"j-{number:06d}", spec_digest="d"))
    state = driven.machine.context.state
    running = [job.uid for job in state.jobs() if job.state is JobState.STARTING]
    samples = []
    for _ in range(decisions):
        samples.append(driven.ask(CancelJob(job_uid=running.pop(0))))
        running += [
            uid for uid in state.stages if uid not in running and state.job(uid) is not None
        ]
    return figure(samples, waiting=len(state.waiting), cpu_time=True)


def decision_by_dies() -> dict[str, Any]:
    """`decision_ms_by_dies`: placing one EP320 gang, from one supernode to 128."""
    spec = spec_of(EP320)
    one = load_machine("cloudmatrix384")
    curve = {}
    for count in SUPERNODES:
        machines = [replace(one, name=f"sn{number}") for number in range(count)]
        cluster = Cluster(machines)
        for node in cluster.node_names:
            cluster.set_node(node, ready=True, drivers=("simulated",), host_memory_bytes=10**12)
        samples = []
        for _ in range(20):
            began = time.thread_time()
            placed = place_job(spec, cluster)
            samples.append((time.thread_time() - began) * 1e3)
            assert isinstance(placed, PlacedJob), placed
        curve[str(cluster.dies)] = figure(samples)
        say(f"decision_ms_by_dies: {cluster.dies} dies, {curve[str(cluster.dies)]['p50']} ms")
    largest = curve[str(one.dies * SUPERNODES[-1])]
    return largest | {"by_dies": curve, "cpu_time": True}


def measure() -> dict[str, Any]:
    return {
        "decision_10000_waiting_ms": decision_with_waiting(),
        "decision_ms_by_dies": decision_by_dies(),
    }
