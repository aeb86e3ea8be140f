"""KV blocks of real processes: what SIGKILL of ranks, pool hosts and nodes leaves, and repair."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

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
