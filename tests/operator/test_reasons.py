"""Reasons that conditions and Events may have: one list, one spelling."""

from __future__ import annotations

import re

import pytest

from raddle.model.errors import Reason
from raddle.model.kinds import RecoveryKind
from raddle.model.reasons import Code, Decision
from raddle.operator.reasons import (
    LISTED,
    LISTS,
    EventReason,
    OperatorReason,
    PodReason,
    camel,
    named,
)
from tests.support import ROOT

#: What the API server takes as the reason of a condition.
ALLOWED = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")


def test_no_list_of_reasons_is_left_out() -> None:
    """A condition takes a `Code`, and every kind of `Code` is in the list or of Events."""
    assert set(Code.__subclasses__()) == {*LISTS, EventReason}


def test_every_reason_is_listed_once_and_explained() -> None:
    """No two have one spelling, and each has its sentence in the reference."""
    assert len(LISTED) == sum(len(codes) for codes in LISTS)
    assert len({camel(reason) for reason in LISTED.values()}) == len(LISTED)
    reference = (ROOT / "docs" / "reference" / "reasons.md").read_text()
    for reason in (*LISTED.values(), *EventReason):
        assert ALLOWED.fullmatch(camel(reason)), reason
        assert reason.meaning.endswith("."), reason
        assert f"| `{camel(reason)}` | {reason.meaning} |" in reference, reason


@pytest.mark.parametrize(
    ("reason", "spelt"),
    [
        (Decision.WAITS_FOR_TURN, "WaitsForTurn"),
        (Decision.READY, "Ready"),
        (RecoveryKind.HOT_SPARE, "HotSpare"),
        (Reason.DOES_NOT_FIT, "DoesNotFit"),
        (PodReason.OOM_KILLED, "OOMKilled"),
        (EventReason.NOT_READY, "NotReady"),
    ],
)
def test_reasons_are_spelt_as_kubernetes_does(reason: Code, spelt: str) -> None:
    """Codes become words, and Kubernetes' own words stay as they are."""
    assert camel(reason) == spelt


def test_a_reason_of_no_list_goes_into_the_sentence() -> None:
    """A newer scheduler or kubelet may say what nobody here knows: it is not lost."""
    assert named("REMAP", "m") == (RecoveryKind.REMAP, "m")
    assert named("", "m") == (OperatorReason.UNKNOWN, "m")
    assert named("NEWER", "m") == (OperatorReason.UNKNOWN, "NEWER: m")
    word = "OutOfhuawei.com/Ascend910"
    said = (PodReason.POD_FAILED, f"{word}: m")
    assert named(word, "m", PodReason.POD_FAILED) == said
