"""One command's way to the server: which server that is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from raddle.cli.contexts import CliContext
from raddle.cli.session import EXIT_OK, EXIT_UNAVAILABLE, Session
from raddle.model.errors import Reason, TemporaryError

LEADER = "10.0.0.6:7400"
NAME = "dns:///raddle-scheduler.raddle.svc:7400"


@pytest.mark.parametrize(
    ("leader_only", "code", "asked"),
    [(True, EXIT_OK, [NAME, LEADER]), (False, EXIT_UNAVAILABLE, [NAME])],
)
def test_a_stream_is_asked_for_where_the_leader_is(
    monkeypatch: pytest.MonkeyPatch, leader_only: bool, code: int, asked: list[str]
) -> None:
    """A call that standbys do not pass on is made again at the leader; others never twice."""
    servers: list[str] = []

    async def ask(_session: Session, server: str, _work: Callable[[Any], Awaitable[None]]) -> None:
        servers.append(server)
        if server != LEADER:
            raise TemporaryError(Reason.NOT_LEADER, "not here", leader_address=LEADER)

    async def work(_stub: Any) -> None:
        raise AssertionError("no server is there")

    monkeypatch.setattr(Session, "_ask", ask)
    context = CliContext(server=NAME)
    context.check()
    with pytest.raises(SystemExit) as ended:
        Session(context).run(work, leader_only=leader_only)
    assert ended.value.code == code
    assert servers == asked
