"""gRPC channels and servers with the project's limits: message sizes, keepalive, identity."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc

from raddle.telemetry.tls import IDENTITY_METADATA, SCHEDULER_NAME, Pems, TlsFiles

MESSAGE_BYTES_MAX = 16 * 1024 * 1024
OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # It is also the time that an attempt may take, and with certificates on a busy machine that is
    # more than 100 ms. The next address of a name does not wait for it: it is tried after 250 ms.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Names are looked up again at most this often; the default of 30 s is longer than it takes to
    # replace all that a name stood for.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Two servers on one port would share its connections silently.
    ("grpc.so_reuseport", 0),
)
# A host that vanishes and a process that hangs end no connection: who follows a watch must ask, and
# often. The first is noticed by the first timeout, the second by the last, which is 60 s otherwise.
_FOLLOWING = (
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.ping_timeout_ms", 2_000),
)


class _Identity:
    """Names the caller in each call's metadata; servers believe it on plain loopback only."""

    def __init__(self, identity: str) -> None:
        self._identity = identity

    def details(self, details: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        if metadata.get(IDENTITY_METADATA) is None:
            metadata.add(IDENTITY_METADATA, self._identity)
        return grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )


# grpc.aio sorts an interceptor into one kind of call only, so each kind has its own class.
class _UnaryUnary(_Identity, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self.details(client_call_details), request)


class _UnaryStream(_Identity, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return await continuation(self.details(client_call_details), request)


class _StreamUnary(_Identity, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await continuation(self.details(client_call_details), request_iterator)


class _RenewedChannel(grpc.aio.Channel):
    """A channel that connects with the newest certificates each time that it has to connect.

    gRPC takes certificates once for a channel. So while one is not connected it is replaced if they
    were renewed; one that is connected goes on.
    """

    def __init__(self, tls: TlsFiles, make: Callable[[Pems], grpc.aio.Channel]) -> None:
        self._tls = tls
        self._make = make
        self._pems = tls.newest()
        self._channel = make(self._pems)
        #: Calls may still be under way there.
        self._left: list[grpc.aio.Channel] = []

    def _newest(self) -> grpc.aio.Channel:
        state = self._channel.get_state()
        if state in (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.SHUTDOWN):
            return self._channel
        pems = self._tls.newest()
        if pems != self._pems:
            self._left.append(self._channel)
            self._channel, self._pems = self._make(pems), pems
        return self._channel

    def _method(self, kind: str, args: Any, how: Any) -> Any:
        def call(*request: Any, **more: Any) -> Any:
            return getattr(self._newest(), kind)(*args, **how)(*request, **more)

        return call

    def unary_unary(self, *args: Any, **how: Any) -> Any:
        return self._method("unary_unary", args, how)

    def unary_stream(self, *args: Any, **how: Any) -> Any:
        return self._method("unary_stream", args, how)

    def stream_unary(self, *args: Any, **how: Any) -> Any:
        return self._method("stream_unary", args, how)

    def stream_stream(self, *args: Any, **how: Any) -> Any:
        return self._method("stream_stream", args, how)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._newest().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        for channel in (*self._left, self._channel):
            await channel.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def make_channel(
    address: str,
    *,
    identity: str = "",
    tls: TlsFiles | None = None,
    server_name: str = SCHEDULER_NAME,
    follows: bool = False,
) -> grpc.aio.Channel:
    """A channel to one `host:port`, whose certificate must carry `server_name`.

    One that `follows` a watch breaks within 3 s of silence from the server or its host.
    """
    kinds = (_UnaryUnary, _UnaryStream, _StreamUnary) if identity else ()
    interceptors: list[Any] = [kind(identity) for kind in kinds]
    options = tuple((dict(OPTIONS) | dict(_FOLLOWING if follows else ())).items())
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    options = (*options, ("grpc.ssl_target_name_override", server_name))

    def make(pems: Pems) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            address, pems.channel_credentials(), options=options, interceptors=interceptors
        )

    return _RenewedChannel(tls, make)


async def send_stream(method: Any, messages: AsyncIterator[Any]) -> Any:
    """The answer to a call that streams messages until they or the call end.

    grpc.aio, given the iterator itself, waits on for the next message after the call broke, and
    takes it from whoever is to send it in the next call.

    Raises:
        grpc.aio.AioRpcError: the call broke.
    """
    call = method()
    writing = asyncio.create_task(_write_all(call, messages))
    try:
        return await call
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def _write_all(call: Any, messages: AsyncIterator[Any]) -> None:
    async for message in messages:
        await call.write(message)
    await call.done_writing()
