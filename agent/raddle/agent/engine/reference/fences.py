"""Where a rank stands, and the one check that every command and request passes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, TypeVar

import grpc
import structlog

from raddle.model.errors import ConflictError, PermanentError, RaddleError, Reason
from raddle.model.stats import RankState
from raddle.telemetry.tls import identity_of
from raddle.wire.status import abort

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
log = structlog.get_logger()


class Standing:
    """The job, the newest epoch and the state of a rank without a computing thread."""

    def __init__(self, job_uid: str, epoch: int) -> None:
        self.job_uid = job_uid
        self.epoch = epoch
        self.state = RankState.STARTING

    def require(self, fence: Any, *, newer: bool) -> None:
        """Refuse another job and an older epoch; take a newer one only where `newer` allows it.

        Raises:
            PermanentError: WRONG_JOB.
            ConflictError: STALE_EPOCH, with the epoch that is known here.
        """
        if fence.job_uid != self.job_uid:
            raise PermanentError(
                Reason.WRONG_JOB, f"this rank belongs to job {self.job_uid}, not {fence.job_uid}."
            )
        if fence.epoch < self.epoch or (fence.epoch > self.epoch and not newer):
            raise ConflictError(
                Reason.STALE_EPOCH,
                f"epoch {fence.epoch} is not this rank's epoch {self.epoch}.",
                epoch=str(self.epoch),
            )
        self.epoch = fence.epoch

    def require_reader(self, fence: Any) -> None:
        """Refuse another job and an older epoch; a newer one may read and changes nothing here.

        Raises:
            PermanentError: WRONG_JOB.
            ConflictError: STALE_EPOCH, with the epoch that is known here.
        """
        if fence.epoch < self.epoch or fence.job_uid != self.job_uid:
            self.require(fence, newer=False)


def log_refusal(call: str, request: Any, context: Context, error: RaddleError) -> None:
    """Who asked for what, and why not."""
    log.warning(
        "refused",
        identity=identity_of(context),
        call=call,
        job=request.fence.job_uid,
        epoch=request.fence.epoch,
        reason=error.reason,
        why=error.message,
    )


def refusals_told(
    method: Callable[[Any, Any, Context], Awaitable[T]],
) -> Callable[[Any, Any, Context], Awaitable[T]]:
    """Turn our errors into gRPC statuses, and log every refusal."""

    @wraps(method)
    async def call(self: Any, request: Any, context: Context) -> T:
        try:
            return await method(self, request, context)
        except RaddleError as error:
            log_refusal(method.__name__, request, context, error)
            return await abort(context, error)

    return call
