"""What a leader finds half done or unreadable at the beginning of its term."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raddle.core.admission import JOB_BYTES_MAX, check_spec, model_shape
from raddle.core.events import RecordChanged, Woken
from raddle.core.instructions import Commit
from raddle.core.machine import Machine
from raddle.core.requests import CancelJob, Cordon, SubmitJob
from raddle.core.sizes import commit_size, record_bytes
from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import ActiveFault, AgentHealth, FaultLevel
from raddle.model.incident import IncidentPhase
from raddle.model.job import AssignmentStage, JobSpec, JobState, ModelSpec
from raddle.model.kinds import HoldKind
from raddle.model.routes import RouteState
from raddle.wire import records as wire
from tests.core.machines import DEEPSEEK, make_cluster
from tests.core.world import World, ready_world, spec, submit

QWEN: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def dies_of(world: World, uid: str) -> set[str]:
    placement = world.store[keys.placement(uid)]
    return {rank.die for part in placement.instances for rank in part.ranks if rank.die}


def commits_of(world: World, *events: Any) -> list[Commit]:
    """The commits of one decision, not carried out."""
    world.now += 0.02
    return [i for i in world.machine.handle(events, now=world.now) if isinstance(i, Commit)]


def carry_out(world: World, commits: list[Commit]) -> None:
    """Carry out these alone; then the leader is gone and the next one begins."""
    for commit in commits:
        world._commit(commit)
    world.new_leader()


def many_jobs_on_a_rack() -> tuple[World, list[str], list[Any]]:
    """32 jobs of two ranks on one rack, whose four nodes report all their dies as faulty."""
    world = ready_world("cloudmatrix384")
    uids = [f"j-w{number}" for number in range(32)]
    for uid in uids:
        wanted = spec(uid.removeprefix("j-"), ranks=2)
        role = replace(wanted.roles[0], spread_nodes=0, slots_per_rank=32)
        request = SubmitJob(spec=replace(wanted, roles=(role,)), job_uid=uid, spec_digest="d")
        world.ask(request)
        world.settle()
    nodes = sorted({"/".join(die.split("/")[:2]) for uid in uids for die in dies_of(world, uid)})
    events = []
    for node in nodes:
        faults = tuple(
            ActiveFault(
                code="80E18005",
                subject_kind="die",
                subject=f"{node}/npu{npu}/die{die}",
                level=FaultLevel.SEPARATE_NPU,
            )
            for npu in range(8)
            for die in range(2)
        )
        health = AgentHealth(node=node, boot_id="b", sequence=1, active_faults=faults)
        world.store[keys.health(node)] = health
        events.append(RecordChanged(keys.health(node), health))
    return world, uids, events


def test_a_large_decision_is_committed_job_by_job() -> None:
    """Each commit holds whole jobs: their epoch, their assignments and the journal that says so."""
    world, uids, events = many_jobs_on_a_rack()
    world.machine.handle(events, now=world.now)
    commits = commits_of(world, Woken())
    assert len(commits) > 1
    for commit in commits:
        written = {write.key: write.value for write in commit.writes}
        jobs = {k for k in written if k.startswith(keys.JOBS)}
        for key in jobs:
            uid = key.removeprefix(keys.JOBS)
            told = {
                item.epoch
                for k, value in written.items()
                if k.startswith(keys.ASSIGNMENTS)
                for item in value.jobs
                if item.job_uid == uid
            }
            assert told == {written[key].epoch}, uid
            (incident,) = [v for k, v in written.items() if k.startswith(keys.INCIDENTS)]
            assert uid in {plan.job_uid for plan in incident.plans}
    done = {w.key for commit in commits for w in commit.writes if w.key.startswith(keys.JOBS)}
    assert done == {keys.job(uid) for uid in uids}


@pytest.mark.parametrize("carried_out", [0, 1])
def test_a_leader_that_dies_between_two_commits_of_a_decision_is_followed(
    carried_out: int,
) -> None:
    """What it had committed goes on, the rest is decided again; every job and incident ends."""
    world, uids, events = many_jobs_on_a_rack()
    world.machine.handle(events, now=world.now)
    carry_out(world, commits_of(world, Woken())[:carried_out])
    for _ in range(6):
        world.settle()
    assert {world.store[keys.job(uid)].state for uid in uids} == {JobState.READY}
    phases = {v.phase for k, v in world.store.items() if k.startswith(keys.INCIDENTS)}
    assert phases == {IncidentPhase.CLOSED}


@pytest.mark.parametrize("kept", range(5))
def test_assignments_that_were_not_all_told_are_told_by_the_next_leader(kept: int) -> None:
    """A decision cut anywhere between its writes is completed, in each of its stages."""
    world = ready_world()
    uid = submit(world)
    die = world.store[keys.placement(uid)].instances[0].ranks[0].die
    world.fault(die, present=True)
    for _ in range(20):
        for commit in commits_of(world, Woken()):
            first = [w for w in commit.writes if not w.key.startswith(keys.ASSIGNMENTS)]
            rest = [w for w in commit.writes if w.key.startswith(keys.ASSIGNMENTS)]
            world._commit(replace(commit, writes=(*first, *rest[:kept])))
        world.new_leader()
        world.now += 0.1
        world.agents()
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.live_epoch > 1) == (JobState.READY, True)
    phases = {v.phase for k, v in world.store.items() if k.startswith(keys.INCIDENTS)}
    assert phases == {IncidentPhase.CLOSED}


@pytest.mark.parametrize("prefix", [keys.PLACEMENTS, keys.EXPERT_MAPS], ids=["placement", "maps"])
def test_a_job_whose_records_cannot_be_read_is_placed_anew(world: World, prefix: str) -> None:
    """A placement or map that was set aside: the job starts over, no die has two jobs."""
    uid = submit(world)
    for key in [key for key in world.store if key.startswith(prefix)]:
        del world.store[key]
    world.new_leader()
    assert world.store[keys.job(uid)].restarts == 1
    other = submit(world, "other")
    world.settle()
    assert world.store[keys.job(uid)].state is JobState.READY
    assert not dies_of(world, uid) & dies_of(world, other)


def test_an_assignment_that_cannot_be_read_is_written_anew(world: World) -> None:
    """A node whose assignment was set aside is told again what it runs; nothing moves."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    before = world.store.pop(keys.assignment(node))
    world.new_leader()
    assert world.store[keys.assignment(node)] == before
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch) == (JobState.READY, 1)


