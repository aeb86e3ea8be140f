"""Faults of etcd and of the way to it: nothing lost, nothing twice, nothing silent."""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raddle.etcd.v1 import rpc_pb2
from raddle.model.errors import RaddleError, Reason
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd.connection import send
from raddle.store.etcd.store import EtcdStore
from raddle.store.follow import follow
from raddle.store.protocol import Changes, Delete, Put, Snapshot, Transaction
from tests.certificates import Authority
from tests.support import CuttingProxy, built_etcd, end, eventually, three_members


def put(key: str, value: bytes = b"") -> Transaction:
    return Transaction(writes=(Put(key, value),))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_commits_go_on_without_one_member(tmp_path: Path, number: signal.Signals) -> None:
    """Whichever member a client talks to is lost: every acknowledged commit is there once."""
    members = await three_members(tmp_path, built_etcd())
    store = EtcdStore([m.endpoint for m in members], "t", operation_key="operations/c")
    done = []
    for step in range(60):
        if step == 20:
            used = next(m for m in members if m.endpoint == store.connection.endpoint)
            assert used.process is not None
            used.process.send_signal(number)
        result = await store.commit(put(f"k{step:02d}"), timeout_s=20.0)
        assert result.succeeded
        done.append(result.revision)
    assert done == sorted(set(done))
    assert len((await store.list("k")).records) == 60
    await store.close()
    await end(*members)


async def test_a_dead_etcd_is_told_at_the_deadline(tmp_path: Path) -> None:
    """Calls to an etcd that is gone end at their deadline with STORE_UNAVAILABLE."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    store = EtcdStore([server.endpoint], "t", operation_key="operations/c")
    await store.commit(put("k"))
    await server.stop()
    for call in (store.commit(put("k"), timeout_s=1.0), store.get("k", timeout_s=1.0)):
        began = time.monotonic()
        with pytest.raises(RaddleError) as caught:
            await call
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert time.monotonic() - began < 5.0
    await store.close()


async def test_history_compacted_while_the_watcher_was_away(tmp_path: Path) -> None:
    """What changed, vanished and came behind a compaction is told: everything is listed anew."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    writer = EtcdStore([server.endpoint], "t", operation_key="operations/w")
    proxy = CuttingProxy(server.endpoint)
    reader = EtcdStore([await proxy.start()], "t", operation_key="operations/r")
    for name in ("changed", "deleted", "same"):
        await writer.commit(put(f"k/{name}", b"1"))
    stream = follow(reader, "k/")
    snapshot = await anext(stream)
    assert isinstance(snapshot, Snapshot)
    assert len(snapshot.records) == 3
    news = asyncio.ensure_future(anext(stream))
    await eventually(lambda: proxy.connections > 0, "the watch is connected")
    proxy.refuse = True
    proxy.cut()
    await writer.commit(put("k/changed", b"2"))
    await writer.commit(Transaction(writes=(Delete("k/deleted"),)))
    last = 0
    for number in range(20):
        last = (await writer.commit(put("k/new", str(number).encode()))).revision
    await writer.compact(last)
    proxy.refuse = False
    anew = await asyncio.wait_for(news, 20)
    assert isinstance(anew, Snapshot)
    told = {record.key: record.value for record in anew.records}
    assert told == {"k/changed": b"2", "k/same": b"1", "k/new": b"19"}
    later = (await writer.commit(put("k/later"))).revision
    more = await asyncio.wait_for(anext(stream), 20)
    assert isinstance(more, Changes)
    assert [(c.key, c.mod_revision) for c in more.changes] == [("k/later", later)]
    await stream.aclose()
    await reader.close()
    await writer.close()
    await proxy.stop()
    await end(server)


@pytest.mark.parametrize("overtakes", [False, True])
async def test_a_store_that_was_set_back_is_listed_anew(tmp_path: Path, overtakes: bool) -> None:
    """After a restore from an older state a follower is told all, even if revisions overtook it."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    proxy = CuttingProxy(server.endpoint)
    writer = EtcdStore([server.endpoint], "t", operation_key="operations/w")
    reader = EtcdStore([await proxy.start()], "t", operation_key="operations/r")
    await writer.commit(put("k/kept", b"1"))
    await server.stop()
    shutil.copytree(server.folder / "data", tmp_path / "backup")
    await server.start()
    await writer.commit(put("k/forgotten", b"1"), timeout_s=10.0)
    stream = follow(reader, "k/")
    before = await anext(stream)
    assert isinstance(before, Snapshot)
    assert [record.key for record in before.records] == ["k/forgotten", "k/kept"]
    news = asyncio.ensure_future(anext(stream))
    await eventually(lambda: proxy.connections > 0, "the watch is connected")
    proxy.refuse = True
    proxy.cut()
    await server.stop()
    shutil.rmtree(server.folder / "data")
    (tmp_path / "backup").rename(server.folder / "data")
    await server.start()
    last = 0
    for number in range(5 if overtakes else 1):
        result = await writer.commit(put("k/kept", str(number).encode()), timeout_s=10.0)
        last = result.revision
    assert (last > before.revision) is overtakes
    proxy.refuse = False
    anew = await asyncio.wait_for(news, 20)
    assert isinstance(anew, Snapshot)
    assert anew == await writer.list("k/")
    later = (await writer.commit(put("k/later"))).revision
    more = await asyncio.wait_for(anext(stream), 20)
    assert isinstance(more, Changes)
    assert [(c.key, c.mod_revision) for c in more.changes] == [("k/later", later)]
    await stream.aclose()
    await reader.close()
    await writer.close()
    await proxy.stop()
    await end(server)


async def test_the_store_over_tls_knows_its_clients(tmp_path: Path) -> None:
    """etcd under certificates: ours is served, who has none or a foreign one is told at start-up.

    To the client, a certificate that is missing looks as if etcd were not there.
    """
    authority = Authority(tmp_path / "certificates")
    authority.issue("etcd")
    authority.issue("scheduler")
    foreign = Authority(tmp_path / "foreign").issue("scheduler")
    own, good = authority.files("etcd"), authority.files("scheduler")
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd(), tls=own)
    await server.start()
    store = EtcdStore([server.endpoint], "t", operation_key="operations/a", tls=good)
    result = await store.commit(put("k", b"1"), timeout_s=5.0)
    assert result.succeeded
    async for changes in store.watch("k", from_revision=result.revision):
        assert changes.changes[0].key == "k"
        break
    for tls in (None, replace(foreign, ca=good.ca)):
        stranger = EtcdStore([server.endpoint], "t", operation_key="operations/b", tls=tls)
        with pytest.raises(RaddleError) as caught:
            await stranger.connection.server_version(timeout_s=0.7)
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        assert "client certificate" in str(caught.value)
        await stranger.close()
    await store.close()
    await end(server)


class EndedStream:
    """A stream of grpc.aio that ended while its reader still waits."""

    def done(self) -> bool:
        return True

    async def write(self, _message: object) -> None:
        raise asyncio.InvalidStateError("RPC already finished.")


async def test_a_write_to_a_stream_that_ended_is_no_error() -> None:
    """Between the look at a stream and the write to it a member may go: the caller moves on."""
    assert not await send(EndedStream(), rpc_pb2.WatchRequest())
