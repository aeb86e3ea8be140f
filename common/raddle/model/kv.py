"""KV blocks: what their bytes depend on, where they may lie, and what is said of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class KvTier(StrEnum):
    """Which memory of a member a block lies in."""

    UNSPECIFIED = "UNSPECIFIED"
    # A die's own memory.
    HBM = "HBM"
    # A host's memory; the pool.
    DRAM = "DRAM"
    # Files, local or remote.
    STORAGE = "STORAGE"


class KvEventKind(StrEnum):
    """What happened to blocks of a member."""

    UNSPECIFIED = "UNSPECIFIED"
    STORED = "STORED"
    REMOVED = "REMOVED"
    # All blocks are gone; whatever is stored after it is all there is.
    CLEARED = "CLEARED"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpace:
    """Everything that a block's bytes depend on besides the tokens that its hash covers."""

    model_digest: str = ""
    weight_dtype: str = ""
    kv_dtype: str = ""
    lora: str = ""
    tenant_salt: str = ""
    # How the engine makes hashes: equal hashes of two schemes say nothing.
    hash_scheme: str = ""
    block_tokens: int = 0
    # Layers of one kind of attention keep blocks of their own.
    kv_group: int = 0


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. `blocks` names its prompt's blocks, the last one rarely full."""

    arrival_s: float
    blocks: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    #: The trace's own time; batched traces stamp requests of the same batch alike.
    stamp_s: float
