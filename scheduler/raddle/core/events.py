"""Everything that can happen to the decision core. Frozen values; the shell makes them.

Records come decoded; the machine never sees bytes. `now` is an argument of the door, never a
field of an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raddle.core.requests import Request
from raddle.model.routes import SequenceReport
from raddle.model.stats import RankStats


@dataclass(frozen=True, slots=True)
class RecordChanged:
    """An agent's record changed in the store; `value` is None for a deletion (an ended lease).

    Only keys under `agents/` arrive this way: all other keys are the machine's own writing.
    """

    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A user's request; answered by exactly one `Reply` with the same id."""

    request_id: str
    identity: str
    request: Request


@dataclass(frozen=True, slots=True)
class AgentStreamOpened:
    """The node's agent opened its stats stream to this leader."""

    node: str


@dataclass(frozen=True, slots=True)
class AgentStreamBroken:
    """The node's stats stream ended."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeProbed:
    """Answer to `ProbeNode`: did any of the node's ranks answer the leader's own call?"""

    node: str
    answered: bool
    #: Nodes, this one too, whose agents renew their leases no more, though these still run.
    quiet_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankProbed:
    """Answer to `ProbeRank`."""

    job_uid: str
    incarnation: str
    answered: bool


@dataclass(frozen=True, slots=True)
class StatsReported:
    """High-rate data of one node's ranks."""

    node: str
    job_uid: str
    reports: tuple[RankStats, ...]


@dataclass(frozen=True, slots=True)
class SequencesReported:
    """A front door's sequences: all of them (`snapshot`), or changes."""

    front_door_id: str
    job_uid: str
    snapshot: bool
    updated: tuple[SequenceReport, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FrontDoorLost:
    """A front door's stream ended; its sequences are nobody's until it returns."""

    front_door_id: str


@dataclass(frozen=True, slots=True)
class StoreLeaderChanged:
    """The store elected a new leader: leases that lapse within one TTL prove nothing."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A commit with this (non-empty) stimulus succeeded; told for the timeline of incidents."""

    stimulus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Woken:
    """The time asked for by `WakeAt` has come."""


Event = (
    RecordChanged
    | RequestReceived
    | AgentStreamOpened
    | AgentStreamBroken
    | NodeProbed
    | RankProbed
    | StatsReported
    | SequencesReported
    | FrontDoorLost
    | StoreLeaderChanged
    | Committed
    | Woken
)
