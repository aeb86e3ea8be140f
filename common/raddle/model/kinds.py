"""Words that stored records use for kinds and states; the wire carries them as text."""

from __future__ import annotations

from enum import StrEnum


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


class RecoveryKind(StrEnum):
    """Ways to recover one instance, in the order of what they disturb."""

    REMAP = "REMAP"
    DONOR_SLOT = "DONOR_SLOT"
    HOT_SPARE = "HOT_SPARE"
    RESTART = "RESTART"
    # Nobody is lost: the same members start a new epoch, connections are made again.
    RECONNECT = "RECONNECT"


class FaultKind(StrEnum):
    """What an incident is made of."""

    RANK_EXITED = "RANK_EXITED"
    DIE_FAULT = "DIE_FAULT"
    NODE_LOST = "NODE_LOST"
    PEER_REPORTS = "PEER_REPORTS"
    DRAIN = "DRAIN"


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
