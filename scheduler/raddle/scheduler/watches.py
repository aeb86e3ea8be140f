"""Watchers of jobs and routes: a bounded history, and a queue for each stream.

Changes reach a stream only after their commit. A stream that does not keep up is ended rather
than let grow.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.scheduler.mirror import Mirror

HISTORY_MAX = 10_000
QUEUE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Seen:
    """One change: `value` is None for a deletion, `old` what was there."""

    key: str
    value: Any
    old: Any
    revision: int


class Watches:
    """Changes under `jobs/` and `routes/` for streams."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._history: deque[Seen] = deque(maxlen=HISTORY_MAX)
        self._last: dict[str, Any] = {}
        self._queues: set[asyncio.Queue[Seen]] = set()
        #: Changes at or before this revision are not in the history.
        self._forgotten = mirror.revision
        mirror.listen(self._changed)

    def _changed(self, key: str, value: Any, revision: int) -> None:
        if not key.startswith((keys.JOBS, keys.ROUTES)):
            return
        old = self._last.pop(key, None)
        if value is not None:
            self._last[key] = value
        seen = Seen(key, value, old, revision)
        if len(self._history) == HISTORY_MAX:
            self._forgotten = self._history[0].revision
        self._history.append(seen)
        for queue in tuple(self._queues):
            if queue.full():
                self._queues.discard(queue)
            else:
                queue.put_nowait(seen)

    def since(self, prefix: str, revision: int) -> list[Seen]:
        """What changed after a revision.

        Raises:
            PermanentError: COMPACTED when the history does not reach back so far.
        """
        if revision < self._forgotten:
            raise PermanentError(
                Reason.COMPACTED,
                f"changes after revision {revision} are gone; begin with a snapshot.",
                compact_revision=str(self._forgotten),
            )
        return [s for s in self._history if s.key.startswith(prefix) and s.revision > revision]

    async def follow(self, prefix: str, idle_s: float) -> AsyncIterator[Seen | None]:
        """Changes from now on; None when nothing came for `idle_s`.

        Raises:
            PermanentError: LIMIT_EXCEEDED when the reader did not keep up.
        """
        queue: asyncio.Queue[Seen] = asyncio.Queue(QUEUE_MAX)
        self._queues.add(queue)
        try:
            # The first answer says that everything from here on will be told.
            yield None
            while True:
                if queue not in self._queues and queue.empty():
                    raise PermanentError(
                        Reason.LIMIT_EXCEEDED, "the watch did not keep up; begin it again."
                    )
                try:
                    seen = await asyncio.wait_for(queue.get(), idle_s)
                except TimeoutError:
                    yield None
                    continue
                if seen.key.startswith(prefix):
                    yield seen
        finally:
            self._queues.discard(queue)
