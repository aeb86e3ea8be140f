"""Hangs, partitions, and faults that meet: no token wrong, nothing accepted lost, no epoch back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from raddle.agent.engine.reference.config import RankAddress
from raddle.cli.demo.client import Answers, get_text, send_all
from raddle.model import keys
from raddle.store.etcd.store import EtcdStore
from raddle.traces import TraceRequest
from raddle.v1 import (
    health_pb2,
    incident_pb2,
    job_pb2,
    reference_pb2,
    reference_pb2_grpc,
    scheduler_pb2,
)
from raddle.wire import records as codec
from tests.e2e.history import assert_one_writer
from tests.e2e.holds import (
    Hold,
    Holds,
    assert_nothing_is_held,
    blocks_of,
    channel_to,
    fence_of,
    fresh_request,
    logs_of,
    rank_folders,
    running_ranks,
)
from tests.e2e.served import CLOSED, Served, serving
from tests.e2e.ways import Ways
from tests.kube.known_tokens import known_tokens
from tests.support import stopped

READ_ANEW = "the watch was broken; everything is read anew"
SKEWED = Path(__file__).parent / "skewed"
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as found:
        yield found
        await settled(found)


@pytest.fixture
def holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Holds:
    return Holds(tmp_path / "holds", monkeypatch)


async def settled(served: Served) -> None:
    """After any fault: at rest, and one writer all the time."""
    await at_rest(served)
    await assert_one_writer(served.cluster.etcd_endpoints)


async def at_rest(served: Served) -> None:
    """All incidents closed, no sequence left at the front door."""

    async def closed() -> bool:
        return all(incident.phase == CLOSED for incident in await served.incidents())

    await served.cluster.until(closed, "all incidents are closed")
    _, text = await get_text(served.address, "/metrics")
    assert "raddle_frontdoor_sequences_running 0" in text


async def ranks_of(served: Served, role: str) -> list[tuple[str, int]]:
    """(node, process) of the living ranks of a role."""
    processes = served.cluster.rank_processes()
    job = await served.job()
    where = {
        (part.role, part.instance, rank.rank): rank.node
        for part in job.placement.instances
        for rank in part.ranks
    }
    return [
        (where[r.role, r.instance, r.rank], processes[r.incarnation])
        for r in job.ranks
        if r.role == role and r.incarnation in processes
    ]


async def is_gone(served: Served, pid: int) -> None:
    async def gone() -> bool:
        return pid not in served.cluster.rank_processes().values()

    await served.cluster.until(gone, f"rank process {pid} has ended")


# --- ranks -----------------------------------------------------------------------------------


async def test_a_stopped_rank_is_found_by_its_peers(served: Served) -> None:
    """SIGSTOP of a rank: its peers' step deadline finds it, the job goes on, and it is ended."""
    rank = next(rank for rank in running_ranks(served) if rank.role == "decode")

    async def stop_rank() -> None:
        with stopped(rank.pid):
            await goes_on_without(served, rank)
        await is_gone(served, rank.pid)

    await served.same_tokens_while(stop_rank)
    assert [fault.kind for fault in await faults_of(served, rank)] == ["PEER_REPORTS"]
    assert "STEP_DEADLINE" in logs_of(served, "decode")


async def test_a_stopped_rank_that_no_peer_waits_for_is_found_by_its_agent(served: Served) -> None:
    """SIGSTOP of the only rank that has work: no step misses it, its agent does."""

    async def stop_rank() -> None:
        (serving_one,) = served.answers.served_by.values()
        rank = next(rank for rank in running_ranks(served) if rank.incarnation == serving_one)
        with stopped(rank.pid):
            await goes_on_without(served, rank)
        await is_gone(served, rank.pid)
        (fault,) = await faults_of(served, rank)
        assert "did not answer its agent" in fault.message

    served.requests = [max(served.requests, key=lambda request: request.output_tokens)]
    served.expected = Answers()
    await send_all(served.address, served.requests, served.expected, 1)
    await served.same_tokens_while(stop_rank)


