"""The machine from submit to recovery: stimuli in, records out, `validate()` after each."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

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
from raddle.core.requests import (
    ApplySuperNode,
    CancelJob,
    Cordon,
    CreateMaintenance,
    DeclareNodeLost,
    Request,
    SubmitJob,
    Uncordon,
)
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import RaddleError, Reason
from raddle.model.health import (
    ActiveFault,
    AgentAcks,
    AgentHealth,
    AgentRegistration,
    FaultLevel,
    RankStage,
    RankStatus,
)
from raddle.model.incident import IncidentPhase, MaintenanceState
from raddle.model.job import AssignmentStage, EngineSpec, JobSpec, JobState, ModelSpec, RoleSpec
from raddle.model.kinds import NodeState, RoleKind
from raddle.models import config_text
from raddle.wire import records as wire

_STAGES = {
    AssignmentStage.START: RankStage.STARTED,
    AssignmentStage.PREPARE: RankStage.REPAIRED,
    AssignmentStage.LIVE: RankStage.LIVE,
}


class World:
    """A machine, a store of its records, and agents that do at once what they are told."""

    def __init__(self) -> None:
        self.store: dict[str, Any] = {}
        self.now = 100.0
        self.machine = Machine({}, now=self.now)
        self.dead: set[str] = set()
        self.exited: set[tuple[str, str, int, int, int]] = set()
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
                    alive = instruction.node not in self.dead
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
                stage = RankStage.EXITED if mark in self.exited else _STAGES[job.stage]
                ranks.append(
                    RankStatus(
                        role=key.role,
                        instance=key.instance,
                        rank=key.rank,
                        die=rank.die,
                        incarnation=f"{key}-{rank.start_count}",
                        engine_address=f"{assignment.node}:{key}-{rank.start_count}",
                        epoch=job.epoch,
                        stage=stage,
                        start_count=rank.start_count,
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
        self.machine = Machine(dict(self.store), now=self.now)
        self.machine.validate()
        self.handle(Woken())


def spec(name: str = "small", ranks: int = 8) -> JobSpec:
    engine = EngineSpec(driver="simulated")
    model = ModelSpec(
        name="m",
        config=config_text("raddle-demo"),
        weight_dtype="int8",
        kv_dtype="bf16",
        kv_block_tokens=16,
    )
    roles = (
        RoleSpec(
            name="decode",
            kind=RoleKind.DECODE,
            instances=1,
            ranks=ranks,
            tp=1,
            slots_per_rank=6,
            spread_nodes=2,
            engine=engine,
        ),
        RoleSpec(
            name="cache",
            kind=RoleKind.CACHE,
            instances=1,
            ranks=2,
            tp=1,
            dram_bytes=10**9,
            engine=engine,
        ),
    )
    return JobSpec(namespace="default", name=name, queue="default", model=model, roles=roles)


@pytest.fixture
def world() -> World:
    world = World()
    machine = load_machine("nvl72")
    world.ask(ApplySuperNode(supernode=machine))
    for node in machine.node_names():
        world.node_up(node)
    # Past the time in which a new term believes no silence.
    world.now += 10
    return world


def submit(world: World, name: str = "small", key: str = "") -> str:
    request = SubmitJob(spec=spec(name), job_uid=f"j-{name}", spec_digest="d", idempotency_key=key)
    job, _ = world.ask(request)
    world.settle()
    return str(job.uid)


def test_a_job_is_placed_started_and_ready(world: World) -> None:
    """A submitted job goes to READY at epoch 1 once all agents acknowledged."""
    uid = submit(world)
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch, job.live_epoch) == (JobState.READY, 1, 1)


def test_the_same_idempotency_key_gives_the_same_job(world: World) -> None:
    """A retry with the same key is answered with the first job, another body is refused."""
    uid = submit(world, key="k")
    again, _ = world.ask(
        SubmitJob(spec=spec(), job_uid="j-other", spec_digest="d", idempotency_key="k")
    )
    assert again.uid == uid
    with pytest.raises(RaddleError) as caught:
        world.ask(SubmitJob(spec=spec(), job_uid="j-3", spec_digest="x", idempotency_key="k"))
    assert caught.value.reason is Reason.IDEMPOTENCY_KEY_REUSED


def test_a_name_is_given_once(world: World) -> None:
    """A second job of the same name is refused and changes nothing."""
    submit(world)
    before = dict(world.store)
    with pytest.raises(RaddleError) as caught:
        world.ask(SubmitJob(spec=spec(), job_uid="j-2", spec_digest="d"))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert world.store == before


def test_a_faulty_die_is_one_incident_and_one_epoch(world: World) -> None:
    """A severe die fault moves its rank's experts: one closed incident, epoch 2 is live."""
    uid = submit(world)
    seat = world.store[keys.placement(uid)].instances[0].ranks[0]
    world.fault(seat.die, present=True)
    world.settle()
    job = world.store[keys.job(uid)]
    incident = world.store[keys.incident("i-000001")]
    assert (job.state, job.live_epoch) == (JobState.READY, 2)
    assert (incident.phase, incident.subject) == (IncidentPhase.CLOSED, seat.die)
    assert incident.timeline[0].phase is IncidentPhase.DETECT


