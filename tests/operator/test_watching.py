"""What the API server's watches tell, and what of it is worth work."""

from __future__ import annotations

from typing import Any, cast

import pytest

from raddle.operator.cluster import Cluster
from raddle.operator.operator import _Term, _watches
from raddle.operator.served import Served
from raddle.operator.watching import News
from raddle.operator.work import Item
from tests.operator.resources import inference_job

Object = dict[str, Any]


def changed(body: Object, **metadata: Any) -> Object:
    """The same object at another version."""
    version = {"resourceVersion": str(id(metadata)), "managedFields": [metadata]}
    return body | {"metadata": body["metadata"] | version | metadata}


def test_a_change_of_the_status_alone_is_no_news() -> None:
    """Our own words do not begin the work that wrote them; anything else does."""
    news, body = News(), inference_job()
    assert news.is_one(body, "")
    said = changed(body) | {"status": {"conditions": []}}
    assert not news.is_one(said, "MODIFIED")
    for metadata in (
        {"generation": 4},
        {"deletionTimestamp": "2026-01-01T00:00:00Z"},
        {"finalizers": ["raddle.dev/scheduler"]},
        {"annotations": {"a": "b"}},
        {"labels": {"a": "b"}},
    ):
        body = changed(body, **metadata)
        assert news.is_one(body, "MODIFIED")
        assert not news.is_one(changed(body), "MODIFIED")


def test_what_was_listed_made_or_deleted_is_news() -> None:
    """A new list may follow on changes that nobody told of."""
    news, body = News(), inference_job()
    for what in ("ADDED", "", "DELETED", "DELETED", "MODIFIED"):
        assert news.is_one(body, what)


class Term:
    """Says who was told."""

    def __init__(self, *supernodes: str) -> None:
        self.marks: list[Item] = []
        self.served = Served(cast("Cluster", None), supernodes)

    def told(self, kind: str, namespace: str, name: str) -> None:
        self.marks.append(Item(kind, namespace, name))


@pytest.mark.parametrize("number", range(4))
def test_each_kind_of_ours_marks_by_its_news(number: int) -> None:
    """Jobs, roles, supernodes and maintenances: the first word of each, and no status."""
    term = Term()
    watch = _watches(cast("_Term", term))[number]
    assert watch.group == "raddle.dev"
    body = inference_job() | {"spec": {"job": "demo", "subject": "sn0/n00"}}
    watch.mark(body, "ADDED")
    watch.mark(changed(body) | {"status": {"state": "READY"}}, "MODIFIED")
    assert len(term.marks) == 1
    watch.mark(changed(body, generation=9), "MODIFIED")
    assert len(term.marks) == 2


@pytest.mark.parametrize(("served", "marks"), [("sn0", 1), ("sn1", 0)])
def test_supernodes_and_maintenances_of_others_mark_nothing(served: str, marks: int) -> None:
    """A supernode is served by its name, a maintenance by that of its subject's supernode."""
    term = Term(served)
    _, _, supernodes, maintenances, *_ = _watches(cast("_Term", term))
    body = inference_job()
    supernodes.mark(body | {"metadata": body["metadata"] | {"name": "sn0"}}, "ADDED")
    assert len(term.marks) == marks
    maintenances.mark(body | {"spec": {"subject": "sn0/n00/npu1"}}, "ADDED")
    assert len(term.marks) == 2 * marks
