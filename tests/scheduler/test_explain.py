"""Stories from records alone: of parts of the machine, of incidents, of jobs that wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from raddle.machines import load_machine
from raddle.model import keys
from raddle.model.errors import PermanentError, Reason
from raddle.model.health import ActiveFault, AgentHealth, AgentRegistration, FaultLevel, Hold
from raddle.model.incident import Incident, IncidentFault, InstancePlan, JobPlan
from raddle.model.job import Job, NameRecord
from raddle.model.kinds import FaultKind, HoldKind, RecoveryKind
from raddle.model.types import Why
from raddle.scheduler import inventory
from raddle.scheduler.explain import explain
from raddle.scheduler.mirror import Mirror
from tests.core.machines import make_spec

NODE = "sn0/n07"


class Records:
    """Records that are read like a mirror's."""

    def __init__(self, records: Mapping[str, Any]) -> None:
        self._records = dict(records)

    def get(self, key: str) -> Any:
        return self._records.get(key)

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        return ((k, v) for k, v in sorted(self._records.items()) if k.startswith(prefix))


def mirror(**more: Any) -> Mirror:
    """A machine with one healthy node, and these records besides (`__` is `/`)."""
    records = {
        keys.supernode("sn0"): load_machine("cloudmatrix384"),
        keys.registration(NODE): AgentRegistration(node=NODE),
        keys.health(NODE): AgentHealth(node=NODE),
    }
    return cast("Mirror", Records(records | {k.replace("__", "/"): v for k, v in more.items()}))


def told(of: Mirror, subject: str, now: Why | None = None) -> tuple[Why, list[str]]:
    return explain(of, subject, lambda _: now)


@pytest.mark.parametrize(
    "subject",
    [
        "die/sn0/n07/npu3/die9",
        "die/sn0/n07/npu8/die0",
        "node/sn0/n48",
        "node/sn0/n007",
        "node/sn1/n07",
    ],
)
def test_what_is_no_part_has_no_story(subject: str) -> None:
    """A position that the machine does not have is never called healthy."""
    with pytest.raises(PermanentError, match="not part of the machine") as refused:
        told(mirror(), subject)
    assert refused.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("part", ["npu3/die1", "npu3", "npu7/die1"])
def test_a_part_is_healthy(part: str) -> None:
    """What no hold and no fault covers is healthy."""
    assert told(mirror(), f"die/{NODE}/{part}")[0].reason == "HEALTHY"


def hold(subject: str, kind: HoldKind) -> Hold:
    return Hold(subject=subject, kind=kind, reason=kind, message=f"{kind} it", created_by="me")


def test_all_holds_are_told() -> None:
    """A die under a drain and two cordons tells all three, the nearest and strongest first."""
    die = f"{NODE}/npu3/die1"
    holds = [hold("sn0", HoldKind.CORDON), hold(NODE, HoldKind.CORDON), hold(NODE, HoldKind.DRAIN)]
    found = mirror(**{keys.hold(h.subject, h.kind): h for h in holds})
    why, story = told(found, f"die/{die}")
    assert why == Why(reason="DRAIN", message="DRAIN it")
    assert [line.split(" by ")[0] for line in story] == [
        f"held: DRAIN on {NODE}",
        f"held: CORDON on {NODE}",
        "held: CORDON on sn0",
    ]
    status = next(d for d in inventory.dies(found, NODE) if d.die == die)
    assert status.hold == "DRAIN"
    assert [h.kind for h in status.holds] == ["DRAIN", "CORDON", "CORDON"]


def test_a_hold_of_older_releases_is_told() -> None:
    """A hold under the key that older releases used is read like any other."""
    found = mirror(**{keys.only_hold(NODE): hold(NODE, HoldKind.CORDON)})
    assert told(found, f"node/{NODE}")[0].reason == "CORDON"


