"""The replica's picture of the store: decoded records, kept up to date on leader and standbys.

In go snapshots and changes of the cluster's prefix and the leader's own commits; out go reads,
and every change to those who listen. A record that cannot be read is set aside, counted and told;
one of a newer schema makes this replica unfit to lead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from raddle.core.instructions import Write
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.store.follow import unbroken
from raddle.store.protocol import Change, Snapshot, Store
from raddle.wire import records as wire

Listener = Callable[[str, Any, int], None]
_RETRY_S = 0.5
log = structlog.get_logger()


class Mirror:
    """Decoded records by key with their revisions."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._values: dict[str, Any] = {}
        self._revisions: dict[str, int] = {}
        #: Keys that end with a lease.
        self._leases: dict[str, int] = {}
        #: Revisions of deletions that an older echo or list may still contradict.
        self._gone: dict[str, int] = {}
        self._listeners: list[Listener] = []
        self._read_listeners: list[Callable[[int], None]] = []
        self._moved = asyncio.Event()
        self.revision = 0
        #: The revision of the last complete list; a watch tells nothing new of before.
        self._read_at = 0
        self._refreshes = 0
        #: How often the store was found restored from an older state.
        self.set_backs = 0
        #: Counts elections of the store's own leader.
        self.store_term = 0
        #: Keys whose record could not be read, with the reason.
        self.set_aside: dict[str, str] = {}
        #: Keys of a newer schema that a leader would write over: this replica must not lead.
        self.too_new: dict[str, str] = {}

    async def run(self) -> None:
        """Follow the store for ever; troubles are waited out and told."""
        while True:
            try:
                revision = await self.refresh()
                async for changes in unbroken(self._store, "", revision):
                    self.store_term = max(self.store_term, changes.store_term)
                    for change in changes.changes:
                        self._apply(change)
                    self._advance(changes.revision)
                log.info("the watch was broken; everything is read anew", revision=self.revision)
            except TemporaryError as error:
                log.warning("the store is away; the mirror waits", why=str(error))
                await asyncio.sleep(_RETRY_S)

    async def refresh(self) -> int:
        """Read everything anew: where changes may have been missed or an outcome is unknown.

        Returns the revision of what was read.
        """
        known = self.revision
        self._refreshes += 1
        try:
            snapshot = await self._store.list("", timeout_s=10.0)
        finally:
            self._refreshes -= 1
        if self._is_set_back(snapshot, known):
            self._set_back(snapshot.revision)
        if snapshot.revision >= self._read_at:
            self._load(snapshot)
        return snapshot.revision

    def _is_set_back(self, snapshot: Snapshot, known: int) -> bool:
        """Does it contradict what was known at `known`, a revision before it was asked for?"""
        if snapshot.revision < known:
            return True
        return any(
            record.mod_revision < self._revisions.get(record.key, 0) <= known
            for record in snapshot.records
        )

    def _set_back(self, revision: int) -> None:
        """The store was restored from an older state: no revision of before counts any more."""
        log.error("the store was set back to an older state", revision=revision, was=self.revision)
        self._gone.clear()
        self._revisions = dict.fromkeys(self._revisions, 0)
        self.revision, self._read_at = revision, 0
        self.set_backs += 1

    def _load(self, snapshot: Snapshot) -> None:
        for listener in self._read_listeners:
            listener(snapshot.revision)
        present = {record.key for record in snapshot.records}
        for key in [key for key in self._revisions if key not in present]:
            self._apply(Change(key, None, snapshot.revision))
        for record in snapshot.records:
            if self._gone.get(record.key, 0) <= snapshot.revision:
                self._apply(Change(record.key, record, record.mod_revision))
        # Whatever a watch still tells of before is in the snapshot.
        self._read_at = snapshot.revision
        self._gone = {key: gone for key, gone in self._gone.items() if gone > self._read_at}
        self._advance(snapshot.revision)

    def _apply(self, change: Change) -> None:
        key = change.key
        if change.mod_revision <= max(
            self._read_at, self._revisions.get(key, 0), self._gone.get(key, 0)
        ):
            if change.mod_revision == self._gone.get(key) and not self._refreshes:
                del self._gone[key]
            return
        self._gone.pop(key, None)
        if key.startswith(keys.OPERATIONS) or key.endswith("/operation"):
            return
        if change.record is None:
            self._drop(key, change.mod_revision)
            return
        self._revisions[key] = change.mod_revision
        if change.record.lease_id:
            self._leases[key] = change.record.lease_id
        else:
            self._leases.pop(key, None)
        try:
            value = wire.decode(key, change.record.value)
        except PermanentError as error:
            self._set_aside(key, error)
            return
        self._clear_trouble(key)
        self._values[key] = value
        self._tell(key, value, change.mod_revision)

    def _drop(self, key: str, revision: int) -> None:
        self._revisions.pop(key, None)
        self._leases.pop(key, None)
        # Whoever listens may know what was there before it was set aside: a lease ends for all.
        known = key in self.set_aside or key in self.too_new
        self._clear_trouble(key)
        if self._refreshes:
            # The list under way may be of before.
            self._gone[key] = revision
        if self._values.pop(key, None) is not None or known:
            self._tell(key, None, revision)

    def _set_aside(self, key: str, error: PermanentError) -> None:
        self._values.pop(key, None)
        newer = error.reason is Reason.NEWER_SCHEMA and not key.startswith(keys.AGENTS)
        where = self.too_new if newer else self.set_aside
        if key not in where:
            log.error("record set aside", key=key, reason=error.reason, why=error.message)
        self._clear_trouble(key)
        where[key] = error.message

    def _clear_trouble(self, key: str) -> None:
        """Nothing of it is set aside (any more)."""
        self.set_aside.pop(key, None)
        self.too_new.pop(key, None)

    def apply_own(self, writes: tuple[Write, ...], revision: int) -> None:
        """Our own commit succeeded at this revision: no need to wait for its echo."""
        for write in writes:
            self._clear_trouble(write.key)
            if write.value is None:
                self._revisions.pop(write.key, None)
                self._values.pop(write.key, None)
                self._gone[write.key] = revision
            else:
                self._gone.pop(write.key, None)
                self._revisions[write.key] = revision
                self._values[write.key] = write.value
            self._tell(write.key, write.value, revision)
        self._advance(revision)

    def _tell(self, key: str, value: Any, revision: int) -> None:
        for listener in tuple(self._listeners):
            listener(key, value, revision)

    def _advance(self, revision: int) -> None:
        self.revision = max(self.revision, revision)
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def wait_revision(self, revision: int) -> None:
        """Return once the picture is at least as new as this revision."""
        while self.revision < revision:
            await self._moved.wait()

    async def wait_record(self, key: str, revision: int) -> None:
        """Return once the picture holds this very version of a record."""
        while self.mod_revision(key) != revision:
            await self.wait_moved()

    async def wait_set_back(self) -> None:
        """Return when the store is next found restored from an older state."""
        count = self.set_backs
        while self.set_backs == count:
            await self.wait_moved()

    async def wait_too_new(self) -> str:
        """Return the key of a record of a newer schema once there is one."""
        while not self.too_new:
            await self.wait_moved()
        return next(iter(self.too_new))

    async def wait_moved(self) -> None:
        """Return after the next change."""
        await self._moved.wait()

    @property
    def warm(self) -> bool:
        return self.revision > 0

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call with (key, value or None, revision) after each change; returns the way to stop."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def listen_reads(self, listener: Callable[[int], None]) -> None:
        """Call with the revision of each complete list, before the changes that it brings."""
        self._read_listeners.append(listener)

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def mod_revision(self, key: str) -> int:
        """0 for a key that does not exist."""
        return self._revisions.get(key, 0)

    def lease(self, key: str) -> int:
        """The lease that a key ends with; 0 for none."""
        return self._leases.get(key, 0)

    def records(self) -> dict[str, Any]:
        """A copy of all readable records."""
        return dict(self._values)

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """(key, value) under a prefix, by key."""
        for key in sorted(self._values):
            if key.startswith(prefix):
                yield key, self._values[key]
