"""A slice of a real trace, turned into requests of the small reference model.

A trace block of 512 tokens becomes one block of the small model: equal block ids give equal
tokens, so that shared prefixes stay shared. Outputs are shortened alike.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources

TRACE_BLOCK_TOKENS = 512
OUTPUT_TOKENS_MIN = 8
OUTPUT_TOKENS_MAX = 64


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: prompt tokens and how many tokens to make."""

    prompt: tuple[int, ...]
    output_tokens: int


def block_tokens(block_id: int, tokens: int, vocabulary: int) -> list[int]:
    """The tokens of a trace block, the same for the same id."""
    found: list[int] = []
    counter = 0
    while len(found) < tokens:
        digest = hashlib.sha256(f"{block_id}/{counter}".encode()).digest()
        found += [
            int.from_bytes(digest[i : i + 2], "little") % vocabulary
            for i in range(0, len(digest), 2)
        ]
        counter += 1
    return found[:tokens]


def load_requests(
    count: int, *, kv_block_tokens: int = 16, vocabulary: int = 512, blocks_max: int = 8
) -> list[TraceRequest]:
    """The first `count` requests of the slice; at most `blocks_max` blocks of each prompt."""
    text = (resources.files(__name__) / "mooncake_conversation.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    if not 1 <= count <= len(rows):
        raise ValueError(f"the slice holds {len(rows)} requests, not {count}")
    return [_request(row, kv_block_tokens, vocabulary, blocks_max) for row in rows[:count]]


def _request(
    row: dict[str, object], kv_block_tokens: int, vocabulary: int, blocks_max: int
) -> TraceRequest:
    ids = row["hash_ids"]
    length, output = row["input_length"], row["output_length"]
    assert isinstance(ids, list)
    assert isinstance(length, int)
    assert isinstance(output, int)
    shrink = TRACE_BLOCK_TOKENS // kv_block_tokens
    kept = ids[:blocks_max]
    prompt: list[int] = []
    for block_id in kept:
        prompt += block_tokens(block_id, kv_block_tokens, vocabulary)
    # The last block is rarely full; a prompt has at least one token of it.
    tokens = max(1, -(-length // shrink))
    outputs = min(OUTPUT_TOKENS_MAX, max(OUTPUT_TOKENS_MIN, output // shrink))
    return TraceRequest(tuple(prompt[:tokens]), outputs)
