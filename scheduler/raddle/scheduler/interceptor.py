"""What every call passes on a scheduler: identity, permission, forwarding, errors, counting.

Unary calls that reach a standby are forwarded once to the leader, with the caller's identity and
the rest of the deadline; streams are told where the leader is.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog

from raddle.model import keys
from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.scheduler.authorization import VERBS
from raddle.scheduler.replica import Replica
from raddle.telemetry.channels import make_channel
from raddle.telemetry.tls import IDENTITY_METADATA, identity_of, is_agent_of
from raddle.wire.codec import CodecError
from raddle.wire.parse import require_texts
from raddle.wire.status import abort, code_of, error_from

DEFAULT_TIMEOUT_S = 10.0
_ANSWER_S = 0.2
FORWARDED_METADATA = "raddle-forwarded-for"
# Answered by every replica about itself.
_LOCAL = {"GetStatus"}
log = structlog.get_logger()
Context = grpc.aio.ServicerContext[Any, Any]


def time_left(context: Context) -> float:
    """Seconds that a call may take: a little less than the caller waits, so that it hears why."""
    left: Any = context.time_remaining()
    if left is None:
        return DEFAULT_TIMEOUT_S
    return max(0.0, float(left) - min(_ANSWER_S, float(left) / 10))


def caller_of(context: Context) -> str:
    """The caller; on a forwarded call from another scheduler, the caller behind it."""
    identity = identity_of(context)
    if identity == "scheduler":
        for key, value in context.invocation_metadata() or ():
            if key == FORWARDED_METADATA:
                return value.decode() if isinstance(value, bytes) else value
    return identity


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own services; health and reflection pass untouched."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or not path.startswith("/raddle.v1."):
            return handler
        method = path.rsplit("/", 1)[1]
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": _serializer(handler.response_serializer),
        }
        if handler.unary_unary is not None:
            unary = self._unary(path, method, handler)
            return grpc.unary_unary_rpc_method_handler(unary, **coders)
        if handler.unary_stream is not None:
            stream = self._streaming(method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(stream, **coders)
        upload = self._uploading(method, handler.stream_unary)
        return grpc.stream_unary_rpc_method_handler(upload, **coders)

    def _admit(self, method: str, request: Any, context: Context) -> None:
        """Every request has short, printable texts and a caller who may send it."""
        require_texts(request)
        self._authorize(method, request, context)

    def _authorize(self, method: str, request: Any, context: Context) -> None:
        self._replica.policy.authorize(
            caller_of(context), self._namespace(request), VERBS.get(method, "read")
        )

    def _namespace(self, request: Any) -> str:
        """The namespace that a request is about; empty for the cluster.

        A job's own namespace counts, whatever else the request says of it.
        """
        subject = str(getattr(request, "subject", ""))
        job_uid = getattr(request, "job_uid", "") or subject.removeprefix("job/")
        job = self._replica.mirror.get(keys.job(job_uid))
        if job is not None:
            return str(job.spec.namespace)
        if hasattr(request, "job_uid") and request.job_uid:
            return ""
        if hasattr(request, "spec"):
            return request.spec.namespace or "default"
        if subject.startswith("job/"):
            return subject.removeprefix("job/").rpartition("/")[0] or "default"
        space = str(getattr(request, "namespace", ""))
        return space or ("default" if hasattr(request, "name") else "")

    def _unary(self, path: str, method: str, handler: Any) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            code = grpc.StatusCode.OK.name
            try:
                self._admit(method, request, context)
                if method not in _LOCAL and self._replica.leader is None:
                    return await self._forward(path, handler, request, context)
                return await handler.unary_unary(request, context)
            except Exception as error:  # noqa: BLE001 - told and logged, whatever it is
                told = self._told(error, method, context)
                code = code_of(told.reason).name
                return await abort(context, told)
            finally:
                self._replica.metrics.requests.labels(method, code).inc()

        return call

    async def _forward(self, path: str, handler: Any, request: Any, context: Context) -> Any:
        record = await self._replica.wait_leader_known(time_left(context))
        if record is None:
            return await handler.unary_unary(request, context)
        for key, _ in context.invocation_metadata() or ():
            if key == FORWARDED_METADATA:
                raise TemporaryError(
                    Reason.NO_LEADER, "the leader changes at this moment; try again."
                )
        stub: Any = self._channel(record.address).unary_unary(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=lambda data: data,
        )
        metadata = ((FORWARDED_METADATA, caller_of(context)), (IDENTITY_METADATA, "scheduler"))
        calling = asyncio.ensure_future(
            stub(request, timeout=time_left(context), metadata=metadata)
        )
        moved = asyncio.create_task(self._replica.wait_leader_changed(record))
        try:
            await asyncio.wait({calling, moved}, return_when=asyncio.FIRST_COMPLETED)
            if calling.done():
                return _Raw(calling.result())
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error
        finally:
            moved.cancel()
            calling.cancel()
        if VERBS.get(path.rsplit("/", 1)[1], "read") == "read":
            return await self._forward(path, handler, request, context)
        raise TemporaryError(
            Reason.NO_LEADER,
            f"the leader changed from {record.identity} while it was asked; repeat with the same"
            " idempotency key.",
        )

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = make_channel(address, tls=self._replica.tls)
        return self._channels[address]

    def _streaming(self, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: Context) -> Any:
            try:
                self._admit(method, request, context)
                self._replica.require_leader()
                async for message in inner(request, context):
                    yield message
            except Exception as error:  # noqa: BLE001 - told and logged, whatever it is
                await abort(context, self._told(error, method, context))

        return call

    def _uploading(self, method: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        async def admitted(requests: Any, context: Context) -> AsyncIterator[Any]:
            async for request in requests:
                self._authorize(method, request, context)
                yield request

        async def call(requests: Any, context: Context) -> Any:
            try:
                self._replica.require_leader()
                return await inner(admitted(requests, context), context)
            except Exception as error:  # noqa: BLE001 - told and logged, whatever it is
                return await abort(context, self._told(error, method, context))

        return call

    def _told(self, error: Exception, method: str, context: Context) -> RaddleError:
        """What the caller hears of an error; one that nobody foresaw is logged and counted."""
        if isinstance(error, RaddleError):
            return error
        if isinstance(error, CodecError):
            return PermanentError(Reason.INVALID_ARGUMENT, f"{error}.")
        if context.done():
            raise error
        self._replica.metrics.unforeseen.inc()
        log.error(
            "a call failed in an unforeseen way",
            method=method,
            caller=caller_of(context),
            exc_info=error,
        )
        return PermanentError(
            Reason.INTERNAL,
            f"{method} failed in an unforeseen way: report it with the line of this scheduler's log"
            f" that names {method}.",
        )


class _Raw:
    """An answer that is bytes already."""

    def __init__(self, data: bytes) -> None:
        self.data = data


def _serializer(inner: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    return lambda message: message.data if isinstance(message, _Raw) else inner(message)


def refuse_foreign_node(context: Context, node: str) -> None:
    """An agent speaks for its own node only; one of several simulated nodes names a pattern.

    Raises:
        PermanentError: PERMISSION_DENIED; logged with who and what.
    """
    identity = identity_of(context)
    if identity.startswith("agent/") and not is_agent_of(node, identity):
        log.warning("refused", identity=identity, node=node, verb="report")
        raise PermanentError(
            Reason.PERMISSION_DENIED, f"{identity} may not report for node {node}."
        )


def refuse_foreign_front_door(context: Context, front_door_id: str) -> None:
    """A front door speaks for itself only: its id is its identity and what tells it from others.

    Raises:
        PermanentError: PERMISSION_DENIED; logged with who and what.
    """
    identity = caller_of(context)
    if identity != front_door_id.rpartition("/")[0]:
        log.warning("refused", identity=identity, front_door=front_door_id, verb="route")
        raise PermanentError(
            Reason.PERMISSION_DENIED,
            f"{identity} may not report for front door {front_door_id}; its own ids are"
            f" {identity}/..., without another slash.",
        )
