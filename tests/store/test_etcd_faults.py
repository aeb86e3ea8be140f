"""Faults of etcd and of the way to it: nothing lost, nothing twice, nothing silent."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from raddle.model.errors import RaddleError, Reason
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Change, Put, Transaction
from tests.support import CuttingProxy, built_etcd, three_members


def put(key: str, value: bytes = b"") -> Transaction:
    return Transaction(writes=(Put(key, value),))


async def test_a_watch_cut_in_catch_up_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """A connection that breaks in the middle of a long history costs no event."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    writer = EtcdStore([server.endpoint], "t", operation_key="operations/w")
    first = (await writer.commit(put("k"))).revision
    for number in range(1000):
        await writer.commit(put("k", str(number).encode() * 20))
    proxy = CuttingProxy(server.endpoint)
    reader = EtcdStore([await proxy.start()], "t", operation_key="operations/r")
    proxy.bytes_max = 60_000
    seen: list[Change] = []
    async with asyncio.timeout(30):
        async for changes in reader.watch("k", from_revision=first + 1):
            seen += changes.changes
            if len(seen) >= 1000:
                break
    assert proxy.bytes_max is None, "the connection was not cut"
    revisions = [change.mod_revision for change in seen]
    assert revisions == sorted(set(revisions))
    assert len(seen) == 1000
    await reader.close()
    await writer.close()
    await proxy.stop()
    await server.stop()


async def test_a_silent_connection_tells_the_lease_before_it_ends(tmp_path: Path) -> None:
    """Cut off without a closed connection, the owner is told before the server expires the key."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    proxy = CuttingProxy(server.endpoint)
    owner = EtcdStore([await proxy.start()], "t", operation_key="operations/o")
    witness = EtcdStore([server.endpoint], "t", operation_key="operations/w")
    lease = await owner.grant(3)
    await owner.commit(Transaction(writes=(Put("mine", b"", lease.lease_id),)))
    proxy.freeze()
    await asyncio.wait_for(lease.wait_lost(), 10)
    assert not lease.alive
    assert await witness.get("mine") is not None, "the key was gone before its owner was told"
    await witness.close()
    await owner.close()
    await proxy.stop()
    await server.stop()


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
    for member in members:
        if member.process is not None and member.process.poll() is None:
            member.process.send_signal(signal.SIGCONT)
        await member.stop()


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
