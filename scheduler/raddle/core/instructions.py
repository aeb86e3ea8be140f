"""Everything that the decision core can ask for. Frozen values; the shell carries them out.

`Commit` is the only way to change the store. Replies ride on the commit that they depend on: the
applier sends them after it succeeded, and turns them into STORE_UNAVAILABLE when it did not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raddle.model.errors import RaddleError


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request: a value (Job, Placement, Hold, ...) or an error."""

    request_id: str
    value: Any = None
    error: RaddleError | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """Put `value` under `key`; None deletes."""

    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Commit:
    """One fenced transaction; each key at most once. `replies` are sent after it succeeded."""

    writes: tuple[Write, ...]
    replies: tuple[Reply, ...] = ()
    # Incident ids and job uids that this commit serves, for the logs.
    stimulus: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ProbeNode:
    """Call the ranks of a silent node directly; answer with `NodeProbed` within 0.5 s."""

    node: str
    # (engine address, incarnation) of each rank there; none: the answer is no.
    ranks: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ProbeRank:
    """Call one suspected rank; answer with `RankProbed` within 0.5 s."""

    job_uid: str
    incarnation: str
    engine_address: str


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send `Woken` at this time (the latest asked time replaces earlier ones)."""

    time_s: float


Instruction = Commit | Reply | ProbeNode | ProbeRank | WakeAt
