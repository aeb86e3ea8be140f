"""The lease of the etcd client: kept where it can be, else its owner is told in time."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raddle.etcd.v1 import rpc_pb2 as rpc
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd import lease as etcd_lease
from raddle.store.etcd.connection import Connection
from raddle.store.etcd.lease import EtcdLease
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Put, Transaction
from tests.store.fake_etcd import Scripted, Stream, serving
from tests.support import CuttingProxy, built_etcd, end, eventually


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
    await end(server)


async def test_a_lease_outlives_a_connection_that_broke_between_two_renewals(
    tmp_path: Path,
) -> None:
    """A keepalive stream that ended while nothing was on it is begun anew: the lease is kept."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    proxy = CuttingProxy(server.endpoint)
    owner = EtcdStore([await proxy.start()], "t", operation_key="operations/o")
    lease = await owner.grant(2.0)
    assert isinstance(lease, EtcdLease)
    first = lease.deadline_s
    await eventually(lambda: lease.deadline_s > first, "the lease was renewed")
    proxy.cut()
    at_cut = lease.deadline_s
    await eventually(lambda: lease.deadline_s > at_cut or not lease.alive, "renewed or lost")
    assert lease.alive
    await owner.close()
    await proxy.stop()
    await end(server)


async def test_a_lease_that_another_revoked_is_lost_at_its_next_renewal(tmp_path: Path) -> None:
    """A lost lease is no error to etcd: the owner is told by its answer, not by the clock."""
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    owner = EtcdStore([server.endpoint], "t", operation_key="operations/o")
    witness = Connection([server.endpoint])
    lease = await owner.grant(8.0)
    granted = lease.deadline_s
    await eventually(lambda: lease.deadline_s > granted, "the lease was renewed")
    revoke = rpc.LeaseRevokeRequest(id=lease.lease_id)
    path = "/etcdserverpb.Lease/LeaseRevoke"
    await witness.call(path, revoke, rpc.LeaseRevokeResponse, 5.0)
    await asyncio.wait_for(lease.wait_lost(), 20)
    assert time.monotonic() < lease.deadline_s, "told by the clock alone"
    assert not lease.alive
    await witness.close()
    await owner.close()
    await end(server)


async def test_a_renewal_counts_from_when_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that took its time prolongs nothing: etcd's own clock may have started before."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(etcd_lease, "time", clock)

    async def answers_after_5_s(stream: Stream) -> None:
        request: rpc.LeaseKeepAliveRequest = await stream.read()
        clock.now += 5.0
        await stream.write(rpc.LeaseKeepAliveResponse(id=request.id, ttl=60))
        await stream.read()

    async with serving(Scripted(answers_after_5_s)) as endpoint:
        connection = Connection([endpoint])
        lease = EtcdLease(connection, 1, 60.0, 990.0)
        granted = lease.deadline_s
        await eventually(lambda: lease.deadline_s > granted, "the lease was renewed")
        assert granted < 990.0 + 60.0
        assert lease.deadline_s < 1000.0 + 60.0
        assert lease.alive
        clock.now = 1060.0
        assert not lease.alive
        # As if revoked; the server knows no such call.
        await lease.revoke()
        await connection.close()
