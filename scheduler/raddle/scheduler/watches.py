"""Watchers of records: a bounded history, and a queue for each stream.

Changes reach a stream only after their commit. A stream that does not keep up is ended rather
than let grow. A complete list of the store tells no history: what it brings goes to the streams
that are open, and who asks for changes of before has to begin with a snapshot.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raddle.model import keys
from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.scheduler.mirror import Mirror

HISTORY_MAX = 10_000
QUEUE_MAX = 10_000
#: What streams may begin with at a revision of before.
_REMEMBERED = (keys.JOBS, keys.ROUTES, keys.INCIDENTS, keys.MAINTENANCE)
#: What is told as it changes, and no history kept: what is made of it has no revision.
_TOLD = (*_REMEMBERED, keys.TOPOLOGY, keys.AGENTS, keys.HOLDS, keys.PLACEMENTS)
# A new leader's picture may be a moment behind what its predecessor told.
_CATCH_UP_S = 2.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One change: `value` is None for a deletion, `old` what was there."""

    key: str
    value: Any
    old: Any
    revision: int


class _Stream:
    """What one stream has still to tell, and why it ends after that, if it does."""

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self.prefixes = prefixes
        self.queue: asyncio.Queue[Seen | None] = asyncio.Queue()
        self.end: RaddleError | None = None
        #: Set with each change, and when the leader decided.
        self.woken = asyncio.Event()

    def tell(self, seen: Seen) -> None:
        self.woken.set()
        if not seen.key.startswith(self.prefixes):
            return
        if self.queue.qsize() >= QUEUE_MAX:
            self.finish(
                PermanentError(Reason.LIMIT_EXCEEDED, "the watch did not keep up; begin it again.")
            )
        elif self.end is None:
            self.queue.put_nowait(seen)

    def finish(self, why: RaddleError) -> None:
        if self.end is None:
            self.end = why
            self.woken.set()
            self.queue.put_nowait(None)

    def take(self) -> list[Seen]:
        """All that is queued, in order.

        Raises:
            RaddleError: the stream's end, once everything before it was taken.
        """
        taken: list[Seen] = []
        while not self.queue.empty():
            seen = self.queue.get_nowait()
            if seen is not None:
                taken.append(seen)
        if not taken and self.end is not None:
            raise self.end
        return taken


class Watches:
    """Changes of records for streams."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._history: deque[Seen] = deque()
        self._last: dict[str, Any] = {}
        self._streams: dict[_Stream, None] = {}
        self._stopped: RaddleError | None = None
        #: Changes at or before this revision are not in the history.
        self._forgotten = mirror.revision
        self._set_backs = mirror.set_backs
        mirror.listen(self._changed)
        mirror.listen_reads(self._read_anew)

    def stop(self) -> None:
        """This process ends: every stream is told, and no other begins."""
        self._stopped = TemporaryError(
            Reason.NO_LEADER, "this scheduler stops; begin the watch again, here or at another."
        )
        self._finish_all(self._stopped)

    def _finish_all(self, why: RaddleError) -> None:
        for stream in self._streams:
            stream.finish(why)

    def decided(self) -> None:
        """The leader took a decision: what it believes, and stores nowhere, may have changed."""
        for stream in self._streams:
            stream.woken.set()

    def _read_anew(self, revision: int) -> None:
        """All of the store was read at this revision; its changes are told next."""
        if self._mirror.set_backs > self._set_backs:
            # The same revisions will mean other changes.
            self._set_backs = self._mirror.set_backs
            self._history.clear()
            self._finish_all(_compacted("the store was set back", revision))
        # Our own commits may have overtaken the list: they are not in it.
        self._history = deque(seen for seen in self._history if seen.revision > revision)
        self._forgotten = revision

    def _changed(self, key: str, value: Any, revision: int) -> None:
        if not key.startswith(_TOLD):
            return
        old = self._last.pop(key, None)
        if value is not None:
            self._last[key] = value
        seen = Seen(key, value, old, revision)
        if revision > self._forgotten and key.startswith(_REMEMBERED):
            self._remember(seen)
        for stream in self._streams:
            stream.tell(seen)

    def _remember(self, seen: Seen) -> None:
        if len(self._history) == HISTORY_MAX:
            self._forgotten = self._history.popleft().revision
        self._history.append(seen)

    async def require_reached(self, revision: int) -> None:
        """Refuse a revision that the store has not come to.

        Raises:
            PermanentError: COMPACTED.
        """
        try:
            await asyncio.wait_for(self._mirror.wait_revision(revision), _CATCH_UP_S)
        except TimeoutError as error:
            at = f"revision {revision} is ahead of the store's"
            raise _compacted(at, self._mirror.revision) from error

    def since(self, prefix: str, revision: int) -> list[Seen]:
        """What changed after a revision.

        Raises:
            PermanentError: COMPACTED when the history does not reach back so far.
        """
        if revision < self._forgotten:
            raise _compacted(f"changes after revision {revision} are gone", self._forgotten)
        return [s for s in self._history if s.key.startswith(prefix) and s.revision > revision]

    async def follow(self, prefix: str, idle_s: float) -> AsyncIterator[Seen | None]:
        """Changes from now on; None when nothing came for `idle_s`.

        Raises:
            PermanentError: LIMIT_EXCEEDED when the reader did not keep up, COMPACTED when the
                store was set back.
            TemporaryError: NO_LEADER when this process ends.
        """
        with self._opened((prefix,)) as stream:
            # The first answer says that everything from here on will be told.
            yield None
            while True:
                try:
                    seen = await asyncio.wait_for(stream.queue.get(), idle_s)
                except TimeoutError:
                    yield None
                    continue
                if seen is None:
                    assert stream.end is not None, "only an end is told without a change"
                    raise stream.end
                yield seen

    async def batches(
        self, prefixes: tuple[str, ...], gather_s: float, idle_s: float
    ) -> AsyncIterator[list[Seen] | None]:
        """What changed since the last batch, gathered for a moment; None after `idle_s` of silence.

        The first batch is empty and comes at once, and so is one that tells that the leader
        decided and may believe something else. Raises as `follow` does.
        """
        with self._opened(prefixes) as stream:
            yield []
            while True:
                try:
                    await asyncio.wait_for(stream.woken.wait(), idle_s)
                except TimeoutError:
                    yield None
                    continue
                await asyncio.sleep(gather_s)
                stream.woken.clear()
                yield stream.take()

    @contextmanager
    def _opened(self, prefixes: tuple[str, ...]) -> Iterator[_Stream]:
        stream = _Stream(prefixes)
        self._streams[stream] = None
        if self._stopped is not None:
            stream.finish(self._stopped)
        try:
            yield stream
        finally:
            self._streams.pop(stream, None)


def _compacted(what: str, revision: int) -> PermanentError:
    return PermanentError(
        Reason.COMPACTED,
        f"{what} ({revision}); begin with a snapshot.",
        compact_revision=str(revision),
    )