def test_a_lost_node_takes_all_its_ranks_at_once(world: World) -> None:
    """A silent node whose ranks do not answer is lost: one incident for all its ranks."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    world.node_down(node)
    world.settle()
    incident = world.store[keys.incident("i-000001")]
    assert incident.subject == node
    assert len(incident.faults) > 1
    assert world.store[keys.job(uid)].state is JobState.READY


def test_a_silent_agent_whose_ranks_answer_moves_nothing(world: World) -> None:
    """An agent lost while its ranks answer changes no epoch."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    world.handle(AgentStreamBroken(node))
    world.settle()
    assert world.store[keys.job(uid)].epoch == 1
    assert world.machine.context.nodes.node(node).state is NodeState.SUSPECT


def test_the_storm_brake_moves_nothing(world: World) -> None:
    """More nodes silent together than a failure domain explains: unknown, nothing moves."""
    world.machine.context.nodes.storm_nodes_max = 4
    uid = submit(world)
    for number in range(8):
        world.node_down(f"sn0/n{number:02d}")
    world.settle()
    assert world.store[keys.job(uid)].epoch == 1
    states = {world.machine.context.nodes.node(f"sn0/n{n:02d}").state for n in range(8)}
    assert states == {NodeState.UNKNOWN}


def test_a_drain_with_nowhere_to_go_takes_no_job_down(world: World) -> None:
    """Ranks that a drain cannot move stay, with a reason; they move once there is room."""
    tight = spec("tight", ranks=32)
    roles = tuple(replace(r, slots_per_rank=min(1, r.slots_per_rank)) for r in tight.roles)
    request = SubmitJob(spec=replace(tight, roles=roles), job_uid="j-tight", spec_digest="d")
    world.ask(request)
    world.settle()
    for number in range(18):
        world.ask(Cordon(subject=f"sn0/n{number:02d}"))
    die = world.store[keys.placement("j-tight")].instances[0].ranks[0].die
    world.ask(CreateMaintenance(maintenance_id="m-1", subject=die, timeout_s=600.0))
    world.settle()
    job, drain = world.store[keys.job("j-tight")], world.store[keys.maintenance("m-1")]
    assert (job.state, job.epoch, drain.why.reason) == (JobState.READY, 1, "NO_ROOM")
    assert not [key for key in world.store if key.startswith(keys.INCIDENTS)]
    for number in range(18):
        world.ask(Uncordon(subject=f"sn0/n{number:02d}"))
    world.settle()
    job, drain = world.store[keys.job("j-tight")], world.store[keys.maintenance("m-1")]
    assert (job.state, drain.state) == (JobState.READY, MaintenanceState.DRAINED)
    assert job.live_epoch > 1


