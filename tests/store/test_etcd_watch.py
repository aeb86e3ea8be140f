"""The watch of the etcd client: where it resumes, what it takes for life, what ends it."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from raddle.etcd.v1 import rpc_pb2 as rpc
from raddle.model.errors import PermanentError, Reason
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd import watch as etcd_watch
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Change, Changes, Put, Transaction
from tests.certificates import Authority
from tests.store.fake_etcd import Scripted, Stream, serving
from tests.support import CuttingProxy, built_etcd, end

HISTORY = 4_000


def answer(*revisions: int, at: int, **fields: object) -> rpc.WatchResponse:
    """A response with an event at each revision, from a store that is at revision `at`."""
    events = [
        rpc.Event(kv=rpc.KeyValue(key=b"/raddle/t/k", mod_revision=revision))
        for revision in revisions
    ]
    header = rpc.ResponseHeader(revision=at)
    return rpc.WatchResponse(header=header, events=events, **fields)  # type: ignore[arg-type]


async def create(stream: Stream, *, at: int) -> int:
    """Answer the request for a watch; the revision from which it is wanted."""
    request: rpc.WatchRequest = await stream.read()
    await stream.write(answer(at=at, created=True))
    return request.create_request.start_revision


async def stay_silent(stream: Stream) -> None:
    """Hear everything, answer nothing, until the client goes."""
    while await stream.read() is not grpc.aio.EOF:
        pass


async def signs_of_life(stream: Stream, count: int) -> None:
    """Answer that many requests for progress, from a store that is at revision 9."""
    for _ in range(count):
        request: rpc.WatchRequest | object = await stream.read()
        if not isinstance(request, rpc.WatchRequest):
            return
        assert request.HasField("progress_request")
        await stream.write(answer(at=9, watch_id=-1))


@asynccontextmanager
async def watched(etcd: Scripted) -> AsyncIterator[AsyncIterator[Changes]]:
    """A watch from revision 2 that runs over these scripts."""
    async with serving(etcd) as endpoint, asyncio.timeout(20):
        store = EtcdStore([endpoint], "t", operation_key="operations/r")
        async with aclosing(store.watch("k", from_revision=2)) as stream:
            yield stream
        await store.close()


async def take(stream: AsyncIterator[Changes], last: int) -> list[list[int]]:
    """The revisions of each batch, until one that ends with `last`."""
    batches: list[list[int]] = []
    while not batches or batches[-1][-1] != last:
        changes = await anext(stream)
        if not changes.resumed:
            batches.append([change.mod_revision for change in changes.changes])
    return batches


async def test_a_watch_resumes_after_its_last_event() -> None:
    """A batch that catches up carries the store's revision: what lies between is still asked."""
    starts = []

    async def catches_up(stream: Stream) -> None:
        starts.append(await create(stream, at=9))
        await stream.write(answer(2, 3, at=9))

    async def goes_on(stream: Stream) -> None:
        starts.append(await create(stream, at=9))
        await stream.write(answer(*range(starts[-1], 10), at=9))
        await stay_silent(stream)

    async with watched(Scripted(catches_up, goes_on)) as stream:
        assert await take(stream, 9) == [[2, 3], [4, 5, 6, 7, 8, 9]]
    assert starts == [2, 4]


async def test_a_fragment_is_no_batch() -> None:
    """Nothing of a revision is told, and the watch does not move, before its last fragment."""
    starts = []

    async def breaks_off(stream: Stream) -> None:
        starts.append(await create(stream, at=3))
        await stream.write(answer(2, at=3, fragment=True))

    async def goes_on(stream: Stream) -> None:
        starts.append(await create(stream, at=3))
        await stream.write(answer(2, at=3, fragment=True))
        await stream.write(answer(2, 3, at=3))
        await stay_silent(stream)

    async with watched(Scripted(breaks_off, goes_on)) as stream:
        assert await take(stream, 3) == [[2, 2, 3]]
    assert starts == [2, 2]


async def test_a_sign_of_life_keeps_a_quiet_watch_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that answers what it is asked is kept, and its answers never move the watch.

    etcd before 3.5.8 may answer with a revision whose events are still to come.
    """
    monkeypatch.setattr(etcd_watch, "SILENCE_S", 0.2)
    starts = []

    async def lives(stream: Stream) -> None:
        starts.append(await create(stream, at=1))
        await signs_of_life(stream, 2)
        await stream.write(answer(2, at=9))
        await signs_of_life(stream, 2)

    async def goes_on(stream: Stream) -> None:
        starts.append(await create(stream, at=9))
        await stream.write(answer(3, 9, at=9))
        await stay_silent(stream)

    async with watched(Scripted(lives, goes_on)) as stream:
        assert await take(stream, 9) == [[2], [3, 9]]
    assert starts == [2, 3]


async def test_a_watch_leaves_a_member_that_gives_no_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stream that is open and silent is asked once, then given up for another."""
    monkeypatch.setattr(etcd_watch, "SILENCE_S", 0.6)
    asked = []

    async def falls_silent(stream: Stream) -> None:
        await create(stream, at=1)
        while (request := await stream.read()) is not grpc.aio.EOF:
            asked.append(request)

    async def goes_on(stream: Stream) -> None:
        await create(stream, at=2)
        await stream.write(answer(2, at=2))
        await stay_silent(stream)

    async with watched(Scripted(falls_silent, goes_on)) as stream:
        assert await take(stream, 2) == [[2]]
    assert [request.HasField("progress_request") for request in asked] == [True]


