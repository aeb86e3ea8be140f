"""Three members of etcd, and faults of the one that carries a client's watch and lease."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd.connection import Connection
from raddle.store.etcd.lease import EtcdLease
from raddle.store.etcd.store import EtcdStore
from raddle.store.ports import free_port
from raddle.store.protocol import Put, Transaction
from tests.support import CuttingProxy, built_etcd, end, eventually, holds_socket, prefer

TTL_S = 6.0


class ProxiedMember(EmbeddedEtcd):
    """A member that its peers reach through a proxy, so that it can be cut off from them."""

    def __init__(self, folder: Path, name: str, proxies: dict[str, CuttingProxy]) -> None:
        peers = {name: proxy.port for name, proxy in proxies.items()}
        super().__init__(
            folder / name, binary=built_etcd(), name=name, peers=peers, election_ms=500
        )
        self._proxies = proxies
        self._listen = f"127.0.0.1:{free_port()}"
        proxies[name].target = self._listen

    def _command(self) -> list[str]:
        return [*super()._command(), f"--listen-peer-urls=http://{self._listen}"]

    def cut_off(self) -> None:
        """No byte passes between this member and its peers any more; clients still reach it."""
        assert self.process is not None
        pid = self.process.pid
        for name, proxy in self._proxies.items():
            if name != self.name:
                proxy.spares = lambda port: not holds_socket(pid, port)
            proxy.freeze()
            proxy.cut()


@asynccontextmanager
async def three_proxied_members(folder: Path) -> AsyncIterator[list[ProxiedMember]]:
    proxies = {f"m{i}": CuttingProxy() for i in range(3)}
    for proxy in proxies.values():
        await proxy.start()
    members = [ProxiedMember(folder, name, proxies) for name in proxies]
    try:
        for member in members:
            member.launch()
        for member in members:
            await member.wait_ready()
        yield members
    finally:
        await end(*members)
        for proxy in proxies.values():
            await proxy.stop()


async def leads(member: EmbeddedEtcd) -> bool:
    connection = Connection([member.endpoint])
    status = await connection.status()
    await connection.close()
    return status.leader == status.header.member_id


@dataclass
class Client:
    """A client whose watch and lease run over one member, and one that uses the others."""

    carrier: ProxiedMember
    store: EtcdStore
    lease: EtcdLease
    witness: EtcdStore
    seen: list[str]


@asynccontextmanager
async def carried(members: list[ProxiedMember], *, by_leader: bool) -> AsyncIterator[Client]:
    """A client carried by the leader or by a follower; its watch and its lease are at work."""
    carrier, *_ = [member for member in members if await leads(member) is by_leader]
    others = [member.endpoint for member in members if member is not carrier]
    witness = EtcdStore(others, "t", operation_key="operations/w")
    store = EtcdStore([carrier.endpoint, *others], "t", operation_key="operations/c")
    prefer(store, carrier.endpoint)
    lease = await store.grant(TTL_S)
    revision = (
        await store.commit(Transaction(writes=(Put("mine", b"", lease.lease_id),)))
    ).revision
    seen: list[str] = []

    async def watch() -> None:
        async for changes in store.watch("news/", from_revision=revision):
            seen.extend(change.key for change in changes.changes)

    watching = asyncio.create_task(watch())
    granted = lease.deadline_s
    await witness.commit(Transaction(writes=(Put("news/before", b""),)))
    await eventually(lambda: seen == ["news/before"], "the watch tells")
    await eventually(lambda: lease.deadline_s > granted, "the lease is renewed")
    assert store.connection.endpoint == carrier.endpoint
    yield Client(carrier, store, lease, witness, seen)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await store.close()
    await witness.close()


@pytest.mark.parametrize(
    ("fault", "by_leader"),
    [
        ("killed", True),
        ("stopped", True),
        ("stopped", False),
        ("cut off from its peers", True),
        ("cut off from its peers", False),
    ],
)
async def test_watch_and_lease_leave_a_member_in_trouble(
    tmp_path: Path, fault: str, by_leader: bool
) -> None:
    """The watch goes on without loss or repetition, and the lease is kept, over other members."""
    async with (
        three_proxied_members(tmp_path) as members,
        carried(members, by_leader=by_leader) as client,
    ):
        process = client.carrier.process
        assert process is not None
        if fault == "killed":
            process.kill()
        elif fault == "stopped":
            process.send_signal(signal.SIGSTOP)
        else:
            client.carrier.cut_off()
        at_fault = client.lease.deadline_s
        news = Transaction(writes=(Put("news/after", b""),))
        assert (await client.witness.commit(news, timeout_s=20.0)).succeeded
        await eventually(lambda: len(client.seen) > 1, "the watch tells what came after")
        assert client.seen == ["news/before", "news/after"]
        # A leader that is cut off renews leases until it knows: later renewals are another's.
        later = at_fault + TTL_S / 4
        await eventually(
            lambda: client.lease.deadline_s > later or not client.lease.alive, "renewed or lost"
        )
        assert client.lease.alive
        assert await client.witness.get("mine") is not None
