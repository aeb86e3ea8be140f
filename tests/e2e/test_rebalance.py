"""Loads that real ranks stream make a real scheduler move experts; no token changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from raddle.v1 import scheduler_pb2
from tests.e2e.history import assert_one_writer
from tests.e2e.served import Served, serving

pytestmark = pytest.mark.timeout(300)
# Each round has the same requests. Enough tokens for a decision come in three or four.
_ROUNDS_MAX = 60


def look_often(name: str) -> list[str]:
    return ["--rebalance-every-s", "1"] if name.startswith("scheduler") else []


async def rebalanced(served: Served) -> list[str]:
    """What the job's history says of rebalances, oldest first."""
    request = scheduler_pb2.ListEventsRequest(subject=served.uid)
    events = (await served.cluster.stub.ListEvents(request, timeout=10.0)).events
    return [event.message for event in events if event.kind == "REBALANCED"]


async def test_streamed_loads_move_experts_while_tokens_flow(tmp_path: Path) -> None:
    """A new epoch with a better map, told with its gain; every token as before."""
    async with serving(tmp_path, more_flags=look_often) as served:
        for _ in range(_ROUNDS_MAX):
            await served.same_tokens_while(served.tokens_flow)
            if await rebalanced(served):
                break
        told = await rebalanced(served)
        assert told
        assert "decode/0: balance" in told[0]
        assert "gained" in told[0]
        await served.ready_at(2)
        # The ranks that loaded what moved answer as before.
        await served.same_tokens_while(served.tokens_flow)
        assert await served.incidents() == []
        await assert_one_writer(served.cluster.etcd_endpoints)