def test_an_operators_word_lifts_the_storm_brake_for_a_node(world: World) -> None:
    """A silent node that is declared lost is recovered from; a ready one can't be declared lost."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    with pytest.raises(RaddleError, match="only a silent node"):
        world.ask(DeclareNodeLost(node=node))
    world.machine.context.nodes.storm_nodes_max = 0
    world.node_down(node)
    world.settle()
    assert world.machine.context.nodes.node(node).state is NodeState.UNKNOWN
    assert world.store[keys.job(uid)].epoch == 1
    world.ask(DeclareNodeLost(node=node, message="no power"))
    world.settle()
    assert world.machine.context.nodes.node(node).why.message == "no power, says client/test"
    job = world.store[keys.job(uid)]
    assert (job.state, job.live_epoch > 1) == (JobState.READY, True)


@pytest.mark.parametrize("steps", range(6))
def test_the_next_leader_continues_from_any_phase(world: World, steps: int) -> None:
    """A leader that dies after any step of a recovery is followed by one that ends it."""
    uid = submit(world)
    seat = world.store[keys.placement(uid)].instances[0].ranks[0]
    world.fault(seat.die, present=True)
    for _ in range(steps):
        world.now += 0.02
        world.handle(Woken())
        if steps % 2:
            world.agents()
    world.new_leader()
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.live_epoch) == (JobState.READY, job.epoch)
    assert world.store[keys.incident("i-000001")].phase is IncidentPhase.CLOSED


def test_a_cancelled_job_gives_its_dies_back(world: World) -> None:
    """A cancelled job ends once agents ended its ranks, and its dies are free again."""
    uid = submit(world)
    world.ask(CancelJob(job_uid=uid))
    world.settle()
    assert world.store[keys.job(uid)].state is JobState.CANCELLED
    assert keys.placement(uid) not in world.store
    assert world.machine.context.cluster.count_states()["busy"] == 0


def _storm(world: World, seed: int) -> list[str]:
    """Random faults from one seed, then calm; gives the trace of what the store held."""
    rng = random.Random(seed)
    dies = [f"sn0/n{n:02d}/npu{p}/die0" for n in range(18) for p in range(4)]
    trace = []
    for number in range(2):
        submit(world, f"job{number}")
    for _ in range(25):
        match rng.choice(["die", "heal", "down", "up", "rank", "leader", "time"]):
            case "die":
                world.fault(rng.choice(dies), present=True)
            case "heal":
                world.fault(rng.choice(dies), present=False)
            case "down":
                world.node_down(f"sn0/n{rng.randrange(18):02d}")
            case "up":
                for node in sorted(world.dead):
                    world.node_up(node)
            case "rank":
                world.exited.add(
                    (f"j-job{rng.randrange(2)}", "decode", 0, rng.randrange(8), rng.randrange(1, 4))
                )
                world.agents()
            case "leader":
                world.new_leader()
            case _:
                world.settle()
        trace.append(repr(sorted(world.store.items())))
    world.exited.clear()
    for node in sorted(world.dead):
        world.node_up(node)
    for die in dies:
        world.fault(die, present=False)
    for _ in range(6):
        world.now += 10
        world.settle()
    return [*trace, repr(sorted(world.store.items()))]


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_keep_the_invariants_and_converge(world: World, seed: int) -> None:
    """Invariants hold after every step; after the faults stop every job runs, incidents close."""
    _storm(world, seed)
    for number in range(2):
        job = world.store[keys.job(f"j-job{number}")]
        assert job.state is JobState.READY, (job.state, job.why)
    incidents = [v for k, v in world.store.items() if k.startswith(keys.INCIDENTS)]
    assert all(incident.phase is IncidentPhase.CLOSED for incident in incidents)
