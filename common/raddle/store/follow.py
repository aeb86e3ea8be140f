"""One prefix of a store, followed without end: first all of it, then every change.

When the history behind a watch is gone (compacted, or the store was restored from an older
state), the prefix is listed anew at one revision and the
difference is told as changes: a follower never has to know.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import structlog

from raddle.model.errors import PermanentError, Reason
from raddle.store.protocol import Change, Changes, Record, Snapshot, Store

log = structlog.get_logger()


async def follow(store: Store, prefix: str) -> AsyncIterator[Snapshot | Changes]:
    """A `Snapshot`, then `Changes` for ever.

    Raises:
        TemporaryError: the first list did not succeed.
        PermanentError: PERMISSION_DENIED.
    """
    snapshot = await store.list(prefix, timeout_s=10.0)
    known = {record.key: record for record in snapshot.records}
    revision = snapshot.revision
    yield snapshot
    while True:
        try:
            async for changes in store.watch(prefix, from_revision=revision + 1):
                _apply(known, changes)
                revision = changes.revision
                yield changes
        except PermanentError as error:
            if error.reason is not Reason.COMPACTED:
                raise
        fresh = await store.list(prefix, timeout_s=30.0)
        set_back = fresh.revision < revision
        log.info("listed anew", prefix=prefix, revision=fresh.revision, set_back=set_back)
        changes = replace(_difference(known, fresh), set_back=set_back)
        _apply(known, changes)
        revision = fresh.revision
        if changes.changes:
            yield changes


async def follow_key(store: Store, key: str) -> AsyncIterator[bytes | None]:
    """One key's value without end: as it is now, then after each change; None while absent.

    Raises what `follow` raises.
    """
    async for item in follow(store, key):
        if isinstance(item, Snapshot):
            yield next((r.value for r in item.records if r.key == key), None)
            continue
        for change in item.changes:
            if change.key == key:
                yield change.record.value if change.record is not None else None


def _apply(known: dict[str, Record], changes: Changes) -> None:
    for change in changes.changes:
        if change.record is None:
            known.pop(change.key, None)
        else:
            known[change.key] = change.record


def _difference(known: dict[str, Record], fresh: Snapshot) -> Changes:
    now = {record.key: record for record in fresh.records}
    gone = [Change(key, None, fresh.revision) for key in sorted(known) if key not in now]
    new = [
        Change(key, record, record.mod_revision)
        for key, record in now.items()
        if known.get(key) is None or known[key].mod_revision != record.mod_revision
    ]
    return Changes(fresh.revision, (*gone, *new))
