"""Where front doors send requests, and the sequences that they own.

The same field names as in `proto/raddle/v1`; `raddle.wire.codec` turns one into the other.
Times are seconds since 1970 of the scheduler's clock, durations are seconds; 0 means not set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raddle.model.types import Member, RankKey, SequenceRestore


class RouteState(StrEnum):
    """Whether traffic may flow."""

    UNSPECIFIED = "UNSPECIFIED"
    # Ranks are known, none may serve yet.
    STARTING = "STARTING"
    # A recovery is under way: members that left are gone from the list; sequences wait.
    FENCED = "FENCED"
    LIVE = "LIVE"
    # The job ended.
    ENDED = "ENDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """All that a router needs to know of one job at one epoch. Stored under routes/<job_uid>."""

    job_uid: str = ""
    namespace: str = ""
    name: str = ""
    epoch: int = 0
    state: RouteState = RouteState.UNSPECIFIED
    model: str = ""
    kv_block_tokens: int = 0
    members: tuple[Member, ...] = ()
    # Where the sequences of lost ranks continue.
    restores: tuple[SequenceRestore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """One running request."""

    sequence_id: str = ""
    # The decode rank that serves it.
    rank: RankKey = field(default_factory=RankKey)
    prompt_tokens: int = 0
    sent_tokens: int = 0
    # Hashes of the full KV blocks of prompt and sent tokens, oldest first.
    block_hashes: tuple[str, ...] = ()
    # Time left for the request when this was said; 0 means without a deadline.
    left: float = 0.0
