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
        ("rank", {POOL}),
        ("rank/sn0/n01", set()),
        ("scheduler", {PING}),
        ("frontdoor", {TOKENS}),
        ("frontdoor/team-a", {TOKENS}),
        ("frontdoors", set()),
        ("client/frontdoor", set()),
        ("client/admin", set()),
        ("*", set()),
        ("", set()),
    ],
)
def test_each_caller_has_its_own_calls(identity: str, calls: set[str]) -> None:
    """Of its node's ranks an agent, whose name may be a pattern; nobody else's is one."""
    callers = Callers("sn0/n01")
    assert {path for path in (START, PING, TOKENS, POOL) if callers.may(identity, path)} == calls