def serves_whole(job: job_pb2.Job) -> bool:
    """Is it ready, and nothing of it on its way to another epoch?"""
    return job.state == job_pb2.JOB_STATE_READY and job.live_epoch == job.epoch


async def goes_on_without(served: Served, rank: RankAddress) -> None:
    """Wait until the job serves after this rank's loss: other epochs may come before."""

    async def serves() -> bool:
        job = (await served.job()).job
        return serves_whole(job) and bool(await faults_of(served, rank))

    await served.cluster.until(serves, f"the job serves without {rank.incarnation}")


async def faults_of(served: Served, rank: RankAddress) -> list[Any]:
    """What all incidents say was wrong with a rank."""
    lost = await served.lost_ranks()
    return [f for f in lost if (f.rank.role, f.rank.rank) == (rank.role, rank.rank)]


async def test_a_zombie_that_wakes_changes_nothing(
    holds: Holds, served: Served, tmp_path: Path
) -> None:
    """A rank that wakes after the epoch moved, with no agent to end it: all it sends is refused."""
    fresh = fresh_request(0, blocks=4, output_tokens=96)
    (tokens,) = known_tokens([fresh], tmp_path / "weights")
    served.send_first([fresh], [tokens])
    # A block that it made itself is on its way to the pool when it is stopped.
    hold = holds.at("put-decode", [blocks_of([*fresh.prompt, *tokens])[4]])

    async def stop_rank_and_agent() -> None:
        pid = await hold.holder(served)
        node = next(node for node, process in await ranks_of(served, "decode") if process == pid)
        agent = served.cluster.children[f"agent-{node.replace('/', '-')}"].process.pid
        zombie, log = next((a, f / "rank.log") for f, a in rank_folders(served) if a.pid == pid)
        with stopped(agent):
            with stopped(pid):
                epoch = (await served.job()).job.epoch
                async with rounds(served):
                    await goes_on_without(served, zombie)
                writes = stale_writes(served, epoch)
                hold.release()
            # Awake, at its old epoch, among peers of a newer one, until its agent wakes too.
            answers: list[list[int]] = []
            late = asyncio.create_task(take_answers(zombie, fresh, epoch, answers))

            async def refused() -> bool:
                is_written = stale_writes(served, epoch) > writes
                return is_written and "REFUSED" in log.read_text()

            await served.cluster.until(refused, "peers and the pool refuse what it sends")

            async def taken() -> bool:
                return bool(answers)

            # It takes the request, being at that epoch, and makes nothing of it.
            await served.cluster.until(taken, "it takes a request")
            await served.tokens_flow()
            assert pid in served.cluster.rank_processes().values()
        await is_gone(served, pid)
        await late
        assert not any(answers)

    await served.same_tokens_while(stop_rank_and_agent)


@asynccontextmanager
async def rounds(served: Served) -> AsyncIterator[None]:
    """Requests in rounds until the block ends: a rank's peers notice that it hangs if they step."""
    ends = asyncio.Event()

    async def send() -> None:
        while not ends.is_set():
            answers = Answers()
            await send_all(served.address, served.requests, answers, 8)
            assert answers.tokens == served.expected.tokens

    sending = asyncio.create_task(send())
    try:
        yield
    finally:
        ends.set()
        await sending


def stale_writes(served: Served, epoch: int) -> int:
    """How many writes of an epoch the pool refused."""
    lines = logs_of(served, "cache").splitlines()
    return sum('"PutBlocks"' in line and f"epoch {epoch} is not" in line for line in lines)