def test_a_name_that_cannot_be_read_is_written_anew(world: World) -> None:
    """A job keeps its name through the loss of the name's own record."""
    uid = submit(world)
    del world.store[keys.name("default", "small")]
    world.new_leader()
    assert world.store[keys.name("default", "small")].job_uid == uid


def test_ranks_of_a_job_whose_record_cannot_be_read_go_on(world: World) -> None:
    """They keep their dies and their assignments: what cannot be read is not ended."""
    uid = submit(world)
    dies = dies_of(world, uid)
    del world.store[keys.job(uid)]
    world.new_leader()
    assert uid in {item.job_uid for item in world.store[keys.assignment("sn0/n00")].jobs}
    assert not dies & dies_of(world, submit(world, "other"))


def test_a_job_that_was_being_cancelled_ends(world: World) -> None:
    """A cancellation of which only a part was committed is completed by the next leader."""
    uid = submit(world)
    assignments = {k: v for k, v in world.store.items() if k.startswith(keys.ASSIGNMENTS)}
    world.ask(CancelJob(job_uid=uid))
    world.store |= assignments
    world.new_leader()
    world.settle()
    assert world.store[keys.job(uid)].state is JobState.CANCELLED
    assert keys.placement(uid) not in world.store


def test_ranks_that_serve_already_make_a_job_ready(world: World) -> None:
    """A store set back to before publication: ranks that serve already are asked no more."""
    uid = submit(world)
    job, routes = world.store[keys.job(uid)], world.store[keys.routes(uid)]
    world.store[keys.job(uid)] = replace(job, state=JobState.STARTING, live_epoch=0)
    world.store[keys.routes(uid)] = replace(routes, state=RouteState.STARTING)
    for key in [k for k in world.store if k.startswith(keys.ASSIGNMENTS)]:
        items = tuple(replace(j, stage=AssignmentStage.PREPARE) for j in world.store[key].jobs)
        world.store[key] = replace(world.store[key], jobs=items)
    world.new_leader()
    assert world.store[keys.job(uid)].state is JobState.READY


def test_an_epoch_decided_again_after_a_set_back_is_not_taken_for_the_first(world: World) -> None:
    """The store is set back, epoch 2 is decided anew, ranks live at the old one: 3 is next."""
    uid = submit(world)
    before = dict(world.store)
    seats = [rank for part in before[keys.placement(uid)].instances for rank in part.ranks]
    world.fault(seats[0].die, present=True)
    world.settle()
    key = keys.acks(seats[-1].node, uid)
    at_the_first = world.store[key]
    assert {(status.epoch, status.epoch_term) for status in at_the_first.ranks} == {(2, 1)}
    world.store = before
    world.new_leader()
    world.fault(seats[0].die, present=True)
    world.now += 0.1
    world.handle(Woken())
    assert (world.store[keys.job(uid)].epoch, world.store[keys.job(uid)].epoch_term) == (2, 2)
    world.observe(key, at_the_first)
    world.settle()
    job = world.store[keys.job(uid)]
    assert (job.state, job.epoch, job.live_epoch) == (JobState.READY, 3, 3)


