"""Certificates that are renewed while servers and channels run."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from raddle.agent.engine.reference.exchange import ExchangeClient, ExchangeServer, PeerLost
from raddle.model.kinds import RoleKind
from raddle.model.types import Member, RankKey
from raddle.telemetry.addresses import split_address
from raddle.telemetry.channels import OPTIONS, make_channel
from raddle.telemetry.tls import (
    RANK_NAME,
    SCHEDULER_NAME,
    TlsFiles,
    identity_of,
    renew_for_each_connection,
)
from tests.certificates import Authority
from tests.support import eventually


async def _who(_request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    return identity_of(context).encode()


@asynccontextmanager
async def grpc_server(tls: TlsFiles, port: int = 0) -> AsyncIterator[str]:
    """A server that answers each caller with its identity."""
    server = grpc.aio.server(options=OPTIONS)
    methods: dict[str, Any] = {"Who": grpc.unary_unary_rpc_method_handler(_who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    bound = server.add_secure_port(f"127.0.0.1:{port}", tls.server_credentials())
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def exchange_server(tls: TlsFiles) -> AsyncIterator[str]:
    """A rank's server for expert traffic, which has nothing to give."""
    server = ExchangeServer("j-1", lambda *_: None, lambda *_: None, tls=tls)
    try:
        yield server.address
    finally:
        server.close()


@asynccontextmanager
async def https_server(tls: TlsFiles) -> AsyncIterator[str]:
    """A server as a front door has, which asks nobody for a certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate, tls.key)
    renew_for_each_connection(context, tls.certificate, tls.key)
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context) as server:
        yield "{}:{}".format(*server.sockets[0].getsockname())


def shown(address: str, ours: TlsFiles) -> bytes:
    """The certificate that a server shows to a new connection."""
    with socket.create_connection(split_address(address), 5.0) as plain:
        # A server of gRPC turns away who does not say that it speaks HTTP/2.
        context = ours.socket_context(server=False)
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(plain, server_hostname="localhost") as secured:
            certificate = secured.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


@pytest.mark.parametrize("serve", [grpc_server, exchange_server, https_server])
async def test_a_server_shows_renewed_certificates_without_a_restart(
    tmp_path: Path, serve: Callable[[TlsFiles], AbstractAsyncContextManager[str]]
) -> None:
    """The next connection gets what the files hold; what does not fit is told and not shown."""
    authority = Authority(tmp_path)
    ours, other = authority.issue("agent/sn0/n01"), authority.issue("agent/sn0/n02")
    async with serve(authority.issue("agent/sn0/n00")) as address:
        first = await asyncio.to_thread(shown, address, ours)
        renewed = authority.issue("agent/sn0/n00")
        second = await asyncio.to_thread(shown, address, ours)
        assert second != first
        renewed.certificate.write_bytes(other.certificate.read_bytes())
        with capture_logs() as logs:
            assert await asyncio.to_thread(shown, address, ours) == second
            assert await asyncio.to_thread(shown, address, ours) == second
        assert [line["event"] for line in logs] == ["the old certificates stay"]
        renewed.key.write_bytes(other.key.read_bytes())
        assert await asyncio.to_thread(shown, address, ours) not in {first, second}


def asked(server: TlsFiles, client: TlsFiles) -> str:
    """What becomes of a request for weights: the answer, or why the peer counts as lost."""
    serving = ExchangeServer("j-1", lambda *_: None, lambda *_: b"weights", tls=server)
    asking = ExchangeClient("j-1", 5.0, tls=client)
    key = RankKey(role="decode", instance=0, rank=1)
    peer = Member(rank=key, kind=RoleKind.DECODE, data_address=serving.address)
    try:
        return asking.weights(peer, 0, 0).decode()
    except PeerLost as lost:
        return lost.reason
    finally:
        asking.close()
        serving.close()


async def test_ranks_ask_and_hear_ranks_alone(tmp_path: Path) -> None:
    """Ranks have their own certificate or their agent's; nobody else is heard or taken for one."""
    authority = Authority(tmp_path)
    rank, agent = authority.issue("rank"), authority.issue("agent/sn0/n00")
    others = [authority.issue(who) for who in ("scheduler", "frontdoor", "client/admin")]
    for one, other in ((rank, rank), (rank, agent), (agent, rank)):
        assert await asyncio.to_thread(asked, one, other) == "weights"
    for other in others:
        with capture_logs() as logs:
            assert await asyncio.to_thread(asked, rank, other) == "CONNECTION_BROKEN"
            await eventually(lambda: "refused" in [line["event"] for line in logs], "a line")
        (line,) = [line for line in logs if line["event"] == "refused"]
        assert line["identity"].replace("/", "-") == other.certificate.stem
        assert line["call"] == "expert traffic"
    for other in others:
        assert await asyncio.to_thread(asked, other, rank) == "CONNECTION_BROKEN"


@pytest.mark.parametrize("server", ["rank", "agent/sn0/n00"])
async def test_a_rank_is_known_by_its_name(tmp_path: Path, server: str) -> None:
    """Who calls a rank takes its agent's certificate for it, and no scheduler's or client's."""
    authority = Authority(tmp_path)
    ours = authority.issue("agent/*")
    async with grpc_server(authority.issue(server)) as address:
        assert await called(address, ours) is grpc.StatusCode.OK
    for other in ("scheduler", "frontdoor"):
        async with grpc_server(authority.issue(other)) as address:
            assert await called(address, ours) is grpc.StatusCode.UNAVAILABLE


async def called(address: str, ours: TlsFiles) -> grpc.StatusCode:
    """How a call to a rank ends."""
    channel = make_channel(address, tls=ours, server_name=RANK_NAME)
    who: Any = channel.unary_unary("/test/Who")
    try:
        await who(b"", timeout=10.0)
    except grpc.aio.AioRpcError as error:
        return error.code()
    finally:
        await channel.close()
    return grpc.StatusCode.OK


async def test_a_channel_connects_again_with_renewed_certificates(tmp_path: Path) -> None:
    """A connection that stands goes on; the next one of the same channel shows the new ones."""
    authority = Authority(tmp_path)
    servers = authority.issue("agent/sn0/n00")
    ours = authority.issue("client/a", name="ours")

    async def is_renewed() -> bool:
        # The first call may go out on the connection that has just ended.
        with suppress(grpc.aio.AioRpcError):
            return bool(await who(b"", wait_for_ready=True, timeout=10.0) == b"client/b")
        return False

    async with grpc_server(servers) as address:
        channel = make_channel(address, tls=ours, server_name=RANK_NAME)
        who: Any = channel.unary_unary("/test/Who")
        assert await who(b"") == b"client/a"
        await channel.channel_ready()
        authority.issue("client/b", name="ours")
        assert await who(b"") == b"client/a"
    async with grpc_server(servers, split_address(address)[1]):
        await eventually(is_renewed, "the new connection")
    await channel.close()


async def test_a_server_serves_all_who_connect_at_once(tmp_path: Path) -> None:
    """Each connection asks for the newest certificate, and gRPC ended the process when many did."""
    authority = Authority(tmp_path)
    scheduler, client = authority.issue("scheduler"), authority.issue("client/many").newest()
    async with grpc_server(scheduler) as address:
        for turn in range(3):
            channels = [
                grpc.aio.secure_channel(
                    address,
                    client.channel_credentials(),
                    # Channels of equal arguments would share a connection.
                    options=[("grpc.ssl_target_name_override", SCHEDULER_NAME), ("test", number)],
                )
                for number in range(60 * turn, 60 * turn + 60)
            ]
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
            await asyncio.gather(*(channel.close() for channel in channels))
