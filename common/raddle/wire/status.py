"""Errors on the wire: one table from reasons to gRPC codes, both ways.

A server ends a call with `abort`; a client turns a failed call into the same error with
`error_from`. The reason travels in google.rpc.ErrorInfo under the domain `raddle`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from raddle.model.errors import ConflictError, PermanentError, RaddleError, Reason, TemporaryError

DOMAIN = "raddle"

_CODES: dict[Reason, grpc.StatusCode] = {
    Reason.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.INVALID_NAME: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.IDEMPOTENCY_KEY_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    Reason.IMMUTABLE_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.STALE_GENERATION: grpc.StatusCode.ABORTED,
    Reason.STALE_REVISION: grpc.StatusCode.ABORTED,
    Reason.STALE_EPOCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_INCARNATION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.WRONG_JOB: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.DOES_NOT_FIT: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_LEADER: grpc.StatusCode.UNAVAILABLE,
    Reason.NO_LEADER: grpc.StatusCode.UNAVAILABLE,
    Reason.COMPACTED: grpc.StatusCode.OUT_OF_RANGE,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.NOT_ENDED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MANAGED_BY_OTHER: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.FAULT_INJECTION_DISABLED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.STORE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.CORRUPT_RECORD: grpc.StatusCode.DATA_LOSS,
    Reason.NEWER_SCHEMA: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LIMIT_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.ENGINE_UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.ENGINE_FAILED: grpc.StatusCode.INTERNAL,
    Reason.PEER_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.QUIESCED: grpc.StatusCode.UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}
_CONFLICTS = {Reason.STALE_GENERATION, Reason.STALE_REVISION, Reason.STALE_EPOCH}


def code_of(reason: Reason) -> grpc.StatusCode:
    return _CODES[reason]


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RaddleError) -> NoReturn:
    """End the call with the error's code, sentence and ErrorInfo."""
    code = _CODES[error.reason]
    detail = any_pb2.Any()
    metadata = dict(error.details)
    if isinstance(error, TemporaryError):
        metadata["retry_after_s"] = str(error.retry_after_s)
    detail.Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    status = status_pb2.Status(
        code=code_pb2.Code.Value(code.name), message=error.message, details=[detail]
    )
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort raises")


def error_from(error: grpc.aio.AioRpcError) -> RaddleError:
    """The error behind a failed call; a call that never reached a server is temporary."""
    reason, details = _error_info(error)
    message = error.details() or error.code().name
    if reason is not None:
        if reason in _CONFLICTS:
            return ConflictError(reason, message, **details)
        if _CODES[reason] in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            retry_after_s = float(details.pop("retry_after_s", "1"))
            return TemporaryError(reason, message, retry_after_s=retry_after_s, **details)
        return PermanentError(reason, message, **details)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TemporaryError(Reason.DEADLINE_EXCEEDED, message)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return TemporaryError(Reason.NO_LEADER, message)
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return PermanentError(Reason.UNAUTHENTICATED, message)
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return PermanentError(Reason.LIMIT_EXCEEDED, message)
    return PermanentError(Reason.INVALID_ARGUMENT, message)


def is_answered(error: grpc.aio.AioRpcError) -> bool:
    """Is it what a server of ours said, not what became of the connection to it?"""
    return _error_info(error)[0] is not None


def _error_info(error: grpc.aio.AioRpcError) -> tuple[Reason | None, dict[str, str]]:
    for key, value in error.trailing_metadata() or ():
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        status = status_pb2.Status.FromString(value)
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
                return Reason(info.reason), dict(info.metadata)
    return None, {}