async def test_a_watch_that_etcd_ends_is_begun_again() -> None:
    """A cancelled watch goes on where it was, over a new stream."""
    starts = []

    async def cancels(stream: Stream) -> None:
        starts.append(await create(stream, at=2))
        await stream.write(answer(2, at=2))
        await stream.write(answer(at=2, canceled=True, cancel_reason="the member is leaving"))
        # The stream itself lives on.
        await signs_of_life(stream, 100)

    async def goes_on(stream: Stream) -> None:
        starts.append(await create(stream, at=3))
        await stream.write(answer(3, at=3))
        await stay_silent(stream)

    async with watched(Scripted(cancels, goes_on)) as stream:
        assert await take(stream, 3) == [[2], [3]]
    assert starts == [2, 3]


async def test_a_watch_cut_in_catch_up_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """A connection that breaks in the middle of a long history costs no event.

    etcd sends 1,000 revisions in one response: the cut comes after the first ones were delivered.
    """
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    writers = [
        EtcdStore([server.endpoint], "t", operation_key=f"operations/{i}") for i in range(20)
    ]

    async def write(writer: EtcdStore) -> None:
        for _ in range(HISTORY // len(writers)):
            await writer.commit(Transaction(writes=(Put("k", b"x" * 100),)))

    await asyncio.gather(*(write(writer) for writer in writers))
    proxy = CuttingProxy(server.endpoint)
    reader = EtcdStore([await proxy.start()], "t", operation_key="operations/r")
    proxy.bytes_max = 200_000
    seen: list[Change] = []
    at_cut = 0
    async with asyncio.timeout(30), aclosing(reader.watch("k", from_revision=2)) as stream:
        async for changes in stream:
            if changes.resumed:
                at_cut = len(seen)
            seen += changes.changes
            if len(seen) >= HISTORY:
                break
    assert 0 < at_cut < HISTORY, "the connection was not cut in mid catch-up"
    revisions = [change.mod_revision for change in seen]
    assert revisions == sorted(set(revisions))
    assert len(seen) == HISTORY
    for store in (reader, *writers):
        await store.close()
    await proxy.stop()
    await end(server)


def enable_users(server: EmbeddedEtcd, options: list[str]) -> None:
    """etcd's access control: `scheduler` may use the keys of cluster `t`, others nothing."""
    program = server.binary.path.with_name("etcdctl")
    for command in (
        "user add root --no-password",
        "role add root",
        "user grant-role root root",
        "user add scheduler --no-password",
        "role add cluster-t",
        "role grant-permission cluster-t readwrite --prefix=true /raddle/t/",
        "user grant-role scheduler cluster-t",
        "auth enable",
    ):
        arguments = [str(program), f"--endpoints={server.endpoint}", *options, *command.split()]
        subprocess.run(arguments, check=True, capture_output=True, timeout=20)


async def is_refused(store: EtcdStore) -> None:
    """Reads, commits and watches end with PERMISSION_DENIED."""
    async with asyncio.timeout(20):
        for call in (
            store.get("k"),
            store.commit(Transaction(writes=(Put("k", b""),))),
            anext(store.watch("k", from_revision=1)),
        ):
            with pytest.raises(PermanentError) as caught:
                await call
            assert caught.value.reason is Reason.PERMISSION_DENIED
    await store.close()


async def test_a_user_without_permission_is_refused(tmp_path: Path) -> None:
    """Where etcd knows its users by certificates, a watch outside their keys ends with a reason."""
    authority = Authority(tmp_path / "certificates")
    made = {name: authority.issue(name) for name in ("etcd", "root", "scheduler", "stranger")}
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd(), tls=made["etcd"])
    await server.start()
    root = made["root"]
    enable_users(server, [f"--cacert={root.ca}", f"--cert={root.certificate}", f"--key={root.key}"])
    store = EtcdStore([server.endpoint], "t", operation_key="operations/a", tls=made["scheduler"])
    assert (await store.commit(Transaction(writes=(Put("k", b""),)))).succeeded
    assert await store.server_version()
    await store.close()
    for user, cluster in (("scheduler", "other"), ("stranger", "t")):
        await is_refused(
            EtcdStore([server.endpoint], cluster, operation_key="operations/a", tls=made[user])
        )
    await end(server)


async def test_a_client_that_names_no_user_is_refused(tmp_path: Path) -> None:
    """Where etcd demands a user, a client without a certificate is told so and asks no more."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    enable_users(server, [])
    await is_refused(EtcdStore([server.endpoint], "t", operation_key="operations/a"))
    await end(server)
