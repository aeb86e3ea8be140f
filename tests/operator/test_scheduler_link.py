"""The operator's way to the scheduler when it is cut, and the pictures that watches paint."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from raddle.model.errors import TemporaryError
from raddle.operator.scheduler_link import Picture, SchedulerLink
from raddle.telemetry.channels import OPTIONS
from raddle.v1 import scheduler_pb2, scheduler_pb2_grpc
from tests.support import CuttingProxy, eventually

SNAPSHOT = scheduler_pb2.WATCH_KIND_SNAPSHOT
SYNCED = scheduler_pb2.WATCH_KIND_SYNCED
DELETED = scheduler_pb2.WATCH_KIND_DELETED


async def test_a_call_under_which_the_way_is_closed_may_be_repeated() -> None:
    """It is an error like any other, not the end of whoever called."""
    # It listens, and nobody there ever answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = SchedulerLink([f"127.0.0.1:{silent.getsockname()[1]}"], None)
        calling = asyncio.create_task(link.call("GetStatus", scheduler_pb2.GetStatusRequest()))
        await eventually(lambda: link._channel is not None, "the call is under way")
        await asyncio.gather(link._leave(link._channel, ""))
        with pytest.raises(TemporaryError):
            await calling
        await link.close()


class _Silent(scheduler_pb2_grpc.SchedulerServicer):
    """Begins a watch of jobs and tells nothing after that."""

    async def WatchJobs(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        yield scheduler_pb2.WatchJobsResponse(kind=SYNCED)
        await asyncio.Event().wait()


async def test_a_scheduler_that_falls_silent_is_left() -> None:
    """Its connections do not end by themselves, and a watch that tells nothing need not be dead."""
    server = grpc.aio.server(options=OPTIONS)
    servicer: Any = _Silent
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    proxy = CuttingProxy(f"127.0.0.1:{port}")
    link = SchedulerLink([await proxy.start()], None)
    request = scheduler_pb2.WatchJobsRequest()
    following = asyncio.create_task(link._follow("WatchJobs", request, link.jobs))
    try:
        await eventually(link.jobs.synced.is_set, "the watch tells")
        before = link.breaks
        proxy.freeze()
        await eventually(lambda: link.breaks > before, "the watch is begun again", 30.0)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await link.close()
        await proxy.stop()
        await server.stop(None)


def told(kind: scheduler_pb2.WatchKind.ValueType, uid: str = "") -> scheduler_pb2.WatchJobsResponse:
    message = scheduler_pb2.WatchJobsResponse(kind=kind)
    message.job.uid = uid
    return message


def test_nothing_is_told_before_all_was_told_once() -> None:
    """Who needs the whole picture is refused until then, and called then, if it is empty too."""
    picture, heard, whole = Picture("job", "uid"), list[str](), list[int]()
    picture.listeners.append(heard.append)
    picture.when_whole.append(lambda: whole.append(len(picture.values)))
    picture.begin()
    with pytest.raises(TemporaryError, match="each job"):
        picture.require_whole()
    for uid in ("a", "b"):
        picture.take(told(SNAPSHOT, uid))
    assert (heard, whole) == ([], [])
    picture.take(told(SYNCED))
    picture.require_whole()
    assert (heard, whole) == (["a", "b"], [2])
    picture.begin()
    picture.take(told(SYNCED))
    assert (heard, whole) == (["a", "b", "a", "b"], [2, 0])


def test_what_a_new_snapshot_does_not_have_is_told_as_gone() -> None:
    """A deletion behind a broken watch is not missed."""
    picture, heard = Picture("job", "uid"), list[str]()
    picture.listeners.append(heard.append)
    picture.begin()
    for message in (told(SNAPSHOT, "a"), told(SNAPSHOT, "b"), told(SYNCED)):
        picture.take(message)
    assert picture.synced.is_set()
    picture.begin()
    picture.take(told(SNAPSHOT, "b"))
    assert set(picture.values) == {"a", "b"}
    heard.clear()
    picture.take(told(SYNCED))
    assert heard == ["a"]
    assert set(picture.values) == {"b"}
    picture.take(told(DELETED, "b"))
    assert picture.values == {}
