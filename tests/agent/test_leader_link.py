"""A node's stream of reports: what is queued, and what is told again."""

from __future__ import annotations

import pytest

from raddle.agent import leader_link
from raddle.agent.leader_link import LeaderAddress, StatsStream
from raddle.model.stats import RankStats
from raddle.model.types import RankKey
from raddle.store.memory import MemoryStore


async def test_dropped_reports_are_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """When nobody takes reports the oldest go; who takes one again is told everything, once."""
    monkeypatch.setattr(leader_link, "QUEUE_MAX", 2)
    stream = StatsStream("sn0/n00", LeaderAddress(MemoryStore()), None)
    told: list[int] = []
    stream.on_connect.append(lambda: told.append(1))
    for rank in range(3):
        stream.report("j", RankStats(rank=RankKey(role="decode", instance=0, rank=rank)))
    messages = stream._messages()
    assert (await anext(messages)).node == "sn0/n00"
    assert told == []
    taken = [(await anext(messages)).reports[0].rank.rank for _ in range(2)]
    assert (taken, told) == ([1, 2], [1])
