"""The channels of the etcd client: which member, how soon again, which server, whose messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from structlog.testing import capture_logs

from raddle.etcd.v1 import rpc_pb2
from raddle.store.embedded import EmbeddedEtcd, EtcdBinary
from raddle.store.etcd import connection as etcd_connection
from raddle.store.etcd.connection import Connection
from raddle.store.etcd.store import EtcdStore
from tests.certificates import Authority
from tests.support import (
    CuttingProxy,
    built_etcd,
    development_etcd,
    end,
    eventually,
)

ENDPOINTS = ("a:1", "b:1", "c:1")


def test_clients_prefer_different_members() -> None:
    """Not all clients begin at the first member of the list."""
    assert {Connection(ENDPOINTS).endpoint for _ in range(200)} == set(ENDPOINTS)


def test_a_client_stays_until_its_member_fails_and_avoids_failed_ones() -> None:
    """Another member's failure moves nobody; who has to move skips members that failed lately."""
    connection = Connection(ENDPOINTS)
    first, second, third = connection._endpoints
    connection.failed(second)
    assert connection.endpoint == first
    connection.failed(first)
    assert connection.endpoint == third
    connection.failed(third)
    assert connection.endpoint == second, "the one that failed longest ago"


async def test_a_member_that_comes_back_is_tried_every_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pause between two tries to connect is bounded, however long a member was away.

    gRPC begins here with a pause of 3 s: unbounded, the fifth try would come after 28 s.
    """
    options = dict(etcd_connection._OPTIONS) | {"grpc.initial_reconnect_backoff_ms": 3_000}
    monkeypatch.setattr(etcd_connection, "_OPTIONS", tuple(options.items()))
    proxy = CuttingProxy()
    proxy.refuse = True
    connection = Connection([await proxy.start()])
    channel = connection.channel(connection.endpoint)

    def tried_again() -> bool:
        channel.get_state(try_to_connect=True)
        return proxy.refused >= 5

    await eventually(tried_again, "five tries")
    await connection.close()
    await proxy.stop()


async def test_a_member_that_failed_is_connected_with_renewed_certificates(tmp_path: Path) -> None:
    """A channel stays while its certificates do; after a renewal the next connection has them."""
    made = Authority(tmp_path).issue("scheduler")
    connection = Connection(["a:1"], made)
    first = connection.channel("a:1")
    connection.failed("a:1")
    assert connection.channel("a:1") is first
    Authority(tmp_path).issue("scheduler")
    connection.failed("a:1")
    assert connection.channel("a:1") is not first
    half = Authority(tmp_path / "another").issue("scheduler")
    made.key.write_bytes(half.key.read_bytes())
    with capture_logs() as logs:
        connection.failed("a:1")
    assert [line["event"] for line in logs] == ["the old certificates stay"]
    await connection.close()


@pytest.mark.parametrize(
    ("binary", "warns"), [(built_etcd, False), (development_etcd, True)], ids=["built", "3.5.1"]
)
async def test_an_etcd_with_known_faults_is_warned_about(
    tmp_path: Path, binary: object, warns: bool
) -> None:
    """Whoever connects to an etcd before 3.5.13 reads what it may do to writes and leases."""
    assert callable(binary)
    found = binary()
    assert isinstance(found, EtcdBinary)
    server = EmbeddedEtcd(tmp_path / "etcd", binary=found)
    await server.start()
    store = EtcdStore([server.endpoint], "t", operation_key="operations/c")
    with capture_logs() as logs:
        version = await store.server_version()
    assert version == ".".join(map(str, found.version))
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert [entry["version"] for entry in warnings] == ([version] if warns else [])
    for entry in warnings:
        assert "lose acknowledged writes or live leases" in entry["event"]
    await store.close()
    await end(server)


def test_our_copy_of_the_messages_leaves_room_for_another() -> None:
    """A library with etcd's own names for the same messages can be loaded beside ours."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(rpc_pb2.DESCRIPTOR.serialized_pb)
    theirs = descriptor_pb2.FileDescriptorProto()
    rpc_pb2.DESCRIPTOR.CopyToProto(theirs)
    assert theirs.package == "raddle.etcd.v1"
    for package in ("etcdserverpb", "mvccpb", "authpb"):
        other = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package)
        other.message_type.extend(
            descriptor_pb2.DescriptorProto(name=message.name) for message in theirs.message_type
        )
        pool.Add(other)
        assert pool.FindMessageTypeByName(f"{package}.KeyValue") is not None
