"""What the project asks of a store: compare-and-commit, watches without gaps, leases that tell.

Two backends keep this contract, memory and etcd; one contract suite runs over both. Losing a race
is a return value, an unreachable store is an exception (`TemporaryError`, reason
STORE_UNAVAILABLE). Keys are text relative to the cluster's prefix (`jobs/j-1`, never a leading
slash); values are bytes that the store does not read.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from raddle.model.errors import PermanentError, Reason

# etcd's own defaults (--max-txn-ops, --max-request-bytes); a larger transaction is refused there.
TRANSACTION_OPERATIONS_MAX = 128
TRANSACTION_BYTES_MAX = 1_500_000


@dataclass(frozen=True, slots=True)
class Record:
    """One key as stored; `mod_revision` is the store's revision of its last change."""

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All records under a prefix at one revision, sorted by key."""

    revision: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """The key's `mod_revision` must be exactly this; 0 means that the key must not exist."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """All of it or nothing. A key may be written at most once (etcd refuses more)."""

    compares: tuple[Compare, ...] = ()
    writes: tuple[Put | Delete, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`succeeded` False: a compare failed and nothing was written. `revision` is the store's."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """One key's change; `record` is None for a deletion (an ended lease deletes as well)."""

    key: str
    record: Record | None
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """All changes of one or more whole revisions, in order; never half a revision.

    `store_term` grows whenever the store elected a new leader of its own: leases that end just
    after that prove nothing about their owners. `resumed` (with no changes) says that the watch
    goes on over a new connection: if the store was restored from an older state in between, then
    what was seen before and what comes now belong to two histories.
    """

    revision: int
    changes: tuple[Change, ...] = field(default=())
    store_term: int = 0
    resumed: bool = False


class Lease(Protocol):
    """A promise of life with a local deadline that ends before the server's does."""

    @property
    def lease_id(self) -> int: ...

    @property
    def ttl_s(self) -> float: ...

    @property
    def alive(self) -> bool:
        """False once the local deadline (last successful keepalive sent + TTL - margin) passed."""
        ...

    async def wait_lost(self) -> None:
        """Return once the lease is lost, before the server expires it. Never returns otherwise."""
        ...

    async def revoke(self) -> None:
        """End the lease and its keys now. Safe to call twice, and when the store is away."""
        ...


class Store(Protocol):
    """Contract: `commit` is atomic and settled, reads are linearizable, watches have no gaps."""

    async def get(self, key: str, *, timeout_s: float = 2.0) -> Record | None:
        """Read one key, linearizable. Raises TemporaryError when unreachable until the timeout."""
        ...

    async def list(self, prefix: str, *, timeout_s: float = 5.0) -> Snapshot:
        """Read all keys under a prefix at one pinned revision, page by page."""
        ...

    async def commit(self, transaction: Transaction, *, timeout_s: float = 5.0) -> CommitResult:
        """Commit all or nothing, exactly once.

        An ambiguous answer (deadline, lost connection) is settled here by an operation id, never
        by a blind retry. Raises TemporaryError (STORE_UNAVAILABLE, or STORE_FULL) when it could
        not be settled in time: then, and only then, the caller does not know.
        Raises PermanentError (LIMIT_EXCEEDED) for a transaction above the limits.
        """
        ...

    def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[Changes, None]:
        """All changes with mod_revision >= from_revision, in order, each once, without end.

        Survives lost connections, member changes and silence (probed). Raises PermanentError
        (COMPACTED, details compact_revision) when the history is gone, PERMISSION_DENIED when
        refused.
        """
        ...

    async def grant(self, ttl_s: float, *, timeout_s: float = 5.0) -> Lease:
        """Grant a lease that is kept alive until lost or revoked."""
        ...

    async def lease_left_s(self, lease_id: int, *, timeout_s: float = 2.0) -> float:
        """Seconds until the store ends somebody's lease unless it is renewed; etcd rounds down.

        Negative for one that is gone. Raises TemporaryError when the store is unreachable.
        """
        ...

    async def close(self) -> None:
        """Stop all tasks and connections. Leases are left to expire unless revoked before."""
        ...


def check_limits(transaction: Transaction) -> None:
    """Refuse a transaction that etcd would refuse, before it is sent.

    Raises:
        PermanentError: LIMIT_EXCEEDED, or INVALID_ARGUMENT when a key is written twice.
    """
    operations = max(len(transaction.compares), len(transaction.writes))
    if operations > TRANSACTION_OPERATIONS_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"a transaction of {operations} operations; at most {TRANSACTION_OPERATIONS_MAX}",
        )
    size = sum(len(w.key) + len(w.value) for w in transaction.writes if isinstance(w, Put))
    if size > TRANSACTION_BYTES_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED,
            f"a transaction of {size} bytes; at most {TRANSACTION_BYTES_MAX}",
        )
    names = [write.key for write in transaction.writes]
    if len(set(names)) != len(names):
        raise PermanentError(Reason.INVALID_ARGUMENT, "a transaction writes one key twice")
