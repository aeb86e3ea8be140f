"""A second fault while the first is being dealt with, on real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raddle.v1 import scheduler_pb2
from tests.e2e.served import JOB, serving
from tests.e2e.test_hard_faults import ranks_of, serves_whole, settled

pytestmark = pytest.mark.timeout(180)

# Four decode ranks whose slots hold every expert once: a lost one must be started anew.
WITHOUT_REDUNDANCY = JOB.replace("ranks: 6, slots_per_rank: 10", "ranks: 4, slots_per_rank: 8")


async def test_a_cache_rank_dies_while_a_decode_rank_is_started_anew(tmp_path: Path) -> None:
    """The plan for the second loss waits for the first one's new process; no token is lost."""
    async with serving(tmp_path, job=WITHOUT_REDUNDANCY, schedulers=1) as served:
        _, cache = (await ranks_of(served, "cache"))[0]

        async def kill_both() -> None:
            await served.kill_decode_rank()

            async def begun() -> bool:
                return bool((await served.job()).job.epoch >= 2)

            await served.cluster.until(begun, "the decode rank is being started anew")
            os.kill(cache, signal.SIGKILL)
            await served.ready_at(3)

        await served.same_tokens_while(kill_both)
        await settled(served)


def _seats(job: Any) -> list[tuple[str, int, int]]:
    """Where the active ranks sit, and which processes they are."""
    return [
        (rank.die or rank.node, rank.rank, rank.start_count)
        for part in job.placement.instances
        for rank in part.ranks
        if rank.state == "ACTIVE"
    ]


async def test_a_host_dies_after_its_agent(tmp_path: Path) -> None:
    """An agent dies alone and nothing moves; when its ranks follow, the node is lost at once."""
    async with serving(tmp_path, schedulers=1) as served:
        node = (await ranks_of(served, "prefill"))[0][0]

        async def kill_in_turn() -> None:
            child = served.cluster.children.pop(f"agent-{node.replace('/', '-')}")
            child.process.kill()
            child.process.wait()

            async def suspected() -> bool:
                answer = await served.cluster.stub.ListNodes(scheduler_pb2.ListNodesRequest())
                found = next(n for n in answer.nodes if n.node == node)
                return bool(found.why.reason == "RANKS_ANSWER")

            await served.cluster.until(suspected, "the silent node's ranks answer")
            # Its ranks go on where they are. (A starved machine may break a step's deadline, which
            # moves nothing either and takes an epoch.)
            assert _seats(await served.job()) == before
            for pid in served.cluster.rank_processes(node).values():
                os.kill(pid, signal.SIGKILL)

            async def moved() -> bool:
                found = await served.job()
                return serves_whole(found.job) and _seats(found) != before

            await served.cluster.until(moved, "the job goes on elsewhere")

        before = _seats(await served.job())
        await served.same_tokens_while(kill_in_turn)
        await settled(served)
