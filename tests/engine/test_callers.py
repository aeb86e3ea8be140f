"""Who may call a rank."""

from __future__ import annotations

import pytest

from raddle.agent.engine.reference.callers import Callers

START = "/raddle.v1.Engine/Quiesce"
PING = "/raddle.v1.Engine/Ping"
TOKENS = "/raddle.v1.ReferenceRank/Decode"
POOL = "/raddle.v1.PoolMember/Get"


@pytest.mark.parametrize(
    ("identity", "calls"),
    [
        ("agent/sn0/n01", {START, PING, POOL}),
        ("agent/sn0/*", {START, PING, POOL}),
        ("agent/*", {START, PING, POOL}),
        ("agent/sn0/n02", {POOL}),
        ("agent/sn1/*", {POOL}),
        ("scheduler", {PING}),
        ("client/frontdoor", {TOKENS}),
        ("*", set()),
        ("", set()),
    ],
)
def test_an_agent_of_several_nodes_commands_the_ranks_of_each(
    identity: str, calls: set[str]
) -> None:
    """An agent's name may be a pattern; nobody else's is, and each has its own calls."""
    callers = Callers("sn0/n01")
    assert {path for path in (START, PING, TOKENS, POOL) if callers.may(identity, path)} == calls
