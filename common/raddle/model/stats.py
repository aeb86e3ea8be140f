"""What running ranks say of themselves at a high rate; never stored.

The same field names as in `proto/raddle/v1`; `raddle.wire.codec` turns one into the other.
Times are seconds since 1970 of the scheduler's clock, durations are seconds; 0 means not set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raddle.model.kv import KvEventKind, KvTier
from raddle.model.types import RankKey


class RankState(StrEnum):
    """Where a rank stands between two epochs."""

    UNSPECIFIED = "UNSPECIFIED"
    # Process is up, weights or members are missing.
    STARTING = "STARTING"
    # Fenced: no token leaves, no expert traffic of an older epoch is answered.
    QUIESCED = "QUIESCED"
    SERVING = "SERVING"
    # Stopped by itself because a peer is lost; waits for a newer epoch.
    WAITING = "WAITING"


class QuiesceMode(StrEnum):
    """How a rank stops."""

    UNSPECIFIED = "UNSPECIFIED"
    # At the next step boundary, keeping sequences.
    KEEP = "KEEP"
    # Drop all sequences.
    ABORT = "ABORT"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFault:
    """A peer that broke its connection or missed a step's deadline."""

    peer: RankKey = field(default_factory=RankKey)
    peer_incarnation: str = ""
    # CONNECTION_BROKEN or STEP_DEADLINE.
    reason: str = ""
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Tokens that one layer's experts saw."""

    layer: int = 0
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvent:
    """A member's change, numbered by the owner's incarnation."""

    kind: KvEventKind = KvEventKind.UNSPECIFIED
    block_hashes: tuple[str, ...] = ()
    sequence: int = 0
    tier: KvTier = KvTier.UNSPECIFIED
    # What the hashes are within; empty where the job's model says it all.
    lora: str = ""
    tenant_salt: str = ""
    kv_group: int = 0
    # Tokens of a block, where the engine says them.
    block_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRepair:
    """Where a pool member's repair stands.

    The copies of its blocks that others should have and lack.
    """

    # Since the process began.
    copies_made: int = 0
    bytes_made: int = 0
    copies_left: int = 0
    bytes_left: int = 0
    # What is left takes so long at the member's budget.
    left: float = 0.0
    # At the report's epoch every block here has all its copies on other members that stay.
    is_handed_on: bool = False
    # Copies that found no room anywhere.
    copies_without_room: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """One report; every field is optional."""

    rank: RankKey = field(default_factory=RankKey)
    incarnation: str = ""
    epoch: int = 0
    peer_faults: tuple[PeerFault, ...] = ()
    # Tokens since the last report, [layer][expert] in the order of the layers.
    expert_loads: tuple[ExpertLoad, ...] = ()
    kv_events: tuple[KvEvent, ...] = ()
    sequences_running: int = 0
    tokens_generated: int = 0
    kv_tokens_restored: int = 0
    kv_tokens_recomputed: int = 0
    kv_repair: KvRepair | None = None