def test_a_fault_of_the_node_is_one_of_its_dies() -> None:
    """Faults are told of what they are on, of its parts and of what it is part of, no other."""
    fault = ActiveFault(code="F1", subject=f"{NODE}/npu1", level=FaultLevel.SEPARATE_NPU)
    health = AgentHealth(node=NODE, active_faults=(fault,))
    found = mirror(**{keys.health(NODE): health})
    reasons = {
        part: told(found, f"die/{NODE}{part}")[0].reason for part in ("", "/npu1/die0", "/npu2")
    }
    assert reasons == {"": "FAULT", "/npu1/die0": "FAULT", "/npu2": "HEALTHY"}


def test_equal_lines_are_one() -> None:
    """The loss of a whole machine is a few lines: equal ones name some parts and count the rest."""
    dies = load_machine("cloudmatrix384").die_position
    faults = tuple(
        IncidentFault(kind=FaultKind.NODE_LOST, subject=dies(n), message="the rack lost power")
        for n in range(520)
    )
    part = InstancePlan(role="decode", option=RecoveryKind.RESTART, lost_ranks=tuple(range(320)))
    plan = JobPlan(job_uid="j-1", epoch=2, instances=(part,))
    record = Incident(id="i-1", faults=faults, plans=(plan,), why=Why(reason="R", message="m"))
    _, story = told(mirror(**{keys.incident("i-1"): record}), "incident/i-1")
    assert len(story) == 3
    assert story[0].startswith(f"NODE_LOST: the rack lost power ({dies(0)}, {dies(1)}, ")
    assert story[0].endswith("and 512 more)")
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 312 more are lost" in story[2]


def test_different_faults_keep_their_order() -> None:
    """Faults with words of their own stay apart, in the order in which they came."""
    faults = tuple(
        IncidentFault(kind=FaultKind.RANK_EXITED, subject=f"d{n}", message=f"exit {n % 2}")
        for n in range(4)
    )
    record = Incident(id="i-1", faults=faults, why=Why(reason="R", message="m"))
    _, story = told(mirror(**{keys.incident("i-1"): record}), "incident/i-1")
    assert story == ["RANK_EXITED: exit 0 (d0, d2)", "RANK_EXITED: exit 1 (d1, d3)"]


@pytest.mark.parametrize("subject", ["job/j-1", "job/team-a/job"])
def test_a_waiting_job_tells_the_newest_numbers(subject: str) -> None:
    """What the leader knows now goes before what the job's record says."""
    job = Job(uid="j-1", spec=make_spec(), why=Why(reason="W", message="4 are free"))
    found = mirror(**{keys.job("j-1"): job, keys.name("team-a", "job"): NameRecord(job_uid="j-1")})
    now = Why(reason="W", message="5 are free")
    assert told(found, subject, now)[0] == now
    assert told(found, subject)[0] == job.why


def test_what_became_of_sequences_is_told_beside_the_prediction() -> None:
    """Predicted times first stand alone; when the sequences are back, what it took is told."""
    part = InstancePlan(
        role="decode",
        option=RecoveryKind.REMAP,
        sequences_restored=2,
        sequences_given_up=1,
        kv_median_predicted=0.1,
        kv_last_predicted=0.25,
    )

    def story(of: InstancePlan) -> list[str]:
        plan = JobPlan(job_uid="j-1", epoch=2, instances=(of,))
        record = Incident(id="i-1", plans=(plan,), why=Why(reason="R", message="m"))
        return told(mirror(**{keys.incident("i-1"): record}), "incident/i-1")[1]

    before = story(part)
    assert "  1 sequences are given up: their time is over" in before
    assert before[-1] == (
        "  sequences make tokens again: half not yet, or nobody saw it (0.100 s predicted),"
        " all not yet, or nobody saw it (0.250 s predicted)"
    )
    after = story(replace(part, kv_median_actual=0.12, kv_last_actual=0.3))
    assert after[-1] == (
        "  sequences make tokens again: half after 0.120 s (0.100 s predicted),"
        " all after 0.300 s (0.250 s predicted)"
    )
