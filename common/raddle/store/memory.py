"""A store in this process, with the same contract as etcd's: for simulation and for tests.

Several `MemoryStore` clients share one `MemoryBackend`. Leases live by the event loop's clock, so
that a simulator drives them by a virtual one. A client can be cut off (`cut`, `mend`), and a
`delay` put before and after each of its calls: a commit may then be applied and its answer lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace

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

LEASE_MARGIN_S = 0.3


class MemoryBackend:
    """Keys, history, leases and watchers, shared by clients."""

    def __init__(self) -> None:
        self.revision = 1
        self.records: dict[str, Record] = {}
        self.history: list[Changes] = []
        self.compact_revision = 0
        #: Counts elections of the store's own leader; a simulator moves it.
        self.term = 1
        #: The timer that ends each lease.
        self.leases: dict[int, asyncio.TimerHandle] = {}
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
            self._append(Changes(revision, tuple(changes), self.term))
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
        self._end_after(lease_id, ttl_s)
        return lease_id

    def keep_alive(self, lease_id: int, ttl_s: float) -> bool:
        """Renew; False when the lease is gone."""
        if lease_id not in self.leases:
            return False
        self.leases[lease_id].cancel()
        self._end_after(lease_id, ttl_s)
        return True

    def lease_left_s(self, lease_id: int) -> float:
        """Negative for one that is gone."""
        timer = self.leases.get(lease_id)
        return timer.when() - asyncio.get_running_loop().time() if timer is not None else -1.0

    def _end_after(self, lease_id: int, ttl_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.leases[lease_id] = loop.call_later(ttl_s, self.end_lease, lease_id)

    def end_lease(self, lease_id: int) -> None:
        timer = self.leases.pop(lease_id, None)
        if timer is None:
            return
        timer.cancel()
        gone = sorted(k for k, record in self.records.items() if record.lease_id == lease_id)
        revision = self.revision + 1
        for key in gone:
            del self.records[key]
        if gone:
            changes = tuple(Change(key, None, revision) for key in gone)
            self._append(Changes(revision, changes, self.term))

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
                    found.append(replace(changes, changes=mine))
        return found

    def on_change(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` after each change; returns the way to stop that."""
        self._changed.append(wake)
        return lambda: self._changed.remove(wake)


class MemoryLease:
    """A lease kept alive by its own task; its owner is told before the backend ends it."""

    def __init__(self, store: MemoryStore, lease_id: int, ttl_s: float) -> None:
        self.lease_id = lease_id
        self.ttl_s = ttl_s
        self._store = store
        self._lost = asyncio.Event()
        self._deadline_s = self._now() + ttl_s - LEASE_MARGIN_S
        self._task = asyncio.create_task(self._keep())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    @property
    def alive(self) -> bool:
        return not self._lost.is_set() and self._now() < self._deadline_s

    async def _keep(self) -> None:
        backend = self._store.backend
        while self.alive:
            left_s = self._deadline_s - self._now()
            await asyncio.sleep(min(self.ttl_s / 4, left_s))
            if not self._store.is_cut:
                if not backend.keep_alive(self.lease_id, self.ttl_s):
                    break
                self._deadline_s = self._now() + self.ttl_s - LEASE_MARGIN_S
        self._lost.set()

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def abandon(self) -> None:
        """Stop renewing and say nothing to the backend, as a killed process does."""
        self._lost.set()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def revoke(self) -> None:
        await self.abandon()
        if not self._store.is_cut:
            self._store.backend.end_lease(self.lease_id)


async def _no_delay() -> None:
    """The store is in this process."""


class MemoryStore:
    """One client of a `MemoryBackend`. `delay` is waited before and after each call."""

    def __init__(
        self,
        backend: MemoryBackend | None = None,
        *,
        delay: Callable[[], Awaitable[None]] = _no_delay,
    ) -> None:
        self.backend = backend or MemoryBackend()
        self._delay = delay
        self._connected = asyncio.Event()
        self._connected.set()
        self._cuts = 0
        self._watches: set[asyncio.Event] = set()
        self._leases: list[MemoryLease] = []

    @property
    def is_cut(self) -> bool:
        return not self._connected.is_set()

    def cut(self) -> None:
        """Every call fails, watches are silent and leases are not renewed, until `mend`."""
        self._connected.clear()
        self._cuts += 1

    def mend(self) -> None:
        self._connected.set()
        for changed in self._watches:
            changed.set()

    async def _reach(self) -> None:
        await self._delay()
        if self.is_cut:
            raise TemporaryError(Reason.STORE_UNAVAILABLE, "the memory store is cut off")

    async def get(self, key: str, *, timeout_s: float = 2.0) -> Record | None:  # noqa: ARG002
        await self._reach()
        found = self.backend.records.get(key)
        await self._reach()
        return found

    async def list(self, prefix: str, *, timeout_s: float = 5.0) -> Snapshot:  # noqa: ARG002
        await self._reach()
        found = self.backend.read(prefix)
        await self._reach()
        return found

    async def commit(
        self,
        transaction: Transaction,
        *,
        timeout_s: float = 5.0,  # noqa: ARG002
    ) -> CommitResult:
        await self._reach()
        result = self.backend.commit(transaction)
        await self._reach()
        return result

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[Changes, None]:
        changed = asyncio.Event()
        stop = self.backend.on_change(changed.set)
        self._watches.add(changed)
        cuts = self._cuts
        try:
            while True:
                changed.clear()
                await self._delay()
                await self._connected.wait()
                if cuts != self._cuts:
                    cuts = self._cuts
                    yield Changes(from_revision - 1, (), self.backend.term, resumed=True)
                for changes in self.backend.since(prefix, from_revision):
                    from_revision = changes.revision + 1
                    yield changes
                await changed.wait()
        finally:
            stop()
            self._watches.discard(changed)

    async def grant(self, ttl_s: float, *, timeout_s: float = 5.0) -> MemoryLease:  # noqa: ARG002
        await self._reach()
        lease = MemoryLease(self, self.backend.grant(ttl_s), ttl_s)
        self._leases.append(lease)
        return lease

    async def lease_left_s(self, lease_id: int, *, timeout_s: float = 2.0) -> float:  # noqa: ARG002
        await self._reach()
        left_s = self.backend.lease_left_s(lease_id)
        await self._reach()
        return left_s

    async def close(self) -> None:
        """Stop renewing leases; they end by themselves."""
        for lease in self._leases:
            await lease.abandon()