def test_a_job_leaves_nothing_behind(world: World) -> None:
    """Whatever its epochs were, an ended job has no routes, maps or assignments any more."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    key = keys.acks(node, uid)
    ahead = tuple(replace(s, epoch=7) for s in world.store[key].ranks)
    world.observe(key, replace(world.store[key], ranks=ahead))
    world.settle()
    assert world.store[keys.job(uid)].epoch == 8
    maps = [k for k in world.store if k.startswith(keys.EXPERT_MAPS)]
    assert maps == [keys.expert_maps(uid, 1), keys.expert_maps(uid, 8)]
    world.ask(CancelJob(job_uid=uid))
    world.settle()
    left = [k for k in world.store if uid in k and not k.startswith((keys.JOBS, keys.AUDIT))]
    assert left == []


# --- sizes ---------------------------------------------------------------------------------------


def large(ranks: int, slots: int, config: dict[str, Any], instances: int = 1) -> JobSpec:
    model = ModelSpec(
        name="m",
        config=json.dumps(config),
        weight_dtype="int8",
        kv_dtype="bf16",
        kv_block_tokens=16,
    )
    found = spec("large")
    role = replace(
        found.roles[0], ranks=ranks, slots_per_rank=slots, spread_nodes=0, instances=instances
    )
    return replace(found, model=model, roles=(role, *found.roles[1:]))


@pytest.mark.parametrize(("ranks", "slots", "config"), [(384, 30, QWEN), (768, 18, DEEPSEEK)])
def test_a_job_that_could_never_be_committed_is_refused(
    ranks: int, slots: int, config: dict[str, Any]
) -> None:
    """Expert maps beyond a transaction's limit are refused at once, with what to change."""
    with pytest.raises(PermanentError, match="use fewer slots_per_rank") as caught:
        check_spec(large(ranks, slots, config), make_cluster())
    assert caught.value.reason is Reason.LIMIT_EXCEEDED


def test_large_jobs_are_placed_in_commits_that_the_store_takes() -> None:
    """Of several large jobs that become placeable together, each commit stays within the limit."""
    world = ready_world("cloudmatrix384")
    world.ask(Cordon(subject="sn0"))
    for number in range(3):
        wanted = replace(large(128, 30, QWEN), name=f"k{number}")
        world.ask(SubmitJob(spec=wanted, job_uid=f"j-k{number}", spec_digest="d"))
    del world.store[keys.hold("sn0", HoldKind.CORDON)]
    world.machine = Machine(dict(world.store), now=world.now)
    sizes = []
    for _ in range(3):
        for commit in commits_of(world, Woken()):
            values = [w for w in commit.writes if w.value is not None]
            sizes.append(sum(len(wire.encode(w.key, w.value)) for w in values))
            world._commit(commit)
    assert {world.store[keys.job(f"j-k{n}")].state for n in range(3)} == {JobState.STARTING}
    assert sum(sizes) > 1_500_000
    assert max(sizes) < 1_500_000


@settings(deadline=None, max_examples=25)
@given(
    ranks=st.integers(8, 96),
    slots=st.integers(16, 26),
    instances=st.integers(1, 3),
    role=st.sampled_from(["d", "decode", "a-role-with-a-name-as-long-as-a-label-may-ever-be-63-x"]),
)
def test_no_decision_is_larger_than_its_estimate(
    ranks: int, slots: int, instances: int, role: str
) -> None:
    """What placing a job really writes is within what was announced for it."""
    wanted = large(ranks, slots, QWEN, instances)
    wanted = replace(wanted, roles=(replace(wanted.roles[0], name=role), *wanted.roles[1:]))
    machine = load_machine("cloudmatrix384")
    size = commit_size(wanted, model_shape(wanted.model), machine.nodes)
    assume(record_bytes(wanted, model_shape(wanted.model)) <= JOB_BYTES_MAX)
    world = ready_world("cloudmatrix384")
    written: list[int] = []
    keep = world._commit

    def measured(commit: Commit) -> None:
        values = [w for w in commit.writes if w.value is not None]
        if any(w.key.startswith(keys.PLACEMENTS) for w in values):
            written.append(len(commit.writes))
            written.append(sum(len(wire.encode(w.key, w.value)) for w in values))
        keep(commit)

    world._commit = measured  # type: ignore[method-assign]
    world.ask(SubmitJob(spec=wanted, job_uid="j-large-0123456789ab", spec_digest="d" * 64))
    assert written, "it was not placed"
    assert written[0] <= size.writes
    assert written[1] <= size.bytes
