"""Real processes, sockets, etcd and SIGKILL: what the main job survives."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.store.etcd.store import EtcdStore
from raddle.v1 import scheduler_pb2
from raddle.wire import records as codec
from tests.e2e.served import CLOSED, PHASES, Served, phase_seen, serving
from tests.e2e.ways import Ways


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as found:
        yield found


async def test_a_killed_rank_and_a_killed_npu_lose_no_token(served: Served) -> None:
    """SIGKILL of a rank, then of both dies of an NPU: the tokens are the same."""

    async def kill_rank() -> None:
        await served.kill_decode_rank()
        await served.ready_at(2)

    await served.same_tokens_while(kill_rank)

    async def kill_npu() -> None:
        ranks = await served.decode_ranks()
        npus = [die.rsplit("/", 1)[0] for die, _, _ in ranks]
        npu = next(name for name in npus if npus.count(name) == 2)
        epoch = (await served.job()).job.epoch
        for die, pid, _ in ranks:
            if die.startswith(npu):
                os.kill(pid, signal.SIGKILL)
        await served.ready_at(epoch + 1)

    await served.same_tokens_while(kill_npu)
    assert all(incident.phase == CLOSED for incident in await served.incidents())


async def test_a_killed_node_loses_no_token(served: Served) -> None:
    """SIGKILL of an agent and all its ranks at once: the survivors go on with the same tokens."""

    async def kill_node() -> None:
        die = (await served.decode_ranks())[0][0]
        served.cluster.kill_node("/".join(die.split("/")[:2]))
        await served.ready_at(2)

    await served.same_tokens_while(kill_node)


async def test_an_agent_killed_alone_moves_nothing(served: Served) -> None:
    """SIGKILL of an agent alone: its ranks go on, the new agent adopts them, nothing moves."""
    before = await served.decode_ranks()
    node = "/".join(before[0][0].split("/")[:2])

    async def kill_agent() -> None:
        name = f"agent-{node.replace('/', '-')}"
        child = served.cluster.children.pop(name)
        child.process.kill()
        child.process.wait()
        served.cluster.start_real_agent(node)

        async def ready_again() -> bool:
            request = scheduler_pb2.ListNodesRequest()
            nodes = (await served.cluster.stub.ListNodes(request, timeout=10.0)).nodes
            return all(n.state == "READY" for n in nodes)

        await served.cluster.until(ready_again, "the node is ready again")

    await served.same_tokens_while(kill_agent)
    assert await served.lost_ranks() == []
    assert sorted(await served.decode_ranks()) == sorted(before)


async def test_a_leader_killed_in_a_recovery_is_followed(served: Served) -> None:
    """SIGKILL of a rank and of the leader together: the next leader ends the recovery."""

    async def kill_both() -> None:
        await served.kill_decode_rank()
        await served.kill_leader()
        await served.ready_at(2)

    await served.same_tokens_while(kill_both)
    assert all(incident.phase == CLOSED for incident in await served.incidents())


# All phases that leave a record; DETECT leaves none and is tested with the simulator.
RECORDED = PHASES[1:]
# A long way from each scheduler to etcd: so a phase is still there when it is seen.
LONG_WAY_S = 0.03


@pytest.mark.timeout(400)
async def test_the_leader_is_killed_in_each_phase(tmp_path: Path) -> None:
    """SIGKILL of the leader in every phase of a recovery: the next one ends it, same tokens."""
    hit = await leaders_killed_in(PHASES, tmp_path)
    # On a busy machine a phase may be over before the signal arrives all the same.
    for attempt in range(5):
        missed = [phase for phase in RECORDED if phase not in hit]
        if missed:
            (folder := tmp_path / str(attempt)).mkdir()
            hit |= await leaders_killed_in(missed, folder)
    assert hit >= set(RECORDED)


async def leaders_killed_in(phases: Sequence[IncidentPhase], folder: Path) -> set[IncidentPhase]:
    """Kill one leader a phase; gives the phases in which recoveries stood when it was dead."""
    ways = Ways(schedulers=3, delay_s=LONG_WAY_S)
    await ways.start()
    try:
        return await _leaders_killed_in(phases, folder, ways)
    finally:
        await ways.stop()


async def _leaders_killed_in(
    phases: Sequence[IncidentPhase], folder: Path, ways: Ways
) -> set[IncidentPhase]:
    hit = set()
    async with serving(folder, on_made=ways.adopt, schedulers=3, more_flags=ways.flags) as served:
        cluster = served.cluster
        store = EtcdStore([cluster.etcd_endpoints], "default", operation_key="operations/test")
        for phase in phases:
            known = {incident.id for incident in await served.incidents()}
            epoch = (await served.job()).job.epoch

            async def kill_in(
                phase: IncidentPhase = phase, known: set[str] = known, epoch: int = epoch
            ) -> None:
                leader = await served.leader_number()
                child = cluster.children.pop(f"scheduler-{leader}")
                await served.kill_decode_rank()
                name = ""
                if phase is not IncidentPhase.DETECT:
                    name = await phase_seen(store, phase, known)
                child.process.kill()
                child.process.wait()
                if name:
                    record = await store.get(keys.incident(name))
                    assert record is not None
                    hit.add(codec.decode(record.key, record.value).phase)
                await cluster.connect((leader + 1) % 3)
                await served.ready_at(epoch + 1)
                cluster.start_scheduler(leader)

            await served.same_tokens_while(kill_in)
            assert all(incident.phase == CLOSED for incident in await served.incidents())
        await store.close()
    return hit


@pytest.mark.timeout(180)
async def test_an_etcd_member_of_three_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the etcd leader's member and then of a rank: nothing lost, the same tokens."""
    async with serving(tmp_path, etcd_members=3) as served:

        async def kill_member_and_rank() -> None:
            leader = await served.etcd_leader()
            member = served.cluster.etcds[leader].process
            assert member is not None
            member.kill()
            await served.kill_decode_rank()
            await served.ready_at(2)
            member.wait()
            assert await served.etcd_leader() != leader

        await served.same_tokens_while(kill_member_and_rank)
        assert all(incident.phase == CLOSED for incident in await served.incidents())
        assert len([incident.why.message for incident in await served.incidents()]) == 1
