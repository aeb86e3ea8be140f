"""The errors of the project: each carries a reason code and one sentence.

Two kinds matter to a caller: a `TemporaryError` may be tried again after `retry_after_s`; a
`PermanentError` may not, until something else changes. `raddle.wire.status` holds the one table
that maps reasons to gRPC codes; nothing else does.
"""

from __future__ import annotations

from raddle.model.reasons import Code


class Reason(Code):
    """Why something was refused; the same word travels in gRPC ErrorInfo, domain `raddle`."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT", "A value is not allowed; the message names the field."
    UNKNOWN_FIELD = "UNKNOWN_FIELD", "A file or a resource has a field that does not exist."
    INVALID_NAME = (
        "INVALID_NAME",
        "A name has other characters than names may have, or is too long.",
    )
    NOT_FOUND = "NOT_FOUND", "There is nothing of this name."
    ALREADY_EXISTS = "ALREADY_EXISTS", "Something of this name is there, and is not the same."
    IDEMPOTENCY_KEY_REUSED = "IDEMPOTENCY_KEY_REUSED", "The key was used for another request."
    IMMUTABLE_FIELD = "IMMUTABLE_FIELD", "The field cannot change while the job exists."
    STALE_GENERATION = "STALE_GENERATION", "The job changed since it was read: read it again."
    STALE_REVISION = "STALE_REVISION", "The record changed since it was read: read it again."
    STALE_EPOCH = "STALE_EPOCH", "A newer epoch is known."
    STALE_INCARNATION = "STALE_INCARNATION", "Another process has taken the place."
    WRONG_JOB = "WRONG_JOB", "The rank belongs to another job."
    NOT_ENDED = "NOT_ENDED", "The job has not ended: cancel it first."
    DOES_NOT_FIT = "DOES_NOT_FIT", "The machine is too small for the job, even when it is empty."
    NOT_LEADER = "NOT_LEADER", "This scheduler does not lead; the details may name who does."
    NO_LEADER = "NO_LEADER", "No scheduler leads or answers just now."
    COMPACTED = "COMPACTED", "The history that was asked for is gone: list anew."
    UNAUTHENTICATED = "UNAUTHENTICATED", "The caller has no identity."
    PERMISSION_DENIED = "PERMISSION_DENIED", "The policy does not allow it to this caller."
    MANAGED_BY_OTHER = "MANAGED_BY_OTHER", "Somebody else manages it."
    FAULT_INJECTION_DISABLED = (
        "FAULT_INJECTION_DISABLED",
        "The scheduler does not allow faults to be injected.",
    )
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE", "etcd does not answer."
    STORE_FULL = "STORE_FULL", "etcd has no room left."
    CORRUPT_RECORD = "CORRUPT_RECORD", "A stored record cannot be read."
    NEWER_SCHEMA = "NEWER_SCHEMA", "A record was written by a newer version."
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED", "A bound is reached; the message names it."
    ENGINE_UNSUPPORTED = "ENGINE_UNSUPPORTED", "The engine does not have what was asked for."
    ENGINE_FAILED = "ENGINE_FAILED", "A rank did not start or a command to it failed."
    PEER_LOST = "PEER_LOST", "A connection to another rank broke."
    QUIESCED = "QUIESCED", "The rank waits for the next epoch."
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED", "No answer came in time."
    INTERNAL = "INTERNAL", "A mistake of the program, told to the one whose request met it."


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
