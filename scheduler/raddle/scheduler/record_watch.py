"""A watch of records of one kind: all of them at a revision, then every change.

In go a prefix, where to begin and what the caller may see; out come values with what each is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from raddle.scheduler.mirror import Mirror
from raddle.scheduler.watches import Seen, Watches
from raddle.v1 import scheduler_pb2

_BOOKMARK_S = 10.0
#: By key and value: the part that the caller may see and asked for, or None.
Shown = Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class Told:
    """One message of a watch. A deleted record's value is what was there."""

    kind: scheduler_pb2.WatchKind.ValueType
    revision: int
    value: Any = None
    #: The revision of this version of the record.
    record_revision: int = 0


class RecordWatch:
    """Watches over a mirror's records."""

    def __init__(self, mirror: Mirror, watches: Watches) -> None:
        self._mirror = mirror
        self._watches = watches

    async def follow(self, prefix: str, after_revision: int, shown: Shown) -> AsyncIterator[Told]:
        """A snapshot unless changes after a revision are asked for, then changes and bookmarks.

        Raises:
            PermanentError: COMPACTED, or as `Watches.follow`.
        """
        await self._watches.require_reached(after_revision)
        stream = self._watches.follow(prefix, _BOOKMARK_S)
        # From here on nothing is missed; what the first part tells is skipped in the second.
        await anext(stream)
        told = after_revision or self._mirror.revision
        if after_revision:
            for seen in self._watches.since(prefix, after_revision):
                told = seen.revision
                for item in _changed(seen, shown):
                    yield item
        else:
            for item in self._snapshot(prefix, told, shown):
                yield item
        async for item_seen in stream:
            if item_seen is None:
                yield Told(scheduler_pb2.WATCH_KIND_BOOKMARK, self._mirror.revision)
            elif item_seen.revision > told:
                for item in _changed(item_seen, shown):
                    yield item

    def _snapshot(self, prefix: str, revision: int, shown: Shown) -> list[Told]:
        """Taken at once: what changes while it is sent is told after it."""
        found = [
            Told(scheduler_pb2.WATCH_KIND_SNAPSHOT, revision, value, self._mirror.mod_revision(key))
            for key, record in self._mirror.under(prefix)
            if (value := shown(key, record)) is not None
        ]
        return [*found, Told(scheduler_pb2.WATCH_KIND_SYNCED, revision)]


def _changed(seen: Seen, shown: Shown) -> list[Told]:
    record = seen.value if seen.value is not None else seen.old
    value = shown(seen.key, record) if record is not None else None
    if value is None:
        return []
    changed = seen.value is not None
    kind = scheduler_pb2.WATCH_KIND_CHANGED if changed else scheduler_pb2.WATCH_KIND_DELETED
    return [Told(kind, seen.revision, value, seen.revision)]
