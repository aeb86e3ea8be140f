"""Words that stored records use for kinds and states; the wire carries them as text."""

from __future__ import annotations

from enum import StrEnum

from raddle.model.reasons import Code


class RoleKind(StrEnum):
    """What the ranks of a role do."""

    PREFILL = "prefill"
    DECODE = "decode"
    CACHE = "cache"


class SeatState(StrEnum):
    """A rank's seat in a placement."""

    ACTIVE = "ACTIVE"
    # Held back for the job; may take a lost rank's place.
    SPARE = "SPARE"
    LOST = "LOST"
    DRAINED = "DRAINED"


class HoldKind(StrEnum):
    """Who forbids work."""

    CORDON = "CORDON"
    DRAIN = "DRAIN"
    FAULT = "FAULT"
    SEPARATION = "SEPARATION"


class RecoveryKind(Code):
    """Ways to recover one instance, in the order of what they disturb."""

    REMAP = "REMAP", "The ranks that are left go on: every expert has a live copy among them."
    DONOR_SLOT = (
        "DONOR_SLOT",
        "The ranks that are left go on, and load experts into spare slots.",
    )
    HOT_SPARE = "HOT_SPARE", "Spare dies take the places of lost ranks."
    RESTART = "RESTART", "New processes take the places of lost ranks, or the job is placed anew."
    RECONNECT = "RECONNECT", "Nobody is lost: the same members begin an epoch and connect again."


class FaultKind(Code):
    """What an incident is made of."""

    RANK_EXITED = "RANK_EXITED", "A rank's process ended or never came up."
    DIE_FAULT = "DIE_FAULT", "A die reports a fault that forbids work."
    NODE_LOST = "NODE_LOST", "A node's agent is silent, and none of its ranks answers."
    PEER_REPORTS = "PEER_REPORTS", "Peers lost their connections to a rank."
    DRAIN = "DRAIN", "The place is drained."


class NodeState(StrEnum):
    """What the leader believes of a node."""

    READY = "READY"
    # The agent fell silent; its ranks are being asked.
    SUSPECT = "SUSPECT"
    # The agent is silent but its ranks answer, or too many nodes fell silent at once: no new
    # work, nothing moves.
    UNKNOWN = "UNKNOWN"
    LOST = "LOST"
    ABSENT = "ABSENT"
