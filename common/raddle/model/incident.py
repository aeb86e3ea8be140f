"""Incidents, maintenance, events: what happened, what was decided, and why.

The same field names as in `proto/raddle/v1`; `raddle.wire.codec` turns one into the other.
Times are seconds since 1970 of the scheduler's clock, durations are seconds; 0 means not set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raddle.model.kinds import FaultKind, RecoveryKind
from raddle.model.types import RankKey, Why


class IncidentPhase(StrEnum):
    """Where a recovery stands."""

    UNSPECIFIED = "UNSPECIFIED"
    DETECT = "DETECT"
    DECIDE = "DECIDE"
    FENCE = "FENCE"
    REPAIR = "REPAIR"
    PUBLISH = "PUBLISH"
    CLOSED = "CLOSED"


class MaintenanceState(StrEnum):
    """Where a maintenance stands."""

    UNSPECIFIED = "UNSPECIFIED"
    DRAINING = "DRAINING"
    DRAINED = "DRAINED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentFault:
    """One thing that went wrong, as far as the scheduler can tell."""

    # RANK_EXITED, DIE_FAULT, NODE_LOST, PEER_REPORTS, DRAIN.
    kind: FaultKind
    # Position or rank.
    subject: str = ""
    code: str = ""
    message: str = ""
    job_uid: str = ""
    rank: RankKey = field(default_factory=RankKey)
    # Which start of the rank was lost.
    start_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryOption:
    """One candidate recovery of one instance, with its numbers; exactly one is chosen."""

    # REMAP, DONOR_SLOT, HOT_SPARE, RESTART.
    option: RecoveryKind
    feasible: bool = False
    chosen: bool = False
    why: Why = field(default_factory=Why)
    predicted_pause: float = 0.0
    experts_moved: int = 0
    bytes_moved: int = 0
    capacity_left: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlan:
    """What is done to one instance."""

    role: str = ""
    instance: int = 0
    option: RecoveryKind
    lost_ranks: tuple[int, ...] = ()
    considered: tuple[RecoveryOption, ...] = ()
    experts_moved: int = 0
    sequences_restored: int = 0
    kv_tokens_restored: int = 0
    kv_tokens_recomputed: int = 0
    why: Why = field(default_factory=Why)
    sequences_given_up: int = 0
    # When half and all of the sequences make tokens again, counted from the plan.
    kv_median_predicted: float = 0.0
    kv_last_predicted: float = 0.0
    # When half and all of them did make tokens again; 0 until all did, or when nobody saw it.
    kv_median_actual: float = 0.0
    kv_last_actual: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What is done to one job at one epoch."""

    job_uid: str = ""
    epoch: int = 0
    instances: tuple[InstancePlan, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEntry:
    """One entry of the timeline."""

    phase: IncidentPhase = IncidentPhase.UNSPECIFIED
    start_time: float = 0.0
    duration: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One root cause with all the faults that it explains.

    The unit of decision and the recovery journal. Stored under incidents/<id>.
    """

    id: str = ""
    # die, npu, node, rank.
    subject_kind: str = ""
    subject: str = ""
    phase: IncidentPhase = IncidentPhase.UNSPECIFIED
    faults: tuple[IncidentFault, ...] = ()
    plans: tuple[JobPlan, ...] = ()
    timeline: tuple[TimelineEntry, ...] = ()
    create_time: float = 0.0
    end_time: float = 0.0
    why: Why = field(default_factory=Why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Maintenance:
    """Planned work on a part of the machine; a drain is one. Stored under maintenance/<id>."""

    id: str = ""
    # A position of any level.
    subject: str = ""
    state: MaintenanceState = MaintenanceState.UNSPECIFIED
    why: Why = field(default_factory=Why)
    ranks_total: int = 0
    ranks_moved: int = 0
    deadline: float = 0.0
    created_by: str = ""
    create_time: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of history. Stored under audit/<id>; the newest 10,000 are kept."""

    id: str = ""
    time: float = 0.0
    # JOB_ACCEPTED, JOB_PLACED, JOB_READY, INCIDENT_OPENED, EPOCH_PUBLISHED, ...
    kind: str = ""
    subject: str = ""
    message: str = ""
    identity: str = ""
    epoch: int = 0
    incident_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderRecord:
    """Who leads. Stored under leader, put once a term under the leader's lease."""

    identity: str = ""
    address: str = ""
    version: str = ""
    # Names one process: another one at the same address is not the leader.
    incarnation: str = ""
