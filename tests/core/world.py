"""The core's machine with a store of its records, and agents that do at once what they are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raddle.core.events import (
    AgentStreamBroken,
    Committed,
    Event,
    NodeProbed,
    RecordChanged,
    RequestReceived,
    Woken,
)
from raddle.core.instructions import Commit, ProbeNode, Reply
from raddle.core.machine import Machine
from raddle.core.requests import ApplySuperNode, Request, SubmitJob
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.health import (
    ActiveFault,
    AgentAcks,
    AgentHealth,
    AgentRegistration,
    FaultLevel,
    RankStage,
    RankStatus,
)
from raddle.model.job import AssignmentStage, JobSpec
from raddle.sim.users import job_spec
from raddle.wire import records as wire

_STAGES = {
    AssignmentStage.START: RankStage.STARTED,
    AssignmentStage.PREPARE: RankStage.REPAIRED,
    AssignmentStage.LIVE: RankStage.LIVE,
}


#: (job uid, role, instance, rank, start count)
Process = tuple[str, str, int, int, int]


class World:
    """A machine, a store of its records, and agents that do at once what they are told."""

    def __init__(self) -> None:
        self.store: dict[str, Any] = {}
        self.now = 100.0
        self.term = 1
        self.machine = Machine({}, now=self.now, term=self.term)
        self.dead: set[str] = set()
        #: Processes that ended, and those that are still coming up, by what names a process.
        self.exited: set[Process] = set()
        self.starting: set[Process] = set()
        #: Processes that never came up, as their agents say at last.
        self.gave_up: set[Process] = set()
        #: Nodes whose ranks answer the leader though their agents are silent.
        self.answering: set[str] = set()
        #: Jobs whose ranks are fenced and come no further.
        self.repairing: set[str] = set()
        self.replies: dict[str, Reply] = {}
        self.epochs: dict[str, int] = {}

    def handle(self, *events: Event) -> None:
        """Hand events in, carry commits out, and feed back what follows from them."""
        pending: list[Event] = list(events)
        while pending:
            instructions = self.machine.handle(pending, now=self.now)
            self.machine.validate()
            pending = []
            for instruction in instructions:
                if isinstance(instruction, Commit):
                    self._commit(instruction)
                    if instruction.stimulus:
                        pending.append(Committed(instruction.stimulus))
                elif isinstance(instruction, Reply):
                    self.replies[instruction.request_id] = instruction
                elif isinstance(instruction, ProbeNode):
                    dead = self.dead - self.answering
                    alive = instruction.node not in dead
                    pending.append(NodeProbed(instruction.node, alive))

    def _commit(self, commit: Commit) -> None:
        assert len(commit.writes) <= 128
        assert len({write.key for write in commit.writes}) == len(commit.writes)
        for write in commit.writes:
            if write.value is None:
                self.store.pop(write.key, None)
                continue
            self.store[write.key] = wire.decode(write.key, wire.encode(write.key, write.value))
            if write.key.startswith(keys.JOBS):
                assert write.value.epoch >= self.epochs.get(write.key, 0), "an epoch went back"
                self.epochs[write.key] = write.value.epoch
        for reply in commit.replies:
            self.replies[reply.request_id] = reply

    def ask(self, request: Request) -> Any:
        name = f"r{len(self.replies)}"
        self.handle(RequestReceived(name, "client/test", request))
        reply = self.replies[name]
        if reply.error is not None:
            raise reply.error
        return reply.value

    def agents(self) -> None:
        """Every living agent acknowledges what its assignment asks for."""
        for key, assignment in sorted(self.store.items()):
            if key.startswith(keys.ASSIGNMENTS) and assignment.node not in self.dead:
                self._acknowledge(assignment)

    def _acknowledge(self, assignment: Any) -> None:
        listed = set()
        for job in assignment.jobs:
            listed.add(job.job_uid)
            ranks = []
            for rank in job.ranks:
                key = rank.rank
                mark = (job.job_uid, key.role, key.instance, key.rank, rank.start_count)
                if mark in self.gave_up:
                    failed = RankStatus(
                        role=key.role,
                        instance=key.instance,
                        rank=key.rank,
                        die=rank.die,
                        stage=RankStage.FAILED,
                        start_count=rank.start_count,
                    )
                    ranks.append(failed)
                    continue
                if mark in self.starting:
                    continue
                stage = RankStage.EXITED if mark in self.exited else _STAGES[job.stage]
                if stage is RankStage.REPAIRED and job.job_uid in self.repairing:
                    stage = RankStage.FENCED
                ranks.append(
                    RankStatus(
                        role=key.role,
                        instance=key.instance,
                        rank=key.rank,
                        die=rank.die,
                        incarnation=f"{key}-{rank.start_count}",
                        engine_address=f"host:{key}-{rank.start_count}",
                        data_address=f"data:{key}-{rank.start_count}",
                        epoch=job.epoch,
                        stage=stage,
                        start_count=rank.start_count,
                        epoch_term=job.epoch_term,
                    )
                )
            acks = AgentAcks(node=assignment.node, job_uid=job.job_uid, ranks=tuple(ranks))
            self.observe(keys.acks(assignment.node, job.job_uid), acks)
        for key in [k for k in self.store if k.startswith(f"agents/{assignment.node}/acks/")]:
            if key.rsplit("/", 1)[1] not in listed:
                self.observe(key, None)

    def observe(self, key: str, value: Any) -> None:
        """An agent wrote this."""
        if self.store.get(key) == value:
            return
        if value is None:
            del self.store[key]
        else:
            self.store[key] = value
        self.handle(RecordChanged(key, value))

    def settle(self) -> None:
        """Let time pass and agents act until nothing changes any more."""
        for _ in range(12):
            self.now += 0.1
            self.handle(Woken())
            self.agents()

    def node_up(self, node: str) -> None:
        self.dead.discard(node)
        registration = AgentRegistration(
            node=node, drivers=("simulated",), host_memory_bytes=10**12
        )
        self.observe(keys.registration(node), registration)
        self.observe(keys.health(node), AgentHealth(node=node, boot_id=f"b{self.now}"))

    def node_down(self, node: str) -> None:
        self.dead.add(node)
        self.handle(AgentStreamBroken(node))
        self.observe(keys.health(node), None)

    def fault(self, die: str, *, present: bool) -> None:
        node = "/".join(die.split("/")[:2])
        if node in self.dead:
            return
        fault = ActiveFault(
            code="80E18005", subject_kind="die", subject=die, level=FaultLevel.SEPARATE_NPU
        )
        faults = (fault,) if present else ()
        self.observe(
            keys.health(node),
            AgentHealth(node=node, boot_id="b", sequence=int(self.now * 100), active_faults=faults),
        )

    def new_leader(self) -> None:
        """The leader is gone; the next one has the store and nothing else."""
        self.term += 1
        self.machine = Machine(dict(self.store), now=self.now, term=self.term)
        self.machine.validate()
        self.handle(Woken())


def spec(name: str = "small", ranks: int = 8) -> JobSpec:
    """The simulator's job without prefill, which fits a small machine."""
    whole = job_spec(name)
    _, decode, cache = whole.roles
    return replace(whole, roles=(replace(decode, ranks=ranks, spread_nodes=2), cache))


def submit(world: World, name: str = "small", key: str = "") -> str:
    request = SubmitJob(spec=spec(name), job_uid=f"j-{name}", spec_digest="d", idempotency_key=key)
    job, _ = world.ask(request)
    world.settle()
    return str(job.uid)


def ready_world(machine: str = "nvl72") -> World:
    world = World()
    supernode = load_machine(machine)
    world.ask(ApplySuperNode(supernode=supernode))
    for node in supernode.node_names():
        world.node_up(node)
    # Past the time in which a new term believes no silence.
    world.now += 10
    return world
