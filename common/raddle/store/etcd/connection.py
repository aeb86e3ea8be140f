"""Channels to etcd's members: one endpoint at a time, deadlines on every call, quick failover.

In go requests, out come answers or `StoreCallError` with the gRPC code; which errors leave a write
in doubt is the caller's business. A member that failed is avoided for a second.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from raddle.etcd.v1 import rpc_pb2 as rpc
from raddle.model.errors import Reason, TemporaryError
from raddle.telemetry.tls import Pems, TlsFiles

ATTEMPT_TIMEOUT_S = 1.0
PENALTY_S = 1.0
SERVER_VERSION_MIN = (3, 5, 13)
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    # The default of 120 s would leave a returned member unused for minutes.
    ("grpc.max_reconnect_backoff_ms", 1000),
    # etcd refuses keepalive pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
)
# Codes after which another member is worth a try.
_MEMBER_FAILED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
# Refusals in etcd's words: one comes without a code of its own, a watch's come without any code.
_REFUSALS = ("permission denied", "user name is empty", "invalid auth token")
T = TypeVar("T", bound=Message)
log = structlog.get_logger()


class StoreCallError(Exception):
    """One failed attempt at one member."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message

    @property
    def member_failed(self) -> bool:
        """Another member may answer; a write may or may not have been applied."""
        return self.code in _MEMBER_FAILED

    @property
    def refused(self) -> bool:
        """etcd does not know us, or does not let us."""
        codes = (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        return self.code in codes or is_refusal(self.message)


def is_refusal(message: str) -> bool:
    return any(words in message for words in _REFUSALS)


class Connection:
    """One channel to each member, sticky to the one that answers."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles | None = None) -> None:
        if not endpoints:
            raise ValueError("at least one etcd endpoint is needed")
        # Every client prefers another member, so that one does not carry all of them.
        self._endpoints = random.sample(list(endpoints), len(endpoints))
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        #: What each channel shows, over TLS.
        self._shown: dict[str, Pems] = {}
        #: Channels with certificates that were renewed; calls may still be under way there.
        self._left: list[grpc.aio.Channel] = []
        self._stubs: dict[tuple[str, str], Any] = {}
        self._bad_until: dict[str, float] = {}
        self._current = self._endpoints[0]

    @property
    def endpoint(self) -> str:
        return self._current

    def channel(self, endpoint: str) -> grpc.aio.Channel:
        if endpoint not in self._channels:
            if self._tls is None:
                made = grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
            else:
                pems = self._shown[endpoint] = self._tls.newest()
                credentials = pems.channel_credentials()
                made = grpc.aio.secure_channel(endpoint, credentials, options=_OPTIONS)
            self._channels[endpoint] = made
        return self._channels[endpoint]

    def failed(self, endpoint: str) -> None:
        """Avoid a member for a while; move on if it was the current one."""
        self._renew(endpoint)
        now = time.monotonic()
        self._bad_until[endpoint] = now + PENALTY_S
        if endpoint != self._current:
            return
        at = self._endpoints.index(endpoint)
        order = self._endpoints[at + 1 :] + self._endpoints[: at + 1]
        self._current = min(order, key=lambda e: max(0.0, self._bad_until.get(e, 0.0) - now))

    def _renew(self, endpoint: str) -> None:
        """Leave a member's channel if its certificates were renewed since it was made."""
        if self._tls is None or endpoint not in self._channels:
            return
        if self._tls.newest() != self._shown[endpoint]:
            self._left.append(self._channels.pop(endpoint))
            self._stubs = {key: stub for key, stub in self._stubs.items() if key[0] != endpoint}

    async def call(self, path: str, request: Message, answer: type[T], timeout_s: float) -> T:
        """One attempt at the current member.

        Raises:
            StoreCallError: with the code; the member is avoided if it failed.
        """
        endpoint = self._current
        stub = self._stubs.get((endpoint, path))
        if stub is None:
            stub = self.channel(endpoint).unary_unary(
                path,
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            self._stubs[endpoint, path] = stub
        try:
            result: T = await stub(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            failure = StoreCallError(error.code(), error.details() or "")
            if failure.member_failed:
                self.failed(endpoint)
            raise failure from error
        return result

    async def read(self, path: str, request: Message, answer: type[T], timeout_s: float) -> T:
        """A call that may be repeated freely, until the timeout.

        Raises:
            TemporaryError: STORE_UNAVAILABLE at the timeout.
            StoreCallError: for an answer that another member would give too.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                return await self.call(
                    path, request, answer, min(ATTEMPT_TIMEOUT_S, max(left, 0.01))
                )
            except StoreCallError as error:
                if not error.member_failed:
                    raise
                if time.monotonic() + 0.05 >= deadline:
                    raise unavailable(self._endpoints, error.message, timeout_s) from error
                await asyncio.sleep(0.02)

    def stream(self, path: str, request: type[Message], answer: type[Message]) -> Any:
        """A stream to the current member that ends when the member loses its leader."""
        method = self.channel(self._current).stream_stream(
            path,
            request_serializer=request.SerializeToString,
            response_deserializer=answer.FromString,
        )
        return method(metadata=(("hasleader", "true"),))

    async def status(self, *, timeout_s: float = 5.0) -> rpc.StatusResponse:
        """What the member that answers says of itself and of its leader."""
        path = "/etcdserverpb.Maintenance/Status"
        return await self.read(path, rpc.StatusRequest(), rpc.StatusResponse, timeout_s)

    async def server_version(self, *, timeout_s: float = 5.0) -> str:
        """Version of the member that answers; an old one is warned about."""
        status = await self.status(timeout_s=timeout_s)
        version = tuple(int(part) for part in status.version.split("-")[0].split("."))
        if version < SERVER_VERSION_MIN:
            log.warning(
                "etcd is older than 3.5.13: it can lose acknowledged writes or live leases;"
                " for development only",
                version=status.version,
            )
        return status.version

    async def close(self) -> None:
        for channel in (*self._left, *self._channels.values()):
            await channel.close()


async def send(stream: Any, message: Message) -> bool:
    """Write to one of our streams; False if it has ended meanwhile, which is no mistake here."""
    if stream.done():
        return False
    await stream.write(message)
    return True


def unavailable(endpoints: Sequence[str], message: str, timeout_s: float) -> TemporaryError:
    names = ", ".join(endpoints)
    return TemporaryError(
        Reason.STORE_UNAVAILABLE,
        f"etcd ({names}) did not answer within {timeout_s:g} s ({message}); check that it runs,"
        " and with TLS that a client certificate is given.",
    )
