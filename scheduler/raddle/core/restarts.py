"""The budget of restarts: a process that ends as soon as it starts is not started without end.

The first few starts of a seat happen at once, then each waits twice as long as the one before; at
last the job fails, with the reason. A process that lived for a while clears its seat's account.
Counted by each leader anew, on its own clock.
"""

from __future__ import annotations

from raddle.core.context import Context, Life
from raddle.core.detection import Loss
from raddle.model.job import Job
from raddle.model.kinds import FaultKind
from raddle.model.reasons import Decision
from raddle.model.types import RankKey, Why

# A process that ended earlier than this after its start had a short life.
SETTLED_S = 30.0
STARTS_AT_ONCE = 3
STARTS_MAX = 10
BACKOFF_S = 0.5
BACKOFF_S_MAX = 30.0


def started(context: Context, job: Job, key: RankKey) -> None:
    """A seat gets a new process now."""
    lives = context.lives.setdefault(job.uid, {})
    last = lives.get(key)
    short = last is not None and last.ended_s is not None and last.is_shorter_than(SETTLED_S)
    lives[key] = Life(context.now, starts=last.starts + 1 if last is not None and short else 1)


def due_s(context: Context, losses: list[Loss]) -> float:
    """When the processes of one job's losses may be started again."""
    return min(_due_s(context, loss) for loss in losses)


def _due_s(context: Context, loss: Loss) -> float:
    life = _life(context, loss)
    if life is None or life.ended_s is None or life.starts < STARTS_AT_ONCE:
        return context.now
    if not life.is_shorter_than(SETTLED_S):
        return context.now
    wait_s = BACKOFF_S * 2.0 ** (life.starts - STARTS_AT_ONCE)
    return life.ended_s + min(wait_s, BACKOFF_S_MAX)


def _life(context: Context, loss: Loss) -> Life | None:
    """The seat's last start, ended at the first sight of the loss; None if that was not its end."""
    if loss.kind is not FaultKind.RANK_EXITED:
        return None
    life = context.lives.get(loss.job_uid, {}).get(loss.key)
    if life is not None and life.ended_s is None:
        life.ended_s = context.now
    return life


def exhausted(context: Context, losses: list[Loss]) -> Why | None:
    """Why the job fails now; None while its budget lasts."""
    for loss in losses:
        life = _life(context, loss)
        if life is not None and life.starts >= STARTS_MAX and life.is_shorter_than(SETTLED_S):
            rank = f"{loss.key.role}/{loss.key.instance}/{loss.key.rank}"
            message = (
                f"rank {rank} on {loss.position} ended within {SETTLED_S:.0f} s of each of its last"
                f" {life.starts} starts ({loss.message}): read its log, then submit the job again"
            )
            return Why(reason=Decision.RESTART_BUDGET, message=message)
    return None


def waits(context: Context, losses: list[Loss], until_s: float) -> Why:
    """What a job whose processes keep ending waits for."""
    life = next(x for x in (_life(context, loss) for loss in losses) if x is not None)
    message = (
        f"{losses[0].message}; started {life.starts} times in a row, again in"
        f" {max(0.0, until_s - context.now):.1f} s"
    )
    return Why(reason=Decision.RESTART_BACKOFF, message=message)
