"""The mirror against a store that is cut off, raced and set back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from raddle.core.instructions import Write
from raddle.model import keys
from raddle.model.health import AgentAcks, AgentHealth, Hold
from raddle.model.kinds import HoldKind
from raddle.scheduler.mirror import Mirror
from raddle.store.memory import MemoryBackend, MemoryStore
from raddle.store.protocol import Delete, Put, Transaction
from raddle.wire import records as wire
from tests.support import eventually


def hold(reason: str = "") -> Hold:
    return Hold(subject="sn0/n00", kind=HoldKind.CORDON, reason=reason)


def key(name: str) -> str:
    return f"{keys.HOLDS}sn0/{name}"


class Writer:
    """Another client of the same store."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend

    def put(self, name: str, reason: str = "") -> int:
        value = wire.encode(key(name), hold(reason))
        return self.backend.commit(Transaction(writes=(Put(key(name), value),))).revision

    def delete(self, name: str) -> int:
        return self.backend.commit(Transaction(writes=(Delete(key(name)),))).revision


class State:
    """What the backend held at one moment, to be restored."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.revision = backend.revision
        self.records = dict(backend.records)
        self.history = list(backend.history)

    def restore(self, backend: MemoryBackend) -> None:
        backend.revision = self.revision
        backend.records = dict(self.records)
        backend.history = list(self.history)


class Gate:
    """A store's delay that can be held: calls have been carried out, their answers wait."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0

    async def __call__(self) -> None:
        self.waiting += 1
        await self._open.wait()
        self.waiting -= 1

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def writer(backend: MemoryBackend) -> Writer:
    return Writer(backend)


@pytest.fixture
def store(backend: MemoryBackend) -> MemoryStore:
    return MemoryStore(backend)


@pytest.fixture
async def mirror(store: MemoryStore) -> AsyncIterator[Mirror]:
    mirror = Mirror(store)
    running = asyncio.create_task(mirror.run())
    yield mirror
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_what_a_cut_off_mirror_missed_is_read(
    mirror: Mirror, writer: Writer, store: MemoryStore
) -> None:
    """Puts and deletions behind a cut are there afterwards; nothing was set back."""
    writer.put("a")
    await mirror.wait_revision(writer.put("b"))
    store.cut()
    writer.delete("a")
    revision = writer.put("c")
    assert sorted(mirror.records()) == [key("a"), key("b")]
    store.mend()
    await mirror.wait_revision(revision)
    assert sorted(mirror.records()) == [key("b"), key("c")]
    assert mirror.set_backs == 0


@pytest.mark.parametrize("overtakes", [False, True])
async def test_a_store_that_was_set_back_is_the_truth(
    mirror: Mirror, writer: Writer, store: MemoryStore, overtakes: bool
) -> None:
    """What was forgotten goes, what is old again comes back, even if revisions overtook ours."""
    writer.put("a", "old")
    await mirror.wait_revision(writer.put("kept"))
    state = State(writer.backend)
    writer.put("a", "new")
    last = writer.put("forgotten")
    await mirror.wait_revision(last)
    told = []
    mirror.listen(lambda key, value, _revision: told.append((key, value)))
    store.cut()
    state.restore(writer.backend)
    for _ in range(5 if overtakes else 0):
        writer.put("b")
    store.mend()
    await eventually(lambda: mirror.set_backs == 1, "the mirror sees it")
    assert mirror.get(key("a")) == hold("old")
    assert mirror.get(key("forgotten")) is None
    assert mirror.revision == writer.backend.revision
    assert (key("forgotten"), None) in told
    assert (key("a"), hold("old")) in told
    await mirror.wait_revision(writer.put("a", "newest"))
    assert mirror.get(key("a")) == hold("newest")


async def test_our_own_commit_that_the_store_forgot_is_forgotten(
    mirror: Mirror, writer: Writer, store: MemoryStore
) -> None:
    """A commit whose echo never came does not survive the store it was made in."""
    await mirror.wait_revision(writer.put("a", "old"))
    state = State(writer.backend)
    store.cut()
    mirror.apply_own((Write(key("a"), hold("own")),), writer.put("a", "own"))
    state.restore(writer.backend)
    store.mend()
    await eventually(lambda: mirror.set_backs == 1, "the mirror sees it")
    assert mirror.get(key("a")) == hold("old")
    assert mirror.mod_revision(key("a")) == state.revision


async def test_a_list_under_way_undoes_nothing_newer(backend: MemoryBackend) -> None:
    """Own commits that overtake a list of before are kept, and nothing is doubted."""
    gate = Gate()
    mirror = Mirror(MemoryStore(backend, delay=gate))
    writer = Writer(backend)
    for name in ("deleted", "put"):
        writer.put(name, "old")
    await mirror.refresh()
    gate.close()
    refresh = asyncio.create_task(mirror.refresh())
    await eventually(lambda: gate.waiting == 1, "the list is asked for")
    gate.open()
    await eventually(lambda: gate.waiting == 0, "the list is read")
    mirror.apply_own((Write(key("put"), hold("own")),), writer.put("put", "own"))
    mirror.apply_own((Write(key("deleted"), None),), writer.delete("deleted"))
    await refresh
    assert mirror.records() == {key("put"): hold("own")}
    assert mirror.set_backs == 0


async def test_a_record_that_speaks_of_another_node_is_set_aside(
    mirror: Mirror, writer: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    """What n01's agent writes of n05 is nobody's word: set aside, logged with key and body."""
    name = keys.acks("sn0/n01", "j-1")
    foreign = AgentAcks(node="sn0/n05", job_uid="j-2")
    put = Put(name, wire.encode(name, foreign))
    await mirror.wait_revision(writer.backend.commit(Transaction(writes=(put,))).revision)
    assert mirror.records() == {}
    assert list(mirror.set_aside) == [name]
    log = capsys.readouterr().out
    assert "record set aside" in log
    assert name in log
    assert keys.acks("sn0/n05", "j-2") in log


async def test_the_end_of_a_record_that_was_set_aside_is_told(
    mirror: Mirror, writer: Writer
) -> None:
    """An agent's lease ends for the leader too if the last report under it could not be read."""
    name = keys.health("sn0/n01")
    told = []
    mirror.listen(lambda key, value, _revision: told.append((key, value)))
    own = AgentHealth(node="sn0/n01")
    for value in (wire.encode(name, own), b"\xff\xff"):
        writer.backend.commit(Transaction(writes=(Put(name, value),)))
    ended = writer.backend.commit(Transaction(writes=(Delete(name),))).revision
    await mirror.wait_revision(ended)
    assert told == [(name, own), (name, None)]
    assert mirror.set_aside == {}
