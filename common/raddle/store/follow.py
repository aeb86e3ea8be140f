"""One prefix of a store, followed without end: all of it, then every change.

A connection that broke may have led back to another store: one restored from an older state, whose
revisions may even have overtaken ours meanwhile. So all of it is told anew after every break, and
likewise when the history behind a watch is compacted. Who follows takes each `Snapshot` as the
truth.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog

from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.store.protocol import Changes, Snapshot, Store

_LIST_TIMEOUT_S = 10.0
_RETRY_S = 0.2
log = structlog.get_logger()


async def follow(store: Store, prefix: str) -> AsyncGenerator[Snapshot | Changes, None]:
    """A `Snapshot`, then `Changes` for ever, with a new `Snapshot` wherever a gap may be.

    Raises:
        TemporaryError: the first list did not succeed.
        PermanentError: PERMISSION_DENIED.
    """
    snapshot = await store.list(prefix, timeout_s=_LIST_TIMEOUT_S)
    while True:
        yield snapshot
        async for changes in unbroken(store, prefix, snapshot.revision):
            yield changes
        snapshot = await _list_again(store, prefix)
        log.info("listed anew", prefix=prefix, revision=snapshot.revision)


async def unbroken(store: Store, prefix: str, revision: int) -> AsyncGenerator[Changes, None]:
    """Changes after a revision, for as long as nothing can have been missed.

    Raises:
        PermanentError: PERMISSION_DENIED.
    """
    try:
        async with aclosing(store.watch(prefix, from_revision=revision + 1)) as watch:
            async for changes in watch:
                if changes.resumed:
                    return
                yield changes
    except PermanentError as error:
        if error.reason is not Reason.COMPACTED:
            raise


async def _list_again(store: Store, prefix: str) -> Snapshot:
    while True:
        try:
            return await store.list(prefix, timeout_s=_LIST_TIMEOUT_S)
        except TemporaryError as error:
            log.warning("cannot list anew; the store is away", prefix=prefix, why=str(error))
            await asyncio.sleep(_RETRY_S)


async def follow_key(store: Store, key: str) -> AsyncGenerator[bytes | None, None]:
    """One key's value without end: as it is now, then after each change; None while absent.

    Raises what `follow` raises.
    """
    last: bytes | None = None
    is_first = True
    async for item in follow(store, key):
        if isinstance(item, Snapshot):
            value = next((r.value for r in item.records if r.key == key), None)
            if is_first or value != last:
                yield value
            last, is_first = value, False
            continue
        for change in item.changes:
            if change.key == key:
                last = change.record.value if change.record is not None else None
                yield last
