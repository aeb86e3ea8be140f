"""Watches over a mirror: what a stream is told, and when it has to begin anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
import pytest

from raddle.core.instructions import Write
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.model.job import Job
from raddle.model.types import Why
from raddle.scheduler.mirror import Mirror
from raddle.scheduler.watches import Seen, Watches
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Delete, Put, Transaction
from raddle.v1 import scheduler_pb2
from raddle.wire import records as wire
from raddle.wire.status import error_from
from tests.scheduler.conftest import Served
from tests.support import eventually

IDLE_S = 60.0


def job(name: str, said: str = "") -> Job:
    return Job(uid=name, why=Why(reason="X", message=said))


class Followed:
    """A store that somebody writes to, a mirror of it, and watches over that."""

    def __init__(self) -> None:
        self.backend = MemoryBackend()
        self.store = MemoryStore(self.backend)
        self.mirror = Mirror(self.store)
        self.watches = Watches(self.mirror)

    def put(self, name: str, said: str = "") -> int:
        value = wire.encode(keys.job(name), job(name, said))
        return self.backend.commit(Transaction(writes=(Put(keys.job(name), value),))).revision

    def delete(self, name: str) -> int:
        return self.backend.commit(Transaction(writes=(Delete(keys.job(name)),))).revision

    def since(self, revision: int) -> list[tuple[str, int]]:
        return [(s.key, s.revision) for s in self.watches.since(keys.JOBS, revision)]

    def compacted(self, revision: int) -> bool:
        try:
            self.watches.since(keys.JOBS, revision)
        except PermanentError as error:
            return error.reason is Reason.COMPACTED
        return False

    async def open(self) -> AsyncIterator[Seen | None]:
        stream = self.watches.follow(keys.JOBS, IDLE_S)
        assert await anext(stream) is None
        return stream


@pytest.fixture
async def followed() -> AsyncIterator[Followed]:
    found = Followed()
    found.put("before")
    running = asyncio.create_task(found.mirror.run())
    await found.mirror.wait_revision(found.backend.revision)
    yield found
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_a_new_process_has_no_history(followed: Followed) -> None:
    """Who watched another process is sent back to a snapshot: deletions are in no list."""
    read_at = followed.mirror.revision
    assert followed.compacted(read_at - 1)
    assert followed.since(read_at) == []
    revision = followed.put("after")
    await followed.mirror.wait_revision(revision)
    assert followed.since(read_at) == [(keys.job("after"), revision)]


async def test_a_list_in_between_tells_open_streams_and_ends_the_history(
    followed: Followed,
) -> None:
    """What was missed behind a cut reaches the open stream; older revisions begin anew."""
    known = followed.put("seen")
    await followed.mirror.wait_revision(known)
    stream = await followed.open()
    followed.store.cut()
    followed.put("missed")
    followed.delete("seen")
    followed.store.mend()
    await followed.mirror.wait_revision(followed.backend.revision)
    told = [await anext(stream) for _ in range(2)]
    assert {s.key for s in told if s is not None} == {keys.job("seen"), keys.job("missed")}
    await eventually(lambda: followed.compacted(known), "the history begins with the list")
    await stream.aclose()  # type: ignore[attr-defined]


async def test_an_own_commit_that_overtakes_a_list_stays_in_the_history(
    followed: Followed,
) -> None:
    """A list of before does not forget what was committed while it was under way."""
    snapshot = await followed.store.list("")
    revision = followed.put("own")
    followed.mirror.apply_own((Write(keys.job("own"), job("own")),), revision)
    followed.mirror._load(snapshot)
    assert followed.since(snapshot.revision) == [(keys.job("own"), revision)]


async def test_each_change_is_told_once(followed: Followed) -> None:
    """An own commit and its echo are one change."""
    read_at = followed.mirror.revision
    stream = await followed.open()
    revision = followed.put("own")
    followed.mirror.apply_own((Write(keys.job("own"), job("own")),), revision)
    last = followed.put("last")
    await followed.mirror.wait_revision(last)
    expected = [(keys.job("own"), revision), (keys.job("last"), last)]
    assert followed.since(read_at) == expected
    told = [await anext(stream) for _ in range(2)]
    assert [(s.key, s.revision) for s in told if s is not None] == expected


async def test_a_store_that_was_set_back_ends_every_stream(followed: Followed) -> None:
    """The same revisions mean other changes from there on."""
    kept = followed.backend.revision
    records, history = dict(followed.backend.records), list(followed.backend.history)
    for number in range(3):
        followed.put(f"forgotten-{number}")
    await followed.mirror.wait_revision(followed.backend.revision)
    stream = await followed.open()
    followed.store.cut()
    backend = followed.backend
    backend.revision, backend.records, backend.history = kept, records, history
    followed.store.mend()
    await eventually(lambda: followed.mirror.set_backs == 1, "the mirror sees it")
    with pytest.raises(PermanentError, match="set back"):
        await anext(stream)
    assert followed.since(kept) == []
    revision = followed.put("new")
    await followed.mirror.wait_revision(revision)
    assert followed.since(kept) == [(keys.job("new"), revision)]


async def test_a_slow_reader_is_ended(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream keeps a bounded number of changes, tells them, and then says why it ends."""
    monkeypatch.setattr("raddle.scheduler.watches.QUEUE_MAX", 3)
    stream = await followed.open()
    for number in range(5):
        followed.put(f"{number}")
    await followed.mirror.wait_revision(followed.backend.revision)
    for _ in range(3):
        assert await anext(stream) is not None
    with pytest.raises(PermanentError, match="did not keep up"):
        await anext(stream)


