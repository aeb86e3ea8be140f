"""What the reader of etcd's history lets pass and what it does not, on written histories."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raddle.model import keys
from raddle.model.incident import LeaderRecord
from raddle.model.job import Assignment, Job, JobAssignment
from raddle.store.etcd.store import OPERATION_ID_BYTES
from raddle.wire import records as codec
from tests.e2e.history import History, Written


def leads(identity: str) -> Written:
    return {keys.LEADER: codec.encode(keys.LEADER, LeaderRecord(identity=identity))}


def decided(identity: str, term: int, epoch: int = 1, live_epoch: int = 0) -> Written:
    """A commit of a term that began at this revision."""
    mark = bytes(OPERATION_ID_BYTES) + f"{keys.LEADER}={term}".encode()
    job = Job(uid="j", epoch=epoch, live_epoch=live_epoch)
    return {
        f"{keys.OPERATIONS}{identity}": mark,
        keys.job("j"): codec.encode(keys.job("j"), job),
    }


def assigned(identity: str, term: int, epoch: int) -> Written:
    key = keys.assignment("sn0/n00")
    record = Assignment(node="sn0/n00", jobs=(JobAssignment(job_uid="j", epoch=epoch),))
    written = decided(identity, term, epoch=9, live_epoch=9)
    return written | {key: codec.encode(key, record)}


def read(*history: Written) -> list[str]:
    reader = History()
    for revision, written in enumerate(history, 1):
        reader.read(revision, written)
    return reader.terms


def test_terms_of_one_leader_after_the_other_pass() -> None:
    """Each writes in its own term, and the same one may lead again."""
    history = (
        leads("a"),
        decided("a", 1),
        leads("b"),
        decided("b", 3, epoch=2, live_epoch=1),
        leads("a"),
        assigned("a", 5, epoch=9),
    )
    assert read(*history) == ["a", "b", "a"]


BAD: dict[str, Callable[[], list[str]]] = {
    "another one than who leads": lambda: read(leads("a"), decided("b", 1)),
    "nobody leads": lambda: read(leads("a"), {keys.LEADER: None}, decided("a", 1)),
    "its own earlier term": lambda: read(leads("a"), leads("b"), leads("a"), decided("a", 1)),
    "without a fence": lambda: read(leads("a"), decided("a", 0)),
    "an epoch back": lambda: read(leads("a"), decided("a", 1, 2), decided("a", 1, 1)),
    "a live epoch back": lambda: read(leads("a"), decided("a", 1, 2, 2), decided("a", 1, 2, 1)),
    "a node's epoch back": lambda: read(leads("a"), assigned("a", 1, 4), assigned("a", 1, 3)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_cluster_may_write_is_found(name: str) -> None:
    """A write of another term, even of the same scheduler, and an epoch that went back."""
    with pytest.raises(AssertionError, match="revision"):
        BAD[name]()
