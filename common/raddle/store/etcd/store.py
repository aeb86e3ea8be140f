"""The store on etcd: exactly-once commits, pinned lists, watches without gaps, honest leases.

Each client serialises its commits and writes an operation id beside them, under its own operation
key and with a compare on that key. So a repeated attempt can never be applied twice, and its
failed compare tells whether the first attempt was applied.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

import grpc

from raddle.etcd.v1 import rpc_pb2 as rpc
from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.store.etcd.connection import (
    ATTEMPT_TIMEOUT_S,
    Connection,
    StoreCallError,
    unavailable,
)
from raddle.store.etcd.lease import EtcdLease
from raddle.store.etcd.watch import watch_prefix
from raddle.store.protocol import (
    Changes,
    CommitResult,
    Put,
    Record,
    Snapshot,
    Transaction,
    check_limits,
)
from raddle.telemetry.tls import TlsFiles

OPERATION_ID_BYTES = 12
_PAGE = 1_000
_RANGE = "/etcdserverpb.KV/Range"
_TXN = "/etcdserverpb.KV/Txn"


class EtcdStore:
    """One client of an etcd cluster, for the keys of one Raddle cluster."""

    def __init__(
        self,
        endpoints: Sequence[str],
        cluster: str,
        *,
        operation_key: str,
        tls: TlsFiles | None = None,
    ) -> None:
        self._prefix = f"/raddle/{cluster}/"
        self._operation_key = self._key(operation_key)
        self._operation_revision: int | None = None
        self._endpoints = tuple(endpoints)
        self._lock = asyncio.Lock()
        self.connection = Connection(endpoints, tls)

    def _key(self, key: str) -> bytes:
        return f"{self._prefix}{key}".encode()

    def _record(self, kv: rpc.KeyValue) -> Record:
        key = kv.key.decode()[len(self._prefix) :]
        return Record(key, kv.value, kv.mod_revision, kv.create_revision, kv.lease)

    # --- reads ---------------------------------------------------------------------------------

    async def get(self, key: str, *, timeout_s: float = 2.0) -> Record | None:
        request = rpc.RangeRequest(key=self._key(key))
        answer = await self._range(request, timeout_s)
        return self._record(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, timeout_s: float = 5.0) -> Snapshot:
        deadline = time.monotonic() + timeout_s
        first, end = self._key(prefix), prefix_end(self._key(prefix))
        records: list[Record] = []
        revision = 0
        while True:
            request = rpc.RangeRequest(key=first, range_end=end, limit=_PAGE, revision=revision)
            answer = await self._range(request, max(0.05, deadline - time.monotonic()))
            # All pages are read at the revision of the first.
            revision = revision or answer.header.revision
            records += [self._record(kv) for kv in answer.kvs]
            if not answer.more:
                return Snapshot(revision, tuple(records))
            first = answer.kvs[-1].key + b"\0"

    async def _range(self, request: rpc.RangeRequest, timeout_s: float) -> rpc.RangeResponse:
        try:
            return await self.connection.read(_RANGE, request, rpc.RangeResponse, timeout_s)
        except StoreCallError as error:
            raise translate(error) from error

    def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[Changes, None]:
        key = self._key(prefix)
        return watch_prefix(
            self.connection, key, prefix_end(key), from_revision, len(self._prefix.encode())
        )

    # --- writes --------------------------------------------------------------------------------

    async def commit(self, transaction: Transaction, *, timeout_s: float = 5.0) -> CommitResult:
        check_limits(transaction)
        async with self._lock:
            deadline = time.monotonic() + timeout_s
            try:
                return await self._commit(transaction, deadline, timeout_s)
            except RaddleError:
                # Whether the operation key moved is unknown: read it before the next commit.
                self._operation_revision = None
                raise

    async def _commit(
        self, transaction: Transaction, deadline: float, timeout_s: float
    ) -> CommitResult:
        operation_id = _operation_id(transaction)
        in_doubt = False
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise unavailable(self._endpoints, "the commit is not settled", timeout_s)
            if self._operation_revision is None:
                self._operation_revision = await self._read_operation_revision(left)
            answer = await self._attempt(self._request(transaction, operation_id), deadline)
            if answer is None:
                # The same request again is safe, its compare tells what happened.
                in_doubt = True
                continue
            settled = self._settle(answer, operation_id)
            if settled is None:
                continue
            if settled.succeeded or not in_doubt or await self._bar(deadline):
                return settled

    async def _attempt(self, request: rpc.TxnRequest, deadline: float) -> rpc.TxnResponse | None:
        """etcd's answer; None when it is unknown whether the request was or will be applied."""
        left = max(0.01, deadline - time.monotonic())
        try:
            return await self.connection.call(
                _TXN, request, rpc.TxnResponse, min(2 * ATTEMPT_TIMEOUT_S, left)
            )
        except StoreCallError as error:
            if not error.member_failed:
                raise translate(error) from error
            await asyncio.sleep(min(0.02, left))
            return None

    async def _bar(self, deadline: float) -> bool:
        """Move the operation key, so that no attempt still under way can be applied any more.

        Without this, an attempt that comes late would be applied if its compares hold by then (a
        key that must not exist was deleted), after its commit was told as lost. False: an attempt
        may have come before us.
        """
        answer = await self._attempt(
            self._request(Transaction(), _operation_id(Transaction())), deadline
        )
        if answer is None or not answer.succeeded:
            return False
        self._operation_revision = answer.header.revision
        return True

    async def _read_operation_revision(self, timeout_s: float) -> int:
        request = rpc.RangeRequest(key=self._operation_key)
        answer = await self._range(request, timeout_s)
        return answer.kvs[0].mod_revision if answer.kvs else 0

    def _request(self, transaction: Transaction, operation_id: bytes) -> rpc.TxnRequest:
        assert self._operation_revision is not None
        request = rpc.TxnRequest()
        for compare in transaction.compares:
            self._add_compare(request, self._key(compare.key), compare.mod_revision)
        self._add_compare(request, self._operation_key, self._operation_revision)
        for write in transaction.writes:
            operation = request.success.add()
            if isinstance(write, Put):
                put = operation.request_put
                put.key, put.value, put.lease = self._key(write.key), write.value, write.lease_id
            else:
                operation.request_delete_range.key = self._key(write.key)
        mark = request.success.add().request_put
        mark.key, mark.value = self._operation_key, operation_id
        request.failure.add().request_range.key = self._operation_key
        return request

    @staticmethod
    def _add_compare(request: rpc.TxnRequest, key: bytes, mod_revision: int) -> None:
        compare = request.compare.add()
        compare.target = rpc.Compare.MOD
        compare.key = key
        compare.mod_revision = mod_revision

    def _settle(self, answer: rpc.TxnResponse, operation_id: bytes) -> CommitResult | None:
        """The result, or None when the operation key was not where it was expected."""
        if answer.succeeded:
            self._operation_revision = answer.header.revision
            return CommitResult(True, answer.header.revision)
        found = answer.responses[0].response_range.kvs
        revision = found[0].mod_revision if found else 0
        if found and found[0].value == operation_id:
            # An earlier attempt of this very commit was applied.
            self._operation_revision = revision
            return CommitResult(True, revision)
        if revision != self._operation_revision:
            self._operation_revision = revision
            return None
        return CommitResult(False, answer.header.revision)

    async def grant(self, ttl_s: float, *, timeout_s: float = 5.0) -> EtcdLease:
        sent = time.monotonic()
        request = rpc.LeaseGrantRequest(ttl=max(1, round(ttl_s)))
        try:
            answer = await self.connection.read(
                "/etcdserverpb.Lease/LeaseGrant", request, rpc.LeaseGrantResponse, timeout_s
            )
        except StoreCallError as error:
            raise translate(error) from error
        # A grant that was applied but not answered expires by itself.
        return EtcdLease(self.connection, answer.id, float(answer.ttl), sent)

    async def lease_left_s(self, lease_id: int, *, timeout_s: float = 2.0) -> float:
        try:
            answer = await self.connection.read(
                "/etcdserverpb.Lease/LeaseTimeToLive",
                rpc.LeaseTimeToLiveRequest(id=lease_id),
                rpc.LeaseTimeToLiveResponse,
                timeout_s,
            )
        except StoreCallError as error:
            raise translate(error) from error
        return float(answer.ttl)

    async def server_version(self) -> str:
        return await self.connection.server_version()

    async def compact(self, revision: int, *, timeout_s: float = 5.0) -> None:
        """Forget history up to a revision; etcd's own auto-compaction is the usual way."""
        request = rpc.CompactionRequest(revision=revision, physical=True)
        try:
            await self.connection.read(
                "/etcdserverpb.KV/Compact", request, rpc.CompactionResponse, timeout_s
            )
        except StoreCallError as error:
            raise translate(error) from error

    async def close(self) -> None:
        await self.connection.close()


def _operation_id(transaction: Transaction) -> bytes:
    """A new operation id; behind it the first compare, so that history tells terms apart.

    A leader's first compare is its fence: the version of the leader's record that it put itself.
    """
    fence = "".join(f"{found.key}={found.mod_revision}" for found in transaction.compares[:1])
    return secrets.token_bytes(OPERATION_ID_BYTES) + fence.encode()


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with this prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def translate(error: StoreCallError) -> RaddleError:
    """What an answer of etcd means to us."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TemporaryError(
            Reason.STORE_FULL,
            f"etcd refuses writes ({error.message}): compact, defragment, disarm the alarm.",
            retry_after_s=5.0,
        )
    if error.refused:
        return PermanentError(Reason.PERMISSION_DENIED, f"etcd refuses: {error.message}.")
    if error.code is grpc.StatusCode.NOT_FOUND:
        return PermanentError(Reason.NOT_FOUND, f"etcd: {error.message}.")
    if error.code is grpc.StatusCode.OUT_OF_RANGE:
        return PermanentError(Reason.COMPACTED, f"etcd: {error.message}.")
    return PermanentError(Reason.INVALID_ARGUMENT, f"etcd: {error.message}.")
