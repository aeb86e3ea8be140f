"""One suite over every store: what the protocol promises holds for memory and both etcds.

etcd 3.5.1 is here because `raddle up` falls back to it where nothing newer is found. It has faults
that this suite cannot show, since nothing is killed or stopped here, and that no client can mend:
it acknowledges writes before they are in its log, so a SIGKILL may lose them (mended in 3.5.5); its
members may come to differ after a crash (3.5.3); a leader that wakes from a stop revokes leases
that its successor keeps alive, and a watch may lose an event to a compaction (both 3.5.13). So
`Connection.server_version` warns of every etcd before 3.5.13, and the embedded server of its own.
One more the client does handle: before 3.5.8 an answer to a request for progress may carry a
revision whose events are still to come, so such an answer never moves a watch, it is a sign of life
alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from raddle.model.errors import PermanentError, Reason
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.etcd.store import EtcdStore
from raddle.store.follow import follow
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import (
    Change,
    Changes,
    Compare,
    Delete,
    Put,
    Snapshot,
    Store,
    Transaction,
)
from tests.support import built_etcd, development_etcd

MakeStore = Callable[[], Store]


@pytest.fixture(params=["memory", "etcd-3.7.3", "etcd-3.5.1"])
async def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[MakeStore]:
    made: list[Store] = []
    if request.param == "memory":
        backend = MemoryBackend()

        def make() -> Store:
            made.append(MemoryStore(backend))
            return made[-1]

        yield make
        for store in made:
            await store.close()
        return
    binary = built_etcd() if request.param == "etcd-3.7.3" else development_etcd()
    server = EmbeddedEtcd(tmp_path / "etcd", binary=binary)
    await server.start()

    def make_etcd() -> Store:
        key = f"operations/{len(made)}"
        made.append(EtcdStore([server.endpoint], "test", operation_key=key))
        return made[-1]

    yield make_etcd
    for store in made:
        await store.close()
    await server.stop()


def put(key: str, value: bytes, mod_revision: int | None = None, lease_id: int = 0) -> Transaction:
    compares = () if mod_revision is None else (Compare(key, mod_revision),)
    return Transaction(compares=compares, writes=(Put(key, value, lease_id),))


async def take(stream: AsyncIterator[Changes | Snapshot], count: int) -> list[Change]:
    """The next `count` changes of a stream."""
    found: list[Change] = []
    while len(found) < count:
        item = await asyncio.wait_for(anext(stream), 10)
        assert isinstance(item, Changes)
        found += item.changes
    return found


async def test_put_get_and_delete(make_store: MakeStore) -> None:
    """A put is read back with its revisions, and a delete takes it away."""
    store = make_store()
    first = await store.commit(put("a", b"1"))
    second = await store.commit(put("a", b"2"))
    record = await store.get("a")
    assert record is not None
    assert (record.key, record.value) == ("a", b"2")
    assert (record.create_revision, record.mod_revision) == (first.revision, second.revision)
    assert (await store.commit(Transaction(writes=(Delete("a"),)))).succeeded
    assert await store.get("a") is None


async def test_a_failed_compare_writes_nothing(make_store: MakeStore) -> None:
    """All or nothing: one wrong revision and no key changes."""
    store = make_store()
    revision = (await store.commit(put("a", b"1", 0))).revision
    refused = await store.commit(
        Transaction(
            compares=(Compare("a", revision), Compare("b", 99)),
            writes=(Put("a", b"2"), Put("b", b"2")),
        )
    )
    assert not refused.succeeded
    record = await store.get("a")
    assert record is not None
    assert record.value == b"1"
    assert await store.get("b") is None
    assert (await store.commit(put("a", b"2", revision))).succeeded


async def test_only_one_of_two_rivals_wins(make_store: MakeStore) -> None:
    """Two clients that compare with the same revision cannot both write."""
    one, two = make_store(), make_store()
    results = await asyncio.gather(one.commit(put("k", b"1", 0)), two.commit(put("k", b"2", 0)))
    assert sorted(result.succeeded for result in results) == [False, True]


async def test_list_is_sorted_and_of_one_prefix(make_store: MakeStore) -> None:
    """A list gives exactly the keys under the prefix, in order."""
    store = make_store()
    for key in ("x/2", "x/1", "x10", "y/1", "x/10"):
        await store.commit(put(key, key.encode()))
    snapshot = await store.list("x/")
    assert [record.key for record in snapshot.records] == ["x/1", "x/10", "x/2"]


async def test_watch_tells_each_change_once_in_order(make_store: MakeStore) -> None:
    """A watch from a revision sees history and news, each change once, whole revisions."""
    store, other = make_store(), make_store()
    start = (await store.commit(put("w/a", b"0"))).revision
    for number in range(5):
        await other.commit(
            Transaction(writes=(Put("w/a", str(number).encode()), Put("w/b", b""), Put("z", b"")))
        )
    stream = store.watch("w/", from_revision=start + 1)
    seen = await take(stream, 10)
    assert [c.record.value for c in seen if c.record and c.key == "w/a"] == [
        str(n).encode() for n in range(5)
    ]
    assert [c.mod_revision for c in seen] == sorted(c.mod_revision for c in seen)
    await other.commit(Transaction(writes=(Delete("w/a"),)))
    (gone,) = await take(stream, 1)
    assert (gone.key, gone.record) == ("w/a", None)


async def test_a_compacted_watch_says_so(make_store: MakeStore) -> None:
    """A watch below the compacted revision ends with COMPACTED and the revision."""
    store = make_store()
    revision = 0
    for number in range(5):
        revision = (await store.commit(put("k", str(number).encode()))).revision
    await compact(store, revision)
    with pytest.raises(PermanentError) as caught:
        await take(store.watch("k", from_revision=2), 1)
    assert caught.value.reason is Reason.COMPACTED
    assert int(caught.value.details["compact_revision"]) >= revision


async def compact(store: Store, revision: int) -> None:
    if isinstance(store, MemoryStore):
        store.backend.compact(revision)
    else:
        assert isinstance(store, EtcdStore)
        await store.compact(revision)


async def test_follow_begins_with_a_snapshot(make_store: MakeStore) -> None:
    """Following a prefix gives all of it, then the changes after it."""
    store = make_store()
    await store.commit(put("f/a", b"1"))
    stream = follow(store, "f/")
    snapshot = await anext(stream)
    assert isinstance(snapshot, Snapshot)
    assert [record.key for record in snapshot.records] == ["f/a"]
    await store.commit(put("f/b", b"2"))
    (change,) = await take(stream, 1)
    assert change.key == "f/b"


async def test_a_revoked_lease_takes_its_keys(make_store: MakeStore) -> None:
    """Keys under a lease vanish with it, and a watch tells the deletion."""
    store = make_store()
    lease = await store.grant(5)
    assert lease.alive
    revision = (await store.commit(put("l", b"1", lease_id=lease.lease_id))).revision
    await lease.revoke()
    (change,) = await take(store.watch("l", from_revision=revision + 1), 1)
    assert change.record is None
    assert await store.get("l") is None


async def test_what_is_left_of_a_lease_is_told(make_store: MakeStore) -> None:
    """Of anybody's lease, rounded down at most to a whole second; negative once it is gone."""
    owner, other = make_store(), make_store()
    lease = await owner.grant(5)
    assert 3.0 <= await other.lease_left_s(lease.lease_id) <= 5.0
    await lease.revoke()
    assert await other.lease_left_s(lease.lease_id) < 0.0


async def test_a_put_under_a_lost_lease_is_refused(make_store: MakeStore) -> None:
    """A key can't be put under a lease that ended."""
    store = make_store()
    lease = await store.grant(5)
    await lease.revoke()
    with pytest.raises(PermanentError) as caught:
        await store.commit(put("l", b"1", lease_id=lease.lease_id))
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    "transaction",
    [
        Transaction(writes=tuple(Put(f"k{i}", b"") for i in range(129))),
        Transaction(writes=(Put("k", b"x" * 1_600_000),)),
        Transaction(writes=(Put("k", b"1"), Delete("k"))),
    ],
    ids=["too many operations", "too many bytes", "one key twice"],
)
async def test_what_etcd_would_refuse_is_refused_before(
    make_store: MakeStore, transaction: Transaction
) -> None:
    """Transactions above the limits fail with a clear error and write nothing."""
    store = make_store()
    with pytest.raises(PermanentError):
        await store.commit(transaction)
    assert (await store.list("k")).records == ()
