"""Blocks and sequences in the machine: what members say, what a loss leaves, what is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raddle.core.events import SequencesReported, StatsReported
from raddle.core.requests import CancelJob
from raddle.core.sequences import costs_of, space_of, standing_of
from raddle.core.state import State
from raddle.model import keys
from raddle.model.kv import KvEventKind, KvTier
from raddle.model.routes import SequenceReport
from raddle.model.stats import KvEvent, RankStats
from raddle.model.types import RankKey
from tests.core.world import World, submit

CACHES = [RankKey(role="cache", instance=0, rank=rank) for rank in range(2)]
DECODE = RankKey(role="decode", instance=0, rank=3)
NAMES = tuple(f"{number + 1:016x}" for number in range(4))


def store(
    world: World,
    uid: str,
    key: RankKey,
    names: tuple[str, ...],
    incarnation: str = "a",
    sequence: int = 0,
    tier: KvTier = KvTier.DRAM,
) -> None:
    event = KvEvent(kind=KvEventKind.STORED, block_hashes=names, sequence=sequence, tier=tier)
    stats = RankStats(rank=key, incarnation=incarnation, kv_events=(event,))
    world.handle(StatsReported("sn0/n00", uid, (stats,)))


def sequence(sent: int, left: float = 0) -> SequenceReport:
    return SequenceReport(
        sequence_id="s", rank=DECODE, prompt_tokens=70, sent_tokens=sent, block_hashes=NAMES,
        left=left,
    )  # fmt: skip


def report(world: World, uid: str, *sequences: SequenceReport) -> None:
    world.handle(SequencesReported("door", uid, False, sequences, ()))


def kill(world: World, uid: str, key: RankKey) -> None:
    world.exited.add((uid, key.role, key.instance, key.rank, 1))
    world.settle()


def located(world: World, uid: str, name: str) -> list[int]:
    state = world.machine.context.state
    places = state.index.places(space_of(state.require_job(uid)), name)
    return [place.member[1].rank for place in places]


def test_a_lost_ranks_sequence_is_restored_from_what_members_said(world: World) -> None:
    """The incident tells tokens and predicted times; the outcome is measured by the reports."""
    uid = submit(world)
    store(world, uid, CACHES[0], NAMES[:3])
    report(world, uid, sequence(10))
    kill(world, uid, DECODE)
    (incident,) = world.machine.context.state.incidents()
    plan = next(p for p in incident.plans[0].instances if p.role == "decode")
    assert (plan.sequences_restored, plan.sequences_given_up) == (1, 0)
    assert (plan.kv_tokens_restored, plan.kv_tokens_recomputed) == (48, 32)
    assert plan.kv_last_predicted == plan.kv_median_predicted > 0
    stored = world.store[keys.incident(incident.id)].plans[0].instances
    assert [p.kv_last_predicted for p in stored if p.role == "decode"] == [
        pytest.approx(plan.kv_last_predicted, abs=1e-6)
    ]
    (recovery,) = world.machine.context.state.recoveries.of(uid)
    assert recovery.last_s == 0
    world.now += 2.5
    report(world, uid, sequence(11))
    assert recovery.last_s > 0
    stored = world.store[keys.incident(incident.id)].plans[0].instances
    assert [(p.kv_median_actual, p.kv_last_actual) for p in stored if p.role == "decode"] == [
        (pytest.approx(recovery.median_s, abs=1e-6), pytest.approx(recovery.last_s, abs=1e-6))
    ]


def test_blocks_of_another_size_are_none_of_the_jobs(world: World) -> None:
    """An engine that says another block size than the job's is not believed."""
    uid = submit(world)
    for number, tokens in enumerate((16, 0, 128)):
        event = KvEvent(
            kind=KvEventKind.STORED,
            block_hashes=NAMES[number : number + 1],
            sequence=number,
            block_tokens=tokens,
        )
        stats = RankStats(rank=CACHES[0], incarnation="a", kv_events=(event,))
        world.handle(StatsReported("sn0/n00", uid, (stats,)))
    assert [located(world, uid, name) for name in NAMES[:3]] == [[0], [0], []]
    assert world.machine.context.state.kv_events_refused == 1


def test_a_faster_die_computes_what_is_lost_sooner(world: World) -> None:
    """The machine says how fast a die computes prompts; one that does not is a CloudMatrix384's."""
    uid = submit(world)
    context = world.machine.context
    job = context.state.require_job(uid)
    assert costs_of(context, job).prefill_tokens_per_s == 3_344
    for name, supernode in context.cluster.supernodes.items():
        context.cluster.supernodes[name] = replace(supernode, prefill_tokens_per_s=9_000)
    assert costs_of(context, job).prefill_tokens_per_s == 9_000


def test_a_sequence_whose_time_is_over_is_given_up(world: World) -> None:
    """The routes say so and why; nothing of it is restored."""
    uid = submit(world)
    report(world, uid, sequence(10, left=0.001))
    kill(world, uid, DECODE)
    (incident,) = world.machine.context.state.incidents()
    plan = next(p for p in incident.plans[0].instances if p.role == "decode")
    assert (plan.sequences_restored, plan.sequences_given_up) == (0, 1)
    (restore,) = world.store[keys.routes(uid)].restores
    assert restore.why.reason == "GIVE_UP"


