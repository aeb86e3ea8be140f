"""Names of KV blocks: prefix hashes.

A block's name covers everything that its content depends on: the model, the data type and all
tokens up to its end.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

_KV_DTYPE = "float32"


def cache_key(model_digest: str, tenant_salt: str = "") -> bytes:
    """What a block's content depends on besides its tokens."""
    return hashlib.sha256(f"{model_digest}|{_KV_DTYPE}|{tenant_salt}".encode()).digest()


def block_hashes(key: bytes, tokens: Sequence[int], block_tokens: int) -> list[str]:
    """Names of the full blocks of a token sequence, oldest first."""
    parent, found = key, []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        chunk = tokens[start : start + block_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{block_tokens}i", *chunk)).digest()
        found.append(parent.hex()[:32])
    return found
