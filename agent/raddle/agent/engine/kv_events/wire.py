"""Batches of KV events as vLLM, SGLang and Mooncake encode them, to `KvEvent`s.

In goes the msgpack payload of one message, `[time, [event, ...], rank]`; out come changes in
order. Three encodings of an event are read: a map with `type` (vLLM 0.33, SGLang), an array whose
first element is the type and whose fields have fixed places (older vLLM), and the envelope of the
Conductor, a map with `event_type` (RFC 1527). Anything else is garbage: a `ValueError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from raddle.model.kv import KvEventKind, KvTier
from raddle.model.stats import KvEvent

EVENTS_A_BATCH_MAX = 100_000
BLOCKS_AN_EVENT_MAX = 1_000_000
_HASH_BYTES = 8
_HASH_BYTES_MAX = 64
_WORD = (1 << 64) - 1
# Fields of the arrays, by their place after the type (vllm/distributed/kv_events.py).
_ARRAYS: dict[str, tuple[str, ...]] = {
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}
_KINDS = {
    "BlockStored": KvEventKind.STORED,
    "BlockRemoved": KvEventKind.REMOVED,
    "AllBlocksCleared": KvEventKind.CLEARED,
    "stored": KvEventKind.STORED,
    "removed": KvEventKind.REMOVED,
    "cleared": KvEventKind.CLEARED,
}
# What the Conductor calls the tenant of those who name none.
_NO_TENANT = "default"
# A medium that is not listed lies further away than any that is.
_TIERS = {
    "gpu": KvTier.HBM,
    "npu": KvTier.HBM,
    "hbm": KvTier.HBM,
    "cpu": KvTier.DRAM,
    "dram": KvTier.DRAM,
    "memory": KvTier.DRAM,
}


@dataclass(frozen=True, slots=True)
class WireEvent:
    """One change, not numbered yet; names are empty where the publisher does not say them."""

    event: KvEvent
    model_name: str = ""
    backend_id: str = ""
    #: The Conductor numbers the events of a stream one after the other; None: not said.
    event_id: int | None = None


@dataclass(frozen=True, slots=True)
class WireBatch:
    """One message: its changes, and the data-parallel rank that it speaks for (None: not said)."""

    events: tuple[WireEvent, ...]
    dp_rank: int | None


def decode_batch(payload: bytes) -> WireBatch:
    """The changes of one payload.

    Raises:
        ValueError: it is no batch of one of the encodings.
    """
    try:
        batch = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, RecursionError, TypeError) as error:
        # The last two: nested without end, and a map whose keys are no names.
        raise ValueError(f"no msgpack: {error}") from error
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):  # noqa: PLR2004 - time, events
        raise ValueError("a batch is an array of time, events and rank")
    if len(batch[1]) > EVENTS_A_BATCH_MAX:
        raise ValueError(f"more than {EVENTS_A_BATCH_MAX} events in a batch")
    rank = batch[2] if len(batch) > 2 else None  # noqa: PLR2004
    if rank is not None:
        rank = _whole("data_parallel_rank", rank)
    return WireBatch(tuple(_event(event) for event in batch[1]), rank)


def _event(event: Any) -> WireEvent:
    if isinstance(event, list) and event and isinstance(event[0], str) and event[0] in _ARRAYS:
        names = _ARRAYS[event[0]]
        # What a newer release appends says nothing that is needed here.
        fields: Mapping[str, Any] = {"type": event[0], **dict(zip(names, event[1:], strict=False))}
        return _engine_event(fields)
    if isinstance(event, dict) and "event_type" in event:
        return _envelope(event)
    if isinstance(event, dict) and "type" in event:
        return _engine_event(event)
    raise ValueError("an event is a map with a type, or an array that begins with one")


def _engine_event(fields: Mapping[str, Any]) -> WireEvent:
    """vLLM's and SGLang's. Their hashes cover adapter and tenant; removals do not repeat them."""
    kind = _kind(fields["type"])
    event = KvEvent(
        kind=kind,
        block_hashes=() if kind is KvEventKind.CLEARED else _hashes(fields.get("block_hashes")),
        tier=_tier(fields.get("medium"), KvTier.HBM),
        kv_group=_whole("group_idx", fields.get("group_idx") or 0),
        block_tokens=_whole("block_size", fields.get("block_size") or 0),
    )
    return WireEvent(event)


def _envelope(fields: Mapping[str, Any]) -> WireEvent:
    """The Conductor's: every event says everything that its hashes are within."""
    kind = _kind(fields["event_type"])
    tenant, salt = _text(fields, "tenant_id"), _text(fields, "additional_salt")
    if tenant == _NO_TENANT:
        tenant = ""
    event = KvEvent(
        kind=kind,
        block_hashes=() if kind is KvEventKind.CLEARED else _hashes(fields.get("seq_hashes")),
        tier=_tier(fields.get("medium"), KvTier.DRAM),
        lora=_text(fields, "lora_name"),
        tenant_salt=f"{tenant}|{salt}" if tenant or salt else "",
        block_tokens=_whole("block_size", fields.get("block_size") or 0),
    )
    number = fields.get("event_id")
    return WireEvent(
        event,
        model_name=_text(fields, "model_name"),
        backend_id=_text(fields, "backend_id"),
        event_id=None if number is None else _whole("event_id", number, below=1 << 64),
    )


def _kind(word: Any) -> KvEventKind:
    kind = _KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise ValueError(f"{str(word)[:40]!r} is no event type")
    return kind


def _tier(medium: Any, usual: KvTier) -> KvTier:
    if medium is None:
        return usual
    if not isinstance(medium, str):
        raise ValueError("medium must be a text")  # noqa: TRY004 - garbage is one kind of error
    return _TIERS.get(medium.lower(), KvTier.STORAGE)


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 1_024:  # noqa: PLR2004 - names are short
        raise ValueError(f"{name} must be a text of at most 1,024 characters")
    return value


def _whole(name: str, value: Any, *, below: int = 1 << 31) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
        raise ValueError(f"{name} must be a whole number, not {str(value)[:40]!r}")
    return value


def _hashes(values: Any) -> tuple[str, ...]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError("block hashes must be an array")  # noqa: TRY004
    if len(values) > BLOCKS_AN_EVENT_MAX:
        raise ValueError(f"more than {BLOCKS_AN_EVENT_MAX} blocks in an event")
    return tuple(_hash(value) for value in values)


def _hash(value: Any) -> str:
    """64 bits of a number (also of a negative one), or all of a byte string, in hexadecimal."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value & _WORD:016x}"
    if isinstance(value, bytes) and 0 < len(value) <= _HASH_BYTES_MAX:
        return value.rjust(_HASH_BYTES, b"\0").hex()
    raise ValueError("a block's hash is a number or a byte string")