def test_a_dead_incarnation_holds_nothing(world: World) -> None:
    """From its loss on, and before its successor has said a word, it is nowhere to be found."""
    uid = submit(world)
    store(world, uid, CACHES[0], NAMES)
    store(world, uid, CACHES[1], NAMES[:1])
    assert located(world, uid, NAMES[0]) == [0, 1]
    kill(world, uid, CACHES[0])
    assert located(world, uid, NAMES[0]) == [1]
    assert located(world, uid, NAMES[3]) == []
    report(world, uid, sequence(10))
    kill(world, uid, DECODE)
    plan = world.machine.context.state.incidents()[-1].plans[-1].instances[0]
    assert plan.kv_tokens_restored == 16


def test_the_last_words_of_a_lost_rank_count_no_more(world: World) -> None:
    """They may reach the leader after the plan that its loss made: they bring no block back."""
    uid = submit(world)
    status = world.machine.context.state.rank_status
    placement = world.store[keys.placement(uid)]
    (node,) = [
        rank.node
        for part in placement.instances
        if part.role == "cache"
        for rank in part.ranks
        if rank.rank == 0
    ]
    found = status(uid, node, CACHES[0])
    assert found is not None
    store(world, uid, CACHES[0], NAMES[:1], found.incarnation)
    assert located(world, uid, NAMES[0]) == [0]
    kill(world, uid, CACHES[0])
    store(world, uid, CACHES[0], NAMES[1:], found.incarnation, sequence=1)
    assert located(world, uid, NAMES[1]) == []


def test_a_peers_own_blocks_bring_a_sequence_back(world: World) -> None:
    """Without anything in the pool, what another decode rank reported is restored from there."""
    uid = submit(world)
    peer = RankKey(role="decode", instance=0, rank=1)
    store(world, uid, peer, NAMES[:3], tier=KvTier.HBM)
    store(world, uid, DECODE, NAMES, tier=KvTier.HBM)
    report(world, uid, sequence(10))
    kill(world, uid, DECODE)
    (restore,) = world.store[keys.routes(uid)].restores
    assert restore.tokens_restored == 48
    assert restore.target == peer or restore.peers == (peer,)


def test_protection_counts_copies_of_live_members(world: World) -> None:
    """One block of two has both copies: half protected, one below."""
    uid = submit(world)
    store(world, uid, CACHES[0], NAMES[:2])
    store(world, uid, CACHES[1], NAMES[:1])
    context = world.machine.context
    standing = standing_of(context, context.state.require_job(uid))
    assert standing.copies == (0, 1, 1)
    assert (standing.replicas, standing.blocks_below, standing.protection) == (2, 1, 0.5)
    assert standing.members == {CACHES[0]: 2, CACHES[1]: 1}


def test_strange_names_are_counted_and_change_nothing(world: World) -> None:
    """A member that names blocks wrongly, or of a job that is none, disturbs nobody."""
    uid = submit(world)
    store(world, uid, CACHES[0], ("no hash",))
    store(world, "j-nobody", CACHES[0], NAMES)
    state = world.machine.context.state
    assert state.kv_events_refused == 1
    assert state.index.blocks((uid, CACHES[0])) == 0
    state.index.validate()


def test_an_ended_job_is_forgotten(world: World) -> None:
    """Its blocks, sequences and recoveries go with it."""
    uid = submit(world)
    store(world, uid, CACHES[0], NAMES)
    report(world, uid, sequence(10))
    state = world.machine.context.state
    world.ask(CancelJob(job_uid=uid))
    world.settle()
    assert state.index.blocks((uid, CACHES[0])) == 0
    assert state.all_sequences(uid) == []


def test_a_machine_that_is_built_anew_keeps_what_was_said() -> None:
    """After a commit that failed, members and doors do not speak again: their words are kept."""
    old, new = State({}), State({})
    old.count_kv("j", RankStats(kv_tokens_restored=3, kv_tokens_recomputed=1))
    new.take_reports(old)
    assert new.index is old.index
    assert new.kv_tokens == {"j": (3, 1)}


@pytest.mark.parametrize("missing", ["lora", "tenant_salt"])
def test_adapters_and_tenants_of_one_job_are_apart(world: World, missing: str) -> None:
    """An event names adapter and tenant; a look-up without them finds nothing."""
    uid = submit(world)
    named = {missing: "x"}
    event = KvEvent(kind=KvEventKind.STORED, block_hashes=NAMES[:1], sequence=0, **named)  # type: ignore[arg-type]
    stats = RankStats(rank=CACHES[0], incarnation="a", kv_events=(event,))
    world.handle(StatsReported("sn0/n00", uid, (stats,)))
    assert located(world, uid, NAMES[0]) == []
    assert world.machine.context.state.index.blocks((uid, CACHES[0])) == 1
