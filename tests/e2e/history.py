"""Who wrote what, from etcd's own history."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from raddle.model import keys
from raddle.model.incident import LeaderRecord
from raddle.store.etcd.store import EtcdStore
from raddle.wire import records as codec

_OWN = (keys.AGENTS, keys.LEADER, keys.OPERATIONS)


async def assert_one_writer(endpoints: str) -> list[str]:
    """Every leader's record was written by who led at that revision; gives the terms' leaders.

    A commit writes its author's operation key in the same revision, so the history names authors.
    """
    store = EtcdStore(endpoints.split(","), "default", operation_key="operations/reader")
    last = (await store.list("")).revision
    by_revision: dict[int, dict[str, bytes]] = defaultdict(dict)
    async with asyncio.timeout(20):
        async for changes in store.watch("", from_revision=1):
            for change in changes.changes:
                value = change.record.value if change.record else b""
                by_revision[change.mod_revision][change.key] = value
            if changes.revision >= last:
                break
    await store.close()
    leader = ""
    terms = []
    for revision in sorted(by_revision):
        written = by_revision[revision]
        authors = [
            key.removeprefix(keys.OPERATIONS) for key in written if key.startswith(keys.OPERATIONS)
        ]
        decided = [key for key in written if not key.startswith(_OWN)]
        if decided:
            assert authors == [leader], f"revision {revision}: {authors} wrote {decided[:3]}"
        if written.get(keys.LEADER):
            record: LeaderRecord = codec.decode(keys.LEADER, written[keys.LEADER])
            leader = record.identity
            terms.append(leader)
    return terms
