"""CPU time of pure decisions: a long queue, and machines of growing size."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Self
from unittest.mock import patch

from benchmarks.cluster import say
from benchmarks.figures import figure
from raddle.core import lifecycle
from raddle.core.cluster import Cluster
from raddle.core.events import RecordChanged, RequestReceived, Woken
from raddle.core.instructions import Commit, WakeAt
from raddle.core.machine import Machine
from raddle.core.placement import gang
from raddle.core.placement.gang import PlacedJob
from raddle.core.requests import ApplySuperNode, CancelJob, SubmitJob
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.health import AgentHealth, AgentRegistration
from raddle.model.job import EngineSpec, JobSpec, RoleSpec
from raddle.model.kinds import RoleKind
from raddle.wire import parse
from raddle.wire.parse import job_message

DRIVERS = ("reference", "simulated")
WAITING = 10_000
DECISIONS = 200
#: Of raddle-demo.
EXPERTS = 32
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


class Parts:
    """CPU milliseconds in some functions of the core, which do not call one another."""

    def __init__(self) -> None:
        self._spent_ms: dict[str, float] = {}
        self._restore = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def time(self, module: ModuleType, function: str, phase: str) -> None:
        """Count the function's time as that phase; a call costs a microsecond more."""
        work: Callable[..., Any] = getattr(module, function)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return work(*args, **options)
            finally:
                spent_ms = (time.thread_time() - began) * 1e3
                self._spent_ms[phase] = self._spent_ms.get(phase, 0.0) + spent_ms

        self._restore.enter_context(patch.object(module, function, timed))

    def clear(self) -> None:
        self._spent_ms = {}

    def take(self, total_ms: float, *, rest: str) -> dict[str, float]:
        """The phases since the last `take` or `clear`; `rest` is what none of them took."""
        spent_ms, self._spent_ms = self._spent_ms, {}
        return spent_ms | {rest: total_ms - sum(spent_ms.values())}


