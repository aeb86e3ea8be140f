"""KV blocks of real processes: what SIGKILL of ranks, pool hosts and nodes leaves, and repair."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from raddle import models
from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.agent.engine.reference.shape import parse_shape
from raddle.v1 import engine_pb2, incident_pb2, scheduler_pb2
from tests.e2e.served import JOB, Served, serving

POOL = (
    "{name: cache, kind: cache, ranks: 2, dram_bytes: 100000000,",
    "{name: cache, kind: cache, ranks: 3, dram_bytes: 100000000, kv_replicas: 2,",
)


ONE_COPY = POOL[1].replace("kv_replicas: 2", "kv_replicas: 1")
NO_POOL = "\n".join(line for line in JOB.splitlines() if "kind: cache" not in line)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, job=JOB.replace(*POOL)) as found:
        yield found


async def kv_status(served: Served) -> Any:
    request = scheduler_pb2.GetKvStatusRequest(job_uid=served.uid)
    return await served.cluster.stub.GetKvStatus(request, timeout=10.0)


async def protected(served: Served, members: int) -> None:
    """Wait until every block has two copies again, on so many members."""

    async def whole() -> bool:
        status = await kv_status(served)
        if (
            len(status.members) != members
            or any(member.blocks == 0 for member in status.members)
            or status.blocks == 0
            or status.blocks_below > 0
        ):
            return False
        assert (status.replicas, status.protection) == (2, 1.0)
        assert sum(status.blocks_by_copies[2:]) == status.blocks
        return True

    await served.cluster.until(whole, "every block has two copies")


async def ranks_of(served: Served, role: str) -> list[Any]:
    processes = served.cluster.rank_processes()
    return [
        rank
        for rank in (await served.job()).ranks
        if rank.role == role and rank.incarnation in processes
    ]


def kill(served: Served, rank: Any) -> None:
    os.kill(served.cluster.rank_processes()[rank.incarnation], signal.SIGKILL)


async def recover_from_a_killed_rank(served: Served) -> None:
    await served.kill_decode_rank()
    await served.ready_at(2)


async def test_sequences_of_a_killed_rank_come_back_from_the_pool(served: Served) -> None:
    """SIGKILL of a decode rank: same tokens, blocks instead of computing, and how long it took."""
    await protected(served, members=3)
    await served.same_tokens_while(partial(recover_from_a_killed_rank, served))
    (incident,) = await served.incidents()
    plan = incident.plans[0].instances[0]
    assert plan.sequences_restored > 0
    assert plan.kv_tokens_restored > 0

    async def all_back() -> bool:
        (recovery,) = (await kv_status(served)).recoveries
        return bool(recovery.sequences_back == recovery.sequences > 0)

    await served.cluster.until(all_back, "the sequences make tokens again")
    status = await kv_status(served)
    (recovery,) = status.recoveries
    assert recovery.last_actual.ToNanoseconds() >= recovery.median_actual.ToNanoseconds() > 0
    assert recovery.last_predicted.ToNanoseconds() > 0
    assert recovery.kv_tokens_restored == plan.kv_tokens_restored
    assert status.hit_rate > 0
    await only_the_living_hold_blocks(served)


async def test_a_killed_pool_hosts_blocks_are_copied_again(served: Served) -> None:
    """SIGKILL of a pool host under load: same tokens, then every block has two copies again."""
    await protected(served, members=3)
    dead = (await ranks_of(served, "cache"))[0]

    async def kill_host() -> None:
        kill(served, dead)
        await served.ready_at(2)

    await served.same_tokens_while(kill_host)
    alive = await ranks_of(served, "cache")
    assert dead.incarnation not in {rank.incarnation for rank in alive}
    await protected(served, members=len(alive))
    await only_the_living_hold_blocks(served)


async def test_a_killed_node_takes_dies_and_its_share_of_the_pool(served: Served) -> None:
    """SIGKILL of a node with decode ranks and a pool host: same tokens, protection returns."""
    await protected(served, members=3)
    hosts = await placed(served, "cache")
    decoding = await placed(served, "decode")
    node = next(node for node in hosts if node in decoding)

    async def kill_node() -> None:
        served.cluster.kill_node(node)
        await served.ready_at(2)

    await served.same_tokens_while(kill_node)
    incident = (await served.incidents())[0]
    assert incident.subject == node
    await protected(served, members=len(await placed(served, "cache")))
    await only_the_living_hold_blocks(served)


async def only_the_living_hold_blocks(served: Served) -> None:
    """Whatever any prompt's block is said to lie at is a process that runs."""
    living = {
        (rank.role, rank.rank)
        for role in ("prefill", "decode", "cache")
        for rank in await ranks_of(served, role)
    }
    found = await locate(served, prompt_blocks(served))
    holders = {(p.rank.role, p.rank.rank) for block in found.blocks for p in block.places}
    assert holders
    assert holders <= living


async def placed(served: Served, role: str) -> list[str]:
    """Nodes of the role's active ranks."""
    placement = (await served.job()).placement
    return [
        rank.node
        for part in placement.instances
        if part.role == role
        for rank in part.ranks
        if rank.state == "ACTIVE"
    ]


