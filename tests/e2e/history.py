"""Who wrote what, and at which epochs, from etcd's own history."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from raddle.model import keys
from raddle.model.incident import LeaderRecord
from raddle.model.job import Assignment, Job
from raddle.store.etcd.store import OPERATION_ID_BYTES, EtcdStore
from raddle.wire import records as codec

_OWN = (keys.AGENTS, keys.LEADER, keys.OPERATIONS)
#: Keys and values of one revision; None for a deletion.
Written = dict[str, bytes | None]


async def assert_one_writer(endpoints: str) -> list[str]:
    """Whose term it was wrote, and no epoch went back; gives the terms' leaders.

    A store that was restored from an older state has that state's history, and its own since.
    """
    reader = History()
    for revision, written in sorted((await _history(endpoints)).items()):
        reader.read(revision, written)
    return reader.terms


async def _history(endpoints: str) -> dict[int, Written]:
    store = EtcdStore(endpoints.split(","), "default", operation_key="operations/reader")
    last = (await store.list("")).revision
    by_revision: dict[int, Written] = defaultdict(dict)
    async with asyncio.timeout(20):
        async for changes in store.watch("", from_revision=1):
            for change in changes.changes:
                value = change.record.value if change.record else None
                by_revision[change.mod_revision][change.key] = value
            if changes.revision >= last:
                break
    await store.close()
    return by_revision


@dataclass(slots=True)
class History:
    """Reads revisions in order.

    A commit writes its author's operation key in the same revision, with the record of the leader
    that it was compared with: so the history names authors, and tells their terms apart.
    """

    terms: list[str] = field(default_factory=list)
    _leader: tuple[str, str] = ("", "")
    _epochs: dict[tuple[str, str], int] = field(default_factory=dict)

    def read(self, revision: int, written: Written) -> None:
        """Check one revision against those before it."""
        decided = [key for key in written if not key.startswith(_OWN)]
        if decided:
            authors = [_author(k, v) for k, v in written.items() if k.startswith(keys.OPERATIONS)]
            said = f"revision {revision}: {authors} wrote {decided[:3]}, {self._leader} led"
            assert authors == [self._leader], said
        for key, value in written.items():
            if value is not None and key.startswith((keys.JOBS, keys.ASSIGNMENTS)):
                self._read_epochs(revision, key, codec.decode(key, value))
        if keys.LEADER in written:
            self._begin_term(revision, written[keys.LEADER])

    def _begin_term(self, revision: int, value: bytes | None) -> None:
        if value is None:
            self._leader = ("", "")
            return
        record: LeaderRecord = codec.decode(keys.LEADER, value)
        self._leader = (record.identity, f"{keys.LEADER}={revision}")
        self.terms.append(record.identity)

    def _read_epochs(self, revision: int, key: str, record: Job | Assignment) -> None:
        for what, epoch in _epochs(record):
            before = self._epochs.get((key, what), 0)
            assert epoch >= before, f"revision {revision}: {key} {what} {epoch} after {before}"
            self._epochs[key, what] = epoch


def _author(key: str, mark: bytes | None) -> tuple[str, str]:
    """Who committed, and the version of the leader's record that the commit asked for."""
    return key.removeprefix(keys.OPERATIONS), (mark or b"")[OPERATION_ID_BYTES:].decode()


def _epochs(record: Any) -> list[tuple[str, int]]:
    if isinstance(record, Job):
        return [("epoch", record.epoch), ("live epoch", record.live_epoch)]
    return [(f"epoch of {item.job_uid}", item.epoch) for item in record.jobs]
