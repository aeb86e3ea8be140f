"""Which publishers of KV events an agent follows: a YAML list of sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from raddle.model.errors import PermanentError, Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSource:
    """A publisher, and whose blocks it speaks of."""

    job_uid: str
    # ZeroMQ addresses, tcp://host:port; without a replay every gap voids what was known.
    endpoint: str
    replay_endpoint: str = ""
    topic: str = ""
    role: str = ""
    instance: int = 0
    rank: int = 0
    # A store that speaks for several owners names them; others are not listened to.
    ranks_by_backend: dict[str, int] = field(default_factory=dict[str, int])
    # Events of other models and block sizes are left out; empty and 0: than the first ones named.
    model_name: str = ""
    block_tokens: int = 0


def read_sources(path: str) -> list[KvSource]:
    """The publishers of a file; none without one.

    Raises:
        PermanentError: INVALID_ARGUMENT: not readable, or naming the wrong field.
    """
    if not path:
        return []
    try:
        return msgspec.yaml.decode(Path(path).read_bytes(), type=list[KvSource])
    except (OSError, msgspec.DecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"--kv-events {path}: {error}.") from error