async def test_a_new_leader_learns_all_blocks_and_the_command_line_tells(served: Served) -> None:
    """SIGKILL of the leader: members tell the next one everything; `kv status|locate` say it."""
    await protected(served, members=3)
    before = await kv_status(served)
    await served.kill_leader()
    await protected(served, members=3)
    after = await kv_status(served)
    assert after.blocks >= before.blocks
    status = await told(served, "kv", "status", "small")
    assert int(status["blocks_below"]) == 0
    assert int(status["blocks"]) == after.blocks
    assert len(status["members"]) == 3
    name = prompt_blocks(served)[0]
    found = await told(served, "kv", "locate", "small", name, "f" * 32)
    first, nowhere = found["blocks"]
    pooled = [place for place in first["places"] if place["tier"] == "KV_TIER_DRAM"]
    assert len({place["node"] for place in pooled}) == len(pooled) == 2
    own = {place["rank"]["role"] for place in first["places"] if place not in pooled}
    assert own <= {"prefill", "decode"}
    assert (nowhere["places"], found["prefix_blocks"]) == ([], 1)


async def test_sequences_come_back_from_the_memory_of_peers(tmp_path: Path) -> None:
    """A job without a pool: a killed rank's sequences continue from blocks of other ranks."""
    async with serving(tmp_path, job=NO_POOL) as served:
        await served.same_tokens_while(partial(recover_from_a_killed_rank, served))
        (incident,) = await served.incidents()
        plan = incident.plans[0].instances[0]
        assert plan.kv_tokens_restored > 0
        ranks = (await served.job()).ranks
        assert sum(rank.kv_tokens_restored for rank in ranks) > 0
        found = await locate(served, prompt_blocks(served))
        places = [place for block in found.blocks for place in block.places]
        assert {place.tier for place in places} == {engine_pb2.KV_TIER_HBM}
        assert {place.rank.role for place in places} == {"prefill", "decode"}

        async def measured() -> bool:
            (incident,) = await served.incidents()
            plan = incident.plans[0].instances[0]
            return bool(plan.kv_last_actual.ToNanoseconds() > 0)

        await served.cluster.until(measured, "the incident tells when all were back")


async def test_a_drained_pool_host_hands_its_blocks_on_before_it_ends(tmp_path: Path) -> None:
    """Single copies, under load: the drain is done when all of them are on other hosts."""
    async with serving(tmp_path, job=JOB.replace(POOL[0], ONE_COPY)) as served:
        names = prompt_blocks(served)
        await pooled(served, names)
        node = (await placed(served, "cache"))[0]
        before = {rank.incarnation for rank in await ranks_of(served, "cache")}

        async def drain() -> None:
            request = scheduler_pb2.CreateMaintenanceRequest(subject=node)
            answer = await served.cluster.stub.CreateMaintenance(request, timeout=10.0)
            asked = scheduler_pb2.GetMaintenanceRequest(id=answer.maintenance.id)

            async def drained() -> bool:
                found = await served.cluster.stub.GetMaintenance(asked, timeout=10.0)
                state = found.maintenance.state
                return bool(state == incident_pb2.MAINTENANCE_STATE_DRAINED)

            await served.cluster.until(drained, "the node is drained")

        await served.same_tokens_while(drain)
        assert node not in await placed(served, "cache")
        assert len(before & set(served.cluster.rank_processes())) == len(before) - 1
        assert all(place != node for places in await pooled(served, names) for place in places)
        told = [i.why.message for i in await served.incidents()]
        assert any("hand their blocks on" in message for message in told)


async def pooled(served: Served, names: list[str]) -> list[list[str]]:
    """Wait until every block is in the pool; gives the nodes of each."""
    found: list[list[str]] = []

    async def all_there() -> bool:
        answer = await locate(served, names)
        found[:] = [
            [place.node for place in block.places if place.tier == engine_pb2.KV_TIER_DRAM]
            for block in answer.blocks
        ]
        return all(found)

    await served.cluster.until(all_there, "every block is in the pool")
    return found


async def locate(served: Served, names: list[str]) -> Any:
    request = scheduler_pb2.LocateKvBlocksRequest(job_uid=served.uid, block_hashes=names)
    return await served.cluster.stub.LocateKvBlocks(request, timeout=10.0)


def prompt_blocks(served: Served) -> list[str]:
    """Names of the full blocks of all prompts."""
    key = cache_key(parse_shape(demo_config()).digest)
    names = [name for request in served.requests for name in block_hashes(key, request.prompt, 16)]
    return list(dict.fromkeys(names))


def demo_config() -> str:
    return (resources.files(models) / "raddle-demo.json").read_text()


async def told(served: Served, *command: str) -> dict[str, Any]:
    """What the command line prints as JSON."""
    server = served.cluster.addresses[await served.leader_number()]
    arguments = [sys.executable, "-m", "raddle.cli.main", "--server", server, "-o", "json"]
    process = await asyncio.create_subprocess_exec(
        *arguments, *command, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    answer: dict[str, Any] = json.loads(output)
    return answer