class Driven:
    """A machine whose commits always succeed at once."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.machine = Machine({}, now=self.now)
        self._requests = 0
        supernode = load_machine("cloudmatrix384")
        self.ask(ApplySuperNode(supernode=supernode))
        for node in supernode.node_names():
            registration = AgentRegistration(node=node, drivers=DRIVERS, host_memory_bytes=10**12)
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

    def ask(self, *requests: Any) -> float:
        """CPU milliseconds of one decision on all of these requests."""
        events: list[Any] = []
        for request in requests:
            self._requests += 1
            events.append(RequestReceived(f"r{self._requests}", "client/bench", request))
        return self.handle(*events)


def kinds_of_gangs() -> list[JobSpec]:
    """62 shapes: 1 to 16 dies for either driver, on few nodes or spread, of one role or two."""
    base = spec_of(GANG)
    decode = base.roles[0]
    prefill = replace(_with_dies(decode, 2), name="prefill", kind=RoleKind.PREFILL)
    kinds: list[tuple[RoleSpec, ...]] = []
    for dies in range(1, 17):
        whole = _with_dies(decode, dies)
        kinds.append((whole,))
        if dies % 4 == 0:
            kinds += [(replace(whole, spread_nodes=nodes),) for nodes in (2, 4)]
        if dies % 2 == 0 and dies > 2:
            kinds.append((_with_dies(decode, dies - 2), prefill))
    return [
        replace(base, roles=tuple(replace(r, engine=EngineSpec(driver=driver)) for r in roles))
        for roles in kinds
        for driver in DRIVERS
    ]


def _with_dies(role: RoleSpec, dies: int) -> RoleSpec:
    """Of so many ranks, with just the slots that hold all experts of the model."""
    return replace(role, ranks=dies, slots_per_rank=-(-EXPERTS // dies))


class Queue:
    """A full machine, and so many gangs of all kinds that wait for others to end."""

    def __init__(self, waiting: int) -> None:
        self.kinds = kinds_of_gangs()
        self._driven = Driven()
        self._state = self._driven.machine.context.state
        self._waiting = waiting
        self._submitted = 0
        self._running: dict[str, None] = {}
        self.fill()

    def fill(self) -> None:
        """Submit gangs until so many wait; some hundred in one decision, which is not timed."""
        while (lacking := self._waiting - len(self._state.waiting)) > 0:
            asks: list[Any] = []
            for number in range(self._submitted, self._submitted + min(500, lacking)):
                kind = self.kinds[number * 7 % len(self.kinds)]
                spec = replace(kind, name=f"gang-{number}", priority=number % 5)
                asks.append(SubmitJob(spec=spec, job_uid=f"j-{number:06d}", spec_digest="d"))
            self._submitted += len(asks)
            self._driven.ask(*asks)
        self._take_placed()

    def _take_placed(self) -> int:
        """Note the gangs that got dies since the last time; gives how many."""
        new = [uid for uid in self._state.stages if uid not in self._running]
        self._running |= dict.fromkeys(uid for uid in new if self._state.placement(uid))
        return len(new)

    def end_oldest(self) -> float:
        """CPU milliseconds of the decision in which a gang ends and others get its dies."""
        assert len(self._state.waiting) == self._waiting
        oldest = next(iter(self._running))
        spent_ms = self._driven.ask(CancelJob(job_uid=oldest))
        del self._running[oldest]
        assert self._take_placed() > 0, f"{oldest} ended, and no gang was placed"
        return spent_ms


def decision_with_waiting(waiting: int = WAITING, decisions: int = DECISIONS) -> dict[str, Any]:
    """`decision_10000_waiting_ms`: a gang ends, and of 10,000 that wait some are placed."""
    queue = Queue(waiting)
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    with Parts() as parts:
        parts.time(lifecycle, "place_job", "match")
        parts.time(lifecycle, "_initial_maps", "maps")
        for _ in range(decisions):
            parts.clear()
            samples.append(queue.end_oldest())
            phases.append(parts.take(samples[-1], rest="queue_and_records"))
            queue.fill()
    return figure(samples, phases, waiting=waiting, shapes=len(queue.kinds), cpu_time=True)


def decision_by_dies() -> dict[str, Any]:
    """`decision_ms_by_dies`: placing one EP320 gang, from one supernode to 128."""
    spec = spec_of(EP320)
    one = load_machine("cloudmatrix384")
    curve: dict[str, dict[str, Any]] = {}
    for count in SUPERNODES:
        machines = [replace(one, name=f"sn{number}") for number in range(count)]
        cluster = Cluster(machines)
        for node in cluster.node_names:
            cluster.set_node(node, ready=True, drivers=("simulated",), host_memory_bytes=10**12)
        curve[str(cluster.dies)] = _placing(spec, cluster)
        say(f"decision_ms_by_dies: {cluster.dies} dies, {curve[str(cluster.dies)]['p50']} ms")
    largest = curve[str(one.dies * SUPERNODES[-1])]
    return largest | {"by_dies": curve, "cpu_time": True}


def _placing(spec: JobSpec, cluster: Cluster) -> dict[str, Any]:
    samples: list[float] = []
    phases: list[dict[str, float]] = []
    with Parts() as parts:
        parts.time(gang, "_whole_npus", "choose_dies")
        parts.time(gang, "_seats", "name_seats")
        for _ in range(20):
            began = time.thread_time()
            placed = gang.place_job(spec, cluster)
            samples.append((time.thread_time() - began) * 1e3)
            phases.append(parts.take(samples[-1], rest="free_dies"))
            assert isinstance(placed, PlacedJob), placed
    return figure(samples, phases)


def measure() -> dict[str, Any]:
    return {
        "decision_10000_waiting_ms": decision_with_waiting(),
        "decision_ms_by_dies": decision_by_dies(),
    }
