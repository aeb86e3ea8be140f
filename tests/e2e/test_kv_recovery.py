"""KV blocks of real processes: what SIGKILL of ranks, pool hosts and nodes leaves, and repair."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from raddle import models
from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.agent.engine.reference.shape import parse_shape
from raddle.v1 import scheduler_pb2
from tests.e2e.served import JOB, Served, serving

POOL = (
    "{name: cache, kind: cache, ranks: 2, dram_bytes: 100000000,",
    "{name: cache, kind: cache, ranks: 3, dram_bytes: 100000000, kv_replicas: 2,",
)


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
        return (
            len(status.members) == members
            and all(member.blocks > 0 for member in status.members)
            and status.blocks > 0
            and status.blocks_below == 0
        )

    await served.cluster.until(whole, "every block has two copies")
    status = await kv_status(served)
    assert (status.replicas, status.protection) == (2, 1.0)
    assert sum(status.blocks_by_copies[2:]) == status.blocks


async def ranks_of(served: Served, role: str) -> list[Any]:
    processes = served.cluster.rank_processes()
    return [
        rank
        for rank in (await served.job()).ranks
        if rank.role == role and rank.incarnation in processes
    ]


def kill(served: Served, rank: Any) -> None:
    os.kill(served.cluster.rank_processes()[rank.incarnation], signal.SIGKILL)


async def test_sequences_of_a_killed_rank_come_back_from_the_pool(served: Served) -> None:
    """SIGKILL of a decode rank: same tokens, blocks instead of computing, and how long it took."""
    await protected(served, members=3)

    async def kill_rank() -> None:
        await served.kill_decode_rank()
        await served.ready_at(2)

    await served.same_tokens_while(kill_rank)
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
    name = block_hashes(
        cache_key(parse_shape(demo_config()).digest), served.requests[0].prompt, 16
    )[0]
    found = await told(served, "kv", "locate", "small", name, "f" * 32)
    first, nowhere = found["blocks"]
    assert len({place["node"] for place in first["places"]}) == 2
    assert {place["tier"] for place in first["places"]} == {"KV_TIER_DRAM"}
    assert (nowhere["places"], found["prefix_blocks"]) == ([], 1)


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
