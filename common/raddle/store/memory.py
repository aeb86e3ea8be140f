"""A store in this process, with the same contract as etcd's: for simulation and for tests.

Several `MemoryStore` clients share one `MemoryBackend`. Its clock is told (`advance`), never read,
so that a simulator can drive leases by its own time; `unreachable` makes a client's calls fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.store.protocol import (
    Change,
    Changes,
    CommitResult,
    Put,
    Record,
    Snapshot,
    Transaction,
    check_limits,
)


class MemoryBackend:
    """Keys, history, leases and watchers, shared by clients."""

    def __init__(self) -> None:
        self.revision = 1
        self.records: dict[str, Record] = {}
        self.history: list[Changes] = []
        self.compact_revision = 0
        self.leases: dict[int, float] = {}
        self.now_s = 0.0
        self._next_lease = 1
        self._changed: list[Callable[[], None]] = []

    def commit(self, transaction: Transaction) -> CommitResult:
        """Apply a transaction now."""
        check_limits(transaction)
        for compare in transaction.compares:
            record = self.records.get(compare.key)
            if (record.mod_revision if record else 0) != compare.mod_revision:
                return CommitResult(False, self.revision)
        revision = self.revision + 1
        changes = []
        for write in transaction.writes:
            old = self.records.get(write.key)
            if isinstance(write, Put):
                if write.lease_id and write.lease_id not in self.leases:
                    raise PermanentError(
                        Reason.NOT_FOUND, f"lease {write.lease_id} is gone", key=write.key
                    )
                created = old.create_revision if old else revision
                record = Record(write.key, write.value, revision, created, write.lease_id)
                self.records[write.key] = record
                changes.append(Change(write.key, record, revision))
            elif old is not None:
                del self.records[write.key]
                changes.append(Change(write.key, None, revision))
        if changes:
            self._append(Changes(revision, tuple(changes)))
        return CommitResult(True, self.revision)

    def _append(self, changes: Changes) -> None:
        self.revision = changes.revision
        self.history.append(changes)
        for wake in tuple(self._changed):
            wake()

    def compact(self, revision: int) -> None:
        """Forget the history up to and including a revision."""
        self.compact_revision = revision
        self.history = [c for c in self.history if c.revision > revision]
        for wake in tuple(self._changed):
            wake()

    def grant(self, ttl_s: float) -> int:
        lease_id, self._next_lease = self._next_lease, self._next_lease + 1
        self.leases[lease_id] = self.now_s + ttl_s
        return lease_id

    def keep_alive(self, lease_id: int, ttl_s: float) -> bool:
        if lease_id not in self.leases:
            return False
        self.leases[lease_id] = self.now_s + ttl_s
        return True

    def advance(self, now_s: float) -> None:
        """It is this time now: leases that ended delete their keys."""
        self.now_s = now_s
        for lease_id in [i for i, end in sorted(self.leases.items()) if end <= now_s]:
            self.end_lease(lease_id)

    def end_lease(self, lease_id: int) -> None:
        if self.leases.pop(lease_id, None) is None:
            return
        gone = sorted(k for k, record in self.records.items() if record.lease_id == lease_id)
        revision = self.revision + 1
        for key in gone:
            del self.records[key]
        if gone:
            self._append(Changes(revision, tuple(Change(key, None, revision) for key in gone)))

    def read(self, prefix: str) -> Snapshot:
        found = tuple(self.records[k] for k in sorted(self.records) if k.startswith(prefix))
        return Snapshot(self.revision, found)

    def since(self, prefix: str, from_revision: int) -> list[Changes]:
        """History under a prefix from a revision on.

        Raises:
            PermanentError: COMPACTED.
        """
        if from_revision <= self.compact_revision:
            raise PermanentError(
                Reason.COMPACTED,
                f"history before revision {self.compact_revision + 1} is gone",
                compact_revision=str(self.compact_revision),
            )
        found = []
        for changes in self.history:
            if changes.revision >= from_revision:
                mine = tuple(c for c in changes.changes if c.key.startswith(prefix))
                if mine:
                    found.append(Changes(changes.revision, mine))
        return found

    def on_change(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after each change; returns the way to stop that."""
        self._changed.append(wake)
        return lambda: self._changed.remove(wake)


class MemoryLease:
    """A lease whose owner's clock is the backend's: it cannot drift apart."""

    def __init__(self, store: MemoryStore, lease_id: int, ttl_s: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self._store = store

    @property
    def alive(self) -> bool:
        return self.lease_id in self._store.backend.leases

    def keep_alive(self) -> bool:
        """Renew; False when the lease is gone or the store is away."""
        if self._store.unreachable:
            return False
        return self._store.backend.keep_alive(self.lease_id, self.ttl_s)

    async def wait_lost(self) -> None:
        changed = asyncio.Event()
        stop = self._store.backend.on_change(changed.set)
        try:
            while self.alive:
                changed.clear()
                await changed.wait()
        finally:
            stop()

    async def revoke(self) -> None:
        self._store.backend.end_lease(self.lease_id)


class MemoryStore:
    """One client of a `MemoryBackend`."""

    def __init__(self, backend: MemoryBackend | None = None) -> None:
        self.backend = backend or MemoryBackend()
        self.unreachable = False

    def _reach(self) -> None:
        if self.unreachable:
            raise TemporaryError(Reason.STORE_UNAVAILABLE, "the memory store is cut off")

    async def get(self, key: str, *, timeout_s: float = 2.0) -> Record | None:  # noqa: ARG002
        self._reach()
        return self.backend.records.get(key)

    async def list(self, prefix: str, *, timeout_s: float = 5.0) -> Snapshot:  # noqa: ARG002
        self._reach()
        return self.backend.read(prefix)

    async def commit(
        self,
        transaction: Transaction,
        *,
        timeout_s: float = 5.0,  # noqa: ARG002
    ) -> CommitResult:
        self._reach()
        return self.backend.commit(transaction)

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncIterator[Changes]:
        changed = asyncio.Event()
        stop = self.backend.on_change(changed.set)
        try:
            while True:
                changed.clear()
                for changes in self.backend.since(prefix, from_revision):
                    from_revision = changes.revision + 1
                    yield changes
                await changed.wait()
        finally:
            stop()

    async def grant(self, ttl_s: float, *, timeout_s: float = 5.0) -> MemoryLease:  # noqa: ARG002
        self._reach()
        return MemoryLease(self, self.backend.grant(ttl_s), ttl_s)

    async def close(self) -> None:
        """Nothing is held open."""
