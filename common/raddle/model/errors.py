"""The errors of the project: each carries a reason code and one sentence.

Two kinds matter to a caller: a `TemporaryError` may be tried again after `retry_after_s`; a
`PermanentError` may not, until something else changes. `raddle.wire.status` holds the one table
that maps reasons to gRPC codes; nothing else does.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Machine-read reason of a refusal; the same word travels in gRPC ErrorInfo."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNKNOWN_FIELD = "UNKNOWN_FIELD"
    INVALID_NAME = "INVALID_NAME"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    IDEMPOTENCY_KEY_REUSED = "IDEMPOTENCY_KEY_REUSED"
    IMMUTABLE_FIELD = "IMMUTABLE_FIELD"
    STALE_GENERATION = "STALE_GENERATION"
    STALE_REVISION = "STALE_REVISION"
    STALE_EPOCH = "STALE_EPOCH"
    STALE_INCARNATION = "STALE_INCARNATION"
    WRONG_JOB = "WRONG_JOB"
    NOT_ENDED = "NOT_ENDED"
    DOES_NOT_FIT = "DOES_NOT_FIT"
    NOT_LEADER = "NOT_LEADER"
    NO_LEADER = "NO_LEADER"
    COMPACTED = "COMPACTED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    MANAGED_BY_OTHER = "MANAGED_BY_OTHER"
    FAULT_INJECTION_DISABLED = "FAULT_INJECTION_DISABLED"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    STORE_FULL = "STORE_FULL"
    CORRUPT_RECORD = "CORRUPT_RECORD"
    NEWER_SCHEMA = "NEWER_SCHEMA"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    ENGINE_UNSUPPORTED = "ENGINE_UNSUPPORTED"
    ENGINE_FAILED = "ENGINE_FAILED"
    PEER_LOST = "PEER_LOST"
    QUIESCED = "QUIESCED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    #: A mistake of the program, told to the one whose request met it.
    INTERNAL = "INTERNAL"


class RaddleError(Exception):
    """Root of all errors raised on purpose.

    `reason` is for programs, the message (one sentence that says what to do next) for people, and
    `details` holds the values that a program needs (all text, small).
    """

    def __init__(self, reason: Reason, message: str, **details: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class PermanentError(RaddleError):
    """Trying the same again is useless."""


class ConflictError(PermanentError):
    """The caller's picture is older than ours: read again, then decide again."""


class TemporaryError(RaddleError):
    """The same call may succeed after `retry_after_s` seconds."""

    def __init__(
        self, reason: Reason, message: str, *, retry_after_s: float = 1.0, **details: str
    ) -> None:
        super().__init__(reason, message, **details)
        self.retry_after_s = retry_after_s