async def take_answers(
    rank: RankAddress, request: TraceRequest, epoch: int, answers: list[list[int]]
) -> None:
    """Add the tokens of each answer to a front door that is at this epoch, until the rank ends."""
    message = reference_pb2.GenerateRequest(
        fence=fence_of(rank.job_uid, epoch),
        sequence_id="late",
        prompt_tokens=request.prompt,
        max_tokens=request.output_tokens,
    )
    async with channel_to(rank) as channel:
        stub: Any = reference_pb2_grpc.ReferenceRankStub(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for answer in stub.Generate(message):
                answers.append(list(answer.tokens))  # noqa: PERF401 - the end is an error


async def test_a_prefill_rank_is_killed_in_mid_prompt(served: Served, tmp_path: Path) -> None:
    """SIGKILL of a prefill rank that has a long prompt's first blocks: another computes it."""
    long = fresh_request(0, blocks=200, output_tokens=8)
    served.send_first([long], known_tokens([long], tmp_path / "weights"))
    names = blocks_of(long.prompt)

    async def kill_prefill() -> None:
        epoch = (await served.job()).job.epoch
        rank = await prefill_rank_with(served, names[0])
        with stopped(rank.pid):
            assert await places_of(served, names[-1]) == [], "the prompt is too short"
            assert served.answers.tokens[0] == []
            os.kill(rank.pid, signal.SIGKILL)
        await served.ready_at(epoch + 1)
        await goes_on_without(served, rank)
        again = await prefill_rank_with(served, names[-1])
        assert again.incarnation != rank.incarnation

    await served.same_tokens_while(kill_prefill)
    await settled(served)
    await assert_nothing_is_held(served, names)


async def places_of(served: Served, block: str) -> list[tuple[str, int]]:
    """(role, number) of the ranks that have a block."""
    request = scheduler_pb2.LocateKvBlocksRequest(job_uid=served.uid, block_hashes=[block])
    (found,) = (await served.cluster.stub.LocateKvBlocks(request, timeout=10.0)).blocks
    return [(place.rank.role, place.rank.rank) for place in found.places]


async def prefill_rank_with(served: Served, block: str) -> RankAddress:
    """Wait until a running prefill rank has the block."""
    found: list[RankAddress] = []

    async def there() -> bool:
        places = await places_of(served, block)
        ranks = [r for r in running_ranks(served) if r.role == "prefill"]
        found.extend(r for r in ranks if (r.role, r.rank) in places)
        return bool(found)

    await served.cluster.until(there, "a prefill rank has the block")
    return found[0]


async def test_decode_ranks_are_killed_while_kv_is_handed_over(
    holds: Holds, served: Served, tmp_path: Path
) -> None:
    """SIGKILL of decode ranks that have part of a prompt's blocks: none is leaked or half-used."""
    fresh = [fresh_request(number, blocks=20, output_tokens=24) for number in range(2)]
    tokens = known_tokens(fresh, tmp_path / "weights")
    # One after the other: a rank that had both would be waited for where its heir restores the
    # second.
    for request, known in zip(fresh, tokens, strict=True):
        served.send_first([request], [known])
        hand_over = holds.at("get-decode", blocks_of(request.prompt))
        await served.same_tokens_while(partial(kill_at, served, hand_over))
    await settled(served)
    await assert_nothing_is_held(
        served, [n for request in fresh for n in blocks_of(request.prompt)]
    )


async def kill_at(served: Served, hand_over: Hold) -> None:
    """SIGKILL the rank that waits here with part of the first request's blocks."""
    epoch = (await served.job()).job.epoch
    pid = await hand_over.holder(served)
    rank = next(rank for rank in running_ranks(served) if rank.pid == pid)
    os.kill(pid, signal.SIGKILL)
    # Whoever came here waits here still.
    assert hand_over.folder.exists()
    assert served.answers.tokens[0] == []
    hand_over.release()
    await served.ready_at(epoch + 1)
    await goes_on_without(served, rank)


async def test_a_second_rank_dies_in_the_repair_of_the_first(
    holds: Holds, served: Served, tmp_path: Path
) -> None:
    """A fault in the middle of a recovery is planned anew at a higher epoch."""
    fresh = fresh_request(0, blocks=20, output_tokens=96)
    served.send_first([fresh], known_tokens([fresh], tmp_path / "weights"))

    async def kill_twice() -> None:
        async def begun() -> bool:
            return bool(served.answers.tokens[0])

        await served.cluster.until(begun, "the sequence is on a rank")
        ranks = {r.incarnation: r for r in running_ranks(served) if r.role == "decode"}
        first = ranks.pop(served.answers.served_by[0])
        epoch = (await served.job()).job.epoch
        # Who takes its sequence over fetches the blocks, and the repair waits for it.
        repair = holds.at("get-decode", blocks_of(fresh.prompt))
        os.kill(first.pid, signal.SIGKILL)
        taker = await repair.holder(served)

        async def repairing() -> bool:
            phases = [incident.phase for incident in await served.incidents()]
            return incident_pb2.INCIDENT_PHASE_REPAIR in phases

        # Others may be fenced later than the one that takes over.
        await served.cluster.until(repairing, "all ranks are fenced")
        second = next(rank for rank in ranks.values() if rank.pid != taker)
        (incident,) = [i for i in await served.incidents() if i.phase != CLOSED]
        assert incident.phase == incident_pb2.INCIDENT_PHASE_REPAIR
        assert [plan.epoch for plan in incident.plans] == [epoch + 1]
        # It stays in the repair as long as the taker waits.
        os.kill(second.pid, signal.SIGKILL)
        repair.release()
        await served.ready_at(epoch + 2)
        (incident,) = [i for i in await served.incidents() if i.id == incident.id]
        assert [plan.epoch for plan in incident.plans][:2] == [epoch + 1, epoch + 2]
        assert {f.rank.rank for f in incident.faults} >= {first.rank, second.rank}

    await served.same_tokens_while(kill_twice)
    await settled(served)
    await assert_nothing_is_held(served, blocks_of(fresh.prompt))


async def test_a_rank_hangs_in_the_repair_of_another(served: Served) -> None:
    """A rank that stops while it is being fenced is found by its agent and left behind."""

    async def kill_one_stop_one() -> None:
        first, second = (await ranks_of(served, "decode"))[:2]
        os.kill(first[1], signal.SIGKILL)
        with stopped(second[1]):
            await served.ready_at(3)
        await is_gone(served, second[1])

    await served.same_tokens_while(kill_one_stop_one)


async def test_two_ranks_of_different_nodes_die_together(served: Served) -> None:
    """Two ranks of two nodes lost within 10 ms are one incident and one epoch, or two in turn."""

    async def kill_two() -> None:
        for _ in range(4):
            epoch = (await served.job()).job.epoch
            ranks = await ranks_of(served, "decode")
            other = next(pid for node, pid in ranks if node != ranks[0][0])
            pair = [rank for rank in running_ranks(served) if rank.pid in (ranks[0][1], other)]
            took_s = kill_at_once(pair)
            await served.ready_at(epoch + 1)
            for rank in pair:
                await goes_on_without(served, rank)
            if took_s < 0.01:
                return
        raise AssertionError("two signals within 10 ms were not to be had here")

    await served.same_tokens_while(kill_two)


def kill_at_once(ranks: list[RankAddress]) -> float:
    """Seconds that it took: another process may have had the machine in between."""
    began_s = time.monotonic()
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    return time.monotonic() - began_s


# --- hosts' processes --------------------------------------------------------------------------


async def test_a_stopped_leader_is_deposed(served: Served) -> None:
    """SIGSTOP of the leader: the standby recovers a rank; the woken one writes nothing."""

    async def stop_leader() -> None:
        number = await served.leader_number()
        pid = served.cluster.children[f"scheduler-{number}"].process.pid
        with stopped(pid):
            await served.cluster.connect(1 - number)
            await served.kill_decode_rank()
            await served.ready_at(2)
        await served.kill_decode_rank()
        await served.ready_at(3)
        assert await served.leader_number() == 1 - number

    await served.same_tokens_while(stop_leader)
    assert len(await assert_one_writer(served.cluster.etcd_endpoints)) == 2


async def test_a_stopped_agent_costs_nothing(served: Served) -> None:
    """SIGSTOP of an agent for longer than its lease: its ranks go on at the same epoch."""
    node = (await ranks_of(served, "decode"))[0][0]
    pid = served.cluster.children[f"agent-{node.replace('/', '-')}"].process.pid

    async def state() -> str:
        nodes = (await served.cluster.stub.ListNodes(scheduler_pb2.ListNodesRequest())).nodes
        return str(next(n.state for n in nodes if n.node == node))

    async def stop_agent() -> None:
        with stopped(pid):

            async def suspect() -> bool:
                return await state() == "SUSPECT"

            await served.cluster.until(suspect, "the node is suspect")
            await served.tokens_flow()

        async def ready() -> bool:
            return await state() == "READY"

        await served.cluster.until(ready, "the node is ready again")

    await served.same_tokens_while(stop_agent)
    assert await served.lost_ranks() == []


async def test_a_stopped_front_door_goes_on(served: Served) -> None:
    """SIGSTOP of the front door while a rank dies: its streams go on with the same tokens."""

    async def stop_front_door() -> None:
        with stopped(served.cluster.children["frontdoor"].process.pid):
            await served.kill_decode_rank()
            await served.ready_at(2)

    await served.same_tokens_while(stop_front_door)


@pytest.mark.parametrize("which", ["leader", "follower"])
async def test_a_stopped_etcd_member_costs_nothing(tmp_path: Path, which: str) -> None:
    """SIGSTOP of etcd's leader or of another member: a rank is recovered meanwhile."""
    async with serving(tmp_path, etcd_members=3) as served:
        leader = await served.etcd_leader()
        number = leader if which == "leader" else (leader + 1) % 3

        async def stop_member() -> None:
            member = served.cluster.etcds[number].process
            assert member is not None
            with stopped(member.pid):
                await served.kill_decode_rank()
                await served.ready_at(2)

        await served.same_tokens_while(stop_member)
        await settled(served)


async def test_a_host_with_everything_on_it_dies(tmp_path: Path) -> None:
    """Ranks, their agent, the Raddle leader and etcd's leader, all killed at once."""
    async with serving(tmp_path, etcd_members=3) as served:

        async def kill_host() -> None:
            node = (await ranks_of(served, "decode"))[0][0]
            member = served.cluster.etcds[await served.etcd_leader()].process
            assert member is not None
            number = await served.leader_number()
            child = served.cluster.children.pop(f"scheduler-{number}")
            member.kill()
            child.process.kill()
            served.cluster.kill_node(node)
            child.process.wait()
            await served.cluster.connect(1 - number)
            await served.ready_at(2)

        await served.same_tokens_while(kill_host)
        await settled(served)


# --- names, time and the store -------------------------------------------------------------------


async def test_a_job_of_the_same_name_is_another_job(served: Served) -> None:
    """Ranks of a deleted job wake beside a new job of its name: they change nothing and end."""
    cluster = served.cluster
    node, _ = (await ranks_of(served, "decode"))[0]
    agent = cluster.children.pop(f"agent-{node.replace('/', '-')}")
    old = list(cluster.rank_processes(node).values())
    for pid in old:
        os.kill(pid, signal.SIGSTOP)
    agent.process.kill()
    agent.process.wait()
    await served.ready_at(2)
    first = served.uid
    await cluster.stub.CancelJob(scheduler_pb2.CancelJobRequest(job_uid=first), timeout=10.0)

    async def deleted() -> bool:
        await cluster.stub.DeleteJob(scheduler_pb2.DeleteJobRequest(job_uid=first), timeout=5.0)
        return True

    await cluster.until(deleted, "the old job ended and is deleted")
    await served.submit()
    assert served.uid != first
    await served.ready_at(1)

    async def wake() -> None:
        for pid in old:
            os.kill(pid, signal.SIGCONT)
        await served.tokens_flow()
        cluster.start_real_agent(node)
        for pid in old:
            await is_gone(served, pid)

    await served.same_tokens_while(wake)


async def test_history_is_compacted_while_a_scheduler_is_away(tmp_path: Path) -> None:
    """A scheduler whose watch goes on behind a compaction has missed nothing when it leads."""
    ways = Ways(schedulers=2)
    await ways.start()
    try:
        async with serving(tmp_path, on_made=ways.adopt, more_flags=ways.flags) as served:
            await served.same_tokens_while(partial(compact_and_change_leaders, served, ways))
            await at_rest(served)
    finally:
        await ways.stop()


async def compact_and_change_leaders(served: Served, ways: Ways) -> None:
    """The standby is cut off from etcd while a rank is recovered and the history is compacted."""
    number = await served.leader_number()
    store = EtcdStore([served.cluster.etcd_endpoints], "default", operation_key="operations/t")
    await served.cluster.connect(number)
    away = ways.proxies[1 - number]
    away.refuse = True
    away.cut()
    cut_at = (await store.list(keys.JOBS)).revision
    await served.kill_decode_rank()
    await served.ready_at(2)
    compacted = (await store.list(keys.JOBS)).revision
    assert compacted > cut_at
    await assert_one_writer(served.cluster.etcd_endpoints)
    await store.compact(compacted)
    await store.close()
    log = served.cluster.log_of(f"scheduler-{1 - number}")
    assert READ_ANEW not in log.read_text()
    away.refuse = False

    async def read_anew() -> bool:
        return READ_ANEW in log.read_text()

    await served.cluster.until(read_anew, "the standby reads everything anew")
    line = next(line for line in log.read_text().splitlines() if READ_ANEW in line)
    # Its watch had come no further, so it began again at a revision of which nothing is left.
    assert json.loads(line)["revision"] <= cut_at
    await served.kill_leader()
    await served.kill_decode_rank()
    await served.ready_at(3)


async def test_an_older_state_of_etcd_is_restored_under_running_ranks(tmp_path: Path) -> None:
    """The new leader goes above every live epoch, and agents tell again what was forgotten."""
    async with serving(tmp_path, schedulers=1) as served:
        (etcd,) = served.cluster.etcds
        data, backup, newer = (etcd.folder / name for name in ("data", "backup", "newer"))
        await etcd.stop()
        shutil.copytree(data, backup)
        await etcd.start()

        async def recover(epoch: int) -> None:
            await served.kill_decode_rank()
            await served.ready_at(epoch)

        # Three epochs are forgotten: the next ones after the restored one were live before.
        for epoch in (2, 3, 4):
            await served.same_tokens_while(partial(recover, epoch))

        async def set_back() -> None:
            await etcd.stop()
            data.rename(newer)
            backup.rename(data)
            await etcd.start()
            await served.ready_at(5)

        await served.same_tokens_while(set_back)
        await settled(served)
        job = await served.job()
        # What the restored store tells of was all decided since.
        assert min(plan.epoch for i in await served.incidents() for plan in i.plans) >= 5
        active = [rank for rank in job.ranks if rank.stage == health_pb2.RANK_STAGE_LIVE]
        assert {rank.epoch for rank in active} == {job.job.epoch}
        await assert_nothing_is_held(served, [])


async def test_clocks_that_are_minutes_apart_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process has its own wrong clock: a rank, its agent and the leader are survived."""
    monkeypatch.setenv("PYTHONPATH", str(SKEWED))
    async with serving(tmp_path, forks=False) as served:
        store = EtcdStore([served.cluster.etcd_endpoints], "default", operation_key="operations/t")
        agents = await store.list(keys.AGENTS)
        await store.close()
        found = [r for r in agents.records if r.key.endswith("/registration")]
        times = [codec.decode(record.key, record.value).start_time for record in found]
        assert max(times) - min(times) > 60.0, "the clocks are not apart"

        async def faults() -> None:
            await served.kill_decode_rank()
            await served.ready_at(2)
            node, _ = (await ranks_of(served, "decode"))[0]
            served.cluster.kill_node(node)
            await served.kill_leader()
            await served.ready_at(3)

        await served.same_tokens_while(faults)
        await settled(served)
        for incident in await served.incidents():
            assert all(entry.duration.ToTimedelta() >= timedelta() for entry in incident.timeline)