async def test_a_stopping_process_says_so(followed: Followed) -> None:
    """Open streams end with what to do, and none begins any more."""
    stream = await followed.open()
    followed.watches.stop()
    with pytest.raises(TemporaryError, match="this scheduler stops"):
        await anext(stream)
    late = await followed.open()
    with pytest.raises(TemporaryError, match="this scheduler stops"):
        await anext(late)


# --- over gRPC ------------------------------------------------------------------------------------


async def watch_error(served: Served, after: int) -> tuple[grpc.StatusCode, str]:
    stream = served.stub().WatchJobs(scheduler_pb2.WatchJobsRequest(after_revision=after))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    return caught.value.code(), error_from(caught.value).message


async def test_a_revision_out_of_range_is_refused(served: Served) -> None:
    """Before the history, ahead of the store, or no revision at all: OUT_OF_RANGE."""
    for after in (1, 99_999_999, -1):
        code, message = await watch_error(served, after)
        assert code is grpc.StatusCode.OUT_OF_RANGE
        assert "begin with a snapshot" in message


async def test_an_old_change_carries_its_own_revision(served: Served) -> None:
    """A job in the history is the job of that time, revision and all."""
    begun = served.mirror.revision
    job = await served.submit("one")
    for priority in (1, 2):
        request = scheduler_pb2.UpdateJobRequest(job_uid=job.uid)
        request.spec.priority = priority
        request.update_mask.paths.append("priority")
        await served.stub().UpdateJob(request)
    await served.stub().CancelJob(scheduler_pb2.CancelJobRequest(job_uid=job.uid))
    await served.stub().DeleteJob(scheduler_pb2.DeleteJobRequest(job_uid=job.uid))
    stream = served.stub().WatchJobs(scheduler_pb2.WatchJobsRequest(after_revision=begun))
    seen: list[Any] = []
    while not seen or seen[-1].kind != scheduler_pb2.WATCH_KIND_DELETED:
        seen.append(await stream.read())
    revisions = [message.revision for message in seen]
    assert [message.job.revision for message in seen] == revisions
    assert revisions == sorted(set(revisions))
    priorities = [message.job.spec.priority for message in seen]
    assert priorities == sorted(priorities)
    assert set(priorities) == {0, 1, 2}


async def test_a_watch_of_a_stopping_server_hears_why(served: Served) -> None:
    """The stream ends as unavailable, with what to do next."""
    stream = served.stub().WatchJobs(scheduler_pb2.WatchJobsRequest())
    assert (await stream.read()).kind == scheduler_pb2.WATCH_KIND_SYNCED
    served.watches.stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "begin the watch again" in error_from(caught.value).message
