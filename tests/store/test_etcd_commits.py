"""Commits and reads of the etcd client: exactly once, at one revision, never without a deadline."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from raddle.model.errors import TemporaryError
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd import store as etcd_store
from raddle.store.etcd.store import EtcdStore
from raddle.store.protocol import Change, Compare, Delete, Put, Transaction
from tests.store.fake_etcd import Fate, Relay
from tests.support import built_etcd, end, eventually, prefer

AMBIGUOUS = (Fate.NOT_APPLIED, Fate.ANSWER_LOST)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedEtcd]:
    server = EmbeddedEtcd(tmp_path / "etcd", binary=built_etcd())
    await server.start()
    yield server
    await end(server)


@pytest.fixture
async def witness(server: EmbeddedEtcd) -> AsyncIterator[EtcdStore]:
    """A client that nothing stands in the way of."""
    store = EtcdStore([server.endpoint], "t", operation_key="operations/w")
    yield store
    await store.close()


def put(key: str, value: bytes = b"", *compares: Compare) -> Transaction:
    return Transaction(compares, (Put(key, value),))


async def history(store: EtcdStore, key: str) -> list[Change]:
    """All that ever happened to one key."""
    end = (await store.commit(put("the end"))).revision
    found: list[Change] = []
    async with asyncio.timeout(20):
        async for changes in store.watch("", from_revision=1):
            found += [change for change in changes.changes if change.key == key]
            if changes.revision >= end:
                break
    return found


async def test_a_commit_in_doubt_is_settled_exactly_once(
    server: EmbeddedEtcd, witness: EtcdStore
) -> None:
    """Applied or not, told or not: a commit is reported with the revision of its only change."""
    relay = Relay(server.endpoint)
    async with relay as endpoint:
        store = EtcdStore([endpoint], "t", operation_key="operations/c")
        fates = [*itertools.product(AMBIGUOUS), *itertools.product(AMBIGUOUS, repeat=2)]
        for number, fate in enumerate(fates):
            relay.fates.extend(fate)
            relay.transactions = 0
            result = await store.commit(put(f"k{number}"))
            assert result.succeeded
            assert relay.transactions == len(fate) + 1
            (change,) = await history(witness, f"k{number}")
            assert change.mod_revision == result.revision
        await store.close()


async def test_a_lost_race_in_doubt_is_a_lost_race(
    server: EmbeddedEtcd, witness: EtcdStore
) -> None:
    """A compare that fails is told as such when its first answer was lost, and nothing changes."""
    relay = Relay(server.endpoint)
    async with relay as endpoint:
        store = EtcdStore([endpoint], "t", operation_key="operations/c")
        await witness.commit(put("k", b"theirs"))
        for fate in AMBIGUOUS:
            relay.fates.append(fate)
            assert not (await store.commit(put("k", b"ours", Compare("k", 0)))).succeeded
        assert len(await history(witness, "k")) == 1
        await store.close()


async def test_an_attempt_that_comes_late_changes_nothing(
    server: EmbeddedEtcd, witness: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a commit was told as lost, an attempt of it that was stuck on its way is not applied."""
    monkeypatch.setattr(etcd_store, "ATTEMPT_TIMEOUT_S", 0.1)
    relay = Relay(server.endpoint)
    async with relay as endpoint:
        store = EtcdStore([endpoint], "t", operation_key="operations/c")
        await witness.commit(put("k", b"theirs"))
        relay.fates.append(Fate.HELD)
        assert not (await store.commit(put("k", b"ours", Compare("k", 0)))).succeeded
        await witness.commit(Transaction(writes=(Delete("k"),)))
        assert not (await relay.arrive_late()).succeeded
        assert await witness.get("k") is None
        await store.close()


async def test_an_attempt_that_comes_late_is_not_applied_again(
    server: EmbeddedEtcd, witness: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was stuck while its repetition succeeded does nothing any more."""
    monkeypatch.setattr(etcd_store, "ATTEMPT_TIMEOUT_S", 0.1)
    relay = Relay(server.endpoint)
    async with relay as endpoint:
        store = EtcdStore([endpoint], "t", operation_key="operations/c")
        relay.fates.append(Fate.HELD)
        result = await store.commit(put("k"))
        assert result.succeeded
        assert not (await relay.arrive_late()).succeeded
        (change,) = await history(witness, "k")
        assert change.mod_revision == result.revision
        await store.close()


async def test_a_commit_is_not_lost_to_an_earlier_one_that_comes_late(
    server: EmbeddedEtcd, witness: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that was given up in doubt and is applied under the next one costs it nothing."""
    monkeypatch.setattr(etcd_store, "ATTEMPT_TIMEOUT_S", 0.5)
    relay = Relay(server.endpoint)
    async with relay as endpoint:
        store = EtcdStore([endpoint], "t", operation_key="operations/c")
        relay.fates.extend((Fate.HELD, Fate.HELD))
        with pytest.raises(TemporaryError):
            await store.commit(put("given up"), timeout_s=0.1)
        following = asyncio.create_task(store.commit(put("following")))
        await eventually(lambda: relay.transactions == 2, "the next commit is under way")
        assert (await relay.arrive_late()).succeeded
        assert (await following).succeeded
        assert len(await history(witness, "given up")) == 1
        assert len(await history(witness, "following")) == 1
        await store.close()


async def test_a_member_that_never_answers_is_left(
    server: EmbeddedEtcd, witness: EtcdStore
) -> None:
    """Every attempt has a deadline of its own, after which another member is asked."""
    relay = Relay(server.endpoint)
    async with relay as endpoint, asyncio.timeout(20):
        store = EtcdStore([endpoint, server.endpoint], "t", operation_key="operations/c")
        prefer(store, endpoint)
        relay.fates.append(Fate.HELD)
        assert (await store.commit(put("k"), timeout_s=15.0)).succeeded
        assert store.connection.endpoint == server.endpoint
        await store.close()


async def test_all_pages_of_a_list_are_of_one_revision(
    witness: EtcdStore, server: EmbeddedEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What changes, vanishes and comes between two pages does not show in the list."""
    monkeypatch.setattr(etcd_store, "_PAGE", 2)
    for name in ("a", "b", "c", "d", "e"):
        await witness.commit(put(f"k/{name}", b"old"))
    before = await witness.list("k/")
    reader = EtcdStore([server.endpoint], "t", operation_key="operations/r")
    read = reader.connection.read
    pages = 0

    async def read_and_change(*arguments: Any) -> Any:
        nonlocal pages
        answer = await read(*arguments)
        if pages == 0:
            await witness.commit(
                Transaction(writes=(Put("k/d", b"new"), Delete("k/e"), Put("k/f", b"new")))
            )
        pages += 1
        return answer

    monkeypatch.setattr(reader.connection, "read", read_and_change)
    assert await reader.list("k/") == before
    assert pages == 3
    await reader.close()
