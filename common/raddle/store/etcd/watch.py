"""A watch that neither loses nor repeats an event, and never falls silent unnoticed.

It resumes at the last event's mod_revision + 1 (a header's revision would skip events of a batch
that is catching up), asks for a sign of life after 2 s of silence and moves to another member
when none comes. Only a compacted history or a refusal ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import structlog

from raddle.etcd.v1 import rpc_pb2 as rpc
from raddle.model.errors import PermanentError, Reason
from raddle.store.etcd.connection import Connection, StoreCallError, is_refusal, send
from raddle.store.protocol import Change, Changes, Record

SILENCE_S = 2.0
_RETRY_S = 0.05
log = structlog.get_logger()


async def watch_prefix(
    connection: Connection, key: bytes, end: bytes, from_revision: int, strip: int
) -> AsyncGenerator[Changes, None]:
    """Changes of a key range from a revision on; `strip` bytes of each key are left away.

    Each new connection is told by empty changes that say `resumed`.

    Raises:
        PermanentError: COMPACTED (details compact_revision) or PERMISSION_DENIED.
    """
    next_revision = from_revision
    resumed = False
    while True:
        endpoint = connection.endpoint
        stream = connection.stream("/etcdserverpb.Watch/Watch", rpc.WatchRequest, rpc.WatchResponse)
        pending: list[rpc.Event] = []
        try:
            create = rpc.WatchCreateRequest(
                key=key, range_end=end, start_revision=next_revision, fragment=True
            )
            async for response in _responses(stream, create):
                _raise_if_over(response)
                _raise_if_set_back(response, next_revision)
                if response.canceled:
                    log.info("etcd ended a watch; it is begun again", why=response.cancel_reason)
                    break
                if resumed and response.created:
                    yield Changes(next_revision - 1, (), response.header.raft_term, resumed=True)
                pending += response.events
                if response.fragment or not pending:
                    continue
                changes = _changes(pending, strip, response.header.raft_term)
                pending = []
                next_revision = changes.revision + 1
                yield changes
        except grpc.aio.AioRpcError as error:
            failure = StoreCallError(error.code(), error.details() or "")
            if failure.refused:
                raise _refused(failure.message) from error
        finally:
            stream.cancel()
        resumed = True
        connection.failed(endpoint)
        await asyncio.sleep(_RETRY_S)


async def _responses(
    stream: Any, create: rpc.WatchCreateRequest
) -> AsyncIterator[rpc.WatchResponse]:
    """Responses until the stream ends or stays silent after a request for a sign of life."""
    if not await send(stream, rpc.WatchRequest(create_request=create)):
        return
    asked = False
    reading = asyncio.ensure_future(stream.read())
    try:
        while True:
            done, _ = await asyncio.wait({reading}, timeout=SILENCE_S)
            if not done:
                if asked:
                    return
                asked = True
                sign = rpc.WatchRequest(progress_request=rpc.WatchProgressRequest())
                if not await send(stream, sign):
                    return
                continue
            response = reading.result()
            if response is grpc.aio.EOF:
                return
            asked = False
            yield response
            reading = asyncio.ensure_future(stream.read())
    finally:
        reading.cancel()


def _raise_if_over(response: rpc.WatchResponse) -> None:
    if response.compact_revision:
        raise PermanentError(
            Reason.COMPACTED,
            f"history before revision {response.compact_revision} is compacted",
            compact_revision=str(response.compact_revision),
        )
    if response.canceled and is_refusal(response.cancel_reason):
        # A refused watch is no RPC error: it is created and cancelled in one response.
        raise _refused(response.cancel_reason)


def _raise_if_set_back(response: rpc.WatchResponse, next_revision: int) -> None:
    """etcd was restored from an older snapshot: it would stay silent until it caught up."""
    if 0 < response.header.revision < next_revision - 1:
        raise PermanentError(
            Reason.COMPACTED,
            f"etcd is at revision {response.header.revision}, before {next_revision - 1}: it was"
            " set back to an older state",
            compact_revision=str(next_revision - 1),
        )


def _refused(message: str) -> PermanentError:
    return PermanentError(Reason.PERMISSION_DENIED, f"etcd refuses the watch: {message}.")


def _changes(events: list[rpc.Event], strip: int, term: int) -> Changes:
    found = []
    for event in events:
        kv = event.kv
        key = kv.key[strip:].decode()
        record = None
        if event.type == rpc.Event.PUT:
            record = Record(key, kv.value, kv.mod_revision, kv.create_revision, kv.lease)
        found.append(Change(key, record, kv.mod_revision))
    return Changes(events[-1].kv.mod_revision, tuple(found), term)
