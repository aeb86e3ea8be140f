"""Hangs, partitions, and faults that meet: no token wrong, nothing accepted lost, no epoch back."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest

from raddle.cli.demo.client import get_text
from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.store.etcd.store import EtcdStore
from raddle.v1 import health_pb2, scheduler_pb2
from raddle.wire import records as codec
from tests.e2e.history import assert_one_writer
from tests.e2e.served import CLOSED, Served, phase_seen, serving
from tests.support import stopped

SKEWED = Path(__file__).parent / "skewed"
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as found:
        yield found
        await settled(found)


async def settled(served: Served) -> None:
    """After any fault: all incidents closed, one writer, no sequence left at the front door."""

    async def closed() -> bool:
        return all(incident.phase == CLOSED for incident in await served.incidents())

    await served.cluster.until(closed, "all incidents are closed")
    await assert_one_writer(served.cluster.etcd_endpoints)
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

    async def stop_rank() -> None:
        _, pid = (await ranks_of(served, "decode"))[0]
        with stopped(pid):
            await served.ready_at(2)
        await is_gone(served, pid)

    await served.same_tokens_while(stop_rank)


async def test_a_zombie_that_wakes_changes_nothing(served: Served) -> None:
    """A rank that wakes after the epoch moved, with no agent to end it: all it sends is refused."""

    async def stop_rank_and_agent() -> None:
        node, pid = (await ranks_of(served, "decode"))[0]
        agent = served.cluster.children[f"agent-{node.replace('/', '-')}"].process.pid
        with stopped(agent):
            with stopped(pid):
                await served.ready_at(2)
            # Awake, at its old epoch, among peers of a newer one, until its agent wakes too.
            await served.tokens_flow()
        await is_gone(served, pid)

    await served.same_tokens_while(stop_rank_and_agent)


async def test_a_prefill_rank_is_killed_in_mid_prompt(served: Served) -> None:
    """SIGKILL of a prefill rank: its prompts are prefilled elsewhere."""

    async def kill_prefill() -> None:
        os.kill((await ranks_of(served, "prefill"))[0][1], signal.SIGKILL)
        await served.ready_at(2)

    await served.same_tokens_while(kill_prefill)


async def test_decode_ranks_are_killed_while_kv_is_handed_over(served: Served) -> None:
    """SIGKILL of decode ranks as new prompts come from prefill: no half-used block is decoded."""

    async def kill_two_in_turn() -> None:
        for _ in range(2):
            epoch = (await served.job()).job.epoch
            await served.another_begins()
            await served.kill_decode_rank()
            await served.ready_at(epoch + 1)

    await served.same_tokens_while(kill_two_in_turn, requests_at_once=3)


async def test_a_second_rank_dies_in_the_repair_of_the_first(served: Served) -> None:
    """A fault in the middle of a recovery is planned anew at a higher epoch."""
    store = EtcdStore([served.cluster.etcd_endpoints], "default", operation_key="operations/test")

    async def kill_twice() -> None:
        first, second = (await ranks_of(served, "decode"))[:2]
        os.kill(first[1], signal.SIGKILL)
        await phase_seen(store, IncidentPhase.FENCE, set())
        os.kill(second[1], signal.SIGKILL)
        await served.ready_at(3)

    await served.same_tokens_while(kill_twice)
    await store.close()


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
        ranks = await ranks_of(served, "decode")
        other = next(pid for node, pid in ranks if node != ranks[0][0])
        os.kill(ranks[0][1], signal.SIGKILL)
        os.kill(other, signal.SIGKILL)
        await served.ready_at(2)

    await served.same_tokens_while(kill_two)
    lost = {(f.rank.role, f.rank.rank) for i in await served.incidents() for f in i.faults}
    assert len(lost) == 2


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
    assert (await served.job()).job.epoch == 1


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


async def test_history_is_compacted_while_a_scheduler_is_stopped(tmp_path: Path) -> None:
    """A scheduler that wakes behind a compaction has missed nothing when it leads next."""
    async with serving(tmp_path) as served:
        number = await served.leader_number()
        store = EtcdStore([served.cluster.etcd_endpoints], "default", operation_key="operations/t")
        standby = served.cluster.children[f"scheduler-{1 - number}"].process.pid

        async def compact() -> None:
            await served.cluster.connect(number)
            with stopped(standby):
                await served.kill_decode_rank()
                await served.ready_at(2)
                await store.compact((await store.list(keys.JOBS)).revision)
            await served.kill_leader()
            await served.kill_decode_rank()
            await served.ready_at(3)

        await served.same_tokens_while(compact)
        await store.close()


async def test_an_older_state_of_etcd_is_restored_under_running_ranks(tmp_path: Path) -> None:
    """The new leader goes above every live epoch, and agents tell again what was forgotten."""
    async with serving(tmp_path, schedulers=1) as served:
        (etcd,) = served.cluster.etcds
        data, backup, newer = (etcd.folder / name for name in ("data", "backup", "newer"))
        await etcd.stop()
        shutil.copytree(data, backup)
        await etcd.start()

        async def set_back() -> None:
            await served.kill_decode_rank()
            await served.ready_at(2)
            await etcd.stop()
            data.rename(newer)
            backup.rename(data)
            await etcd.start()
            await served.ready_at(3)

        await served.same_tokens_while(set_back)
        job = await served.job()
        assert job.job.epoch >= 3
        active = [rank for rank in job.ranks if rank.stage == health_pb2.RANK_STAGE_LIVE]
        assert {rank.epoch for rank in active} == {job.job.epoch}


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
