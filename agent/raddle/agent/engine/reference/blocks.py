"""KV blocks: names by prefix hash, bytes for the pool, and which pool member keeps which block.

A block's name covers everything that its content depends on: the model, the data type and all
tokens up to its end. A rank's block never goes to a pool member on the rank's own node, so that a
node's loss does not take both.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from raddle.model.types import Member

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


def keeper(block_hash: str, members: Sequence[Member], node: str) -> Member | None:
    """The pool member for a block of a rank on `node`, by rendezvous hashing.

    When a member leaves, only its own blocks change their keeper.
    """
    elsewhere = [member for member in members if member.node != node]
    if not elsewhere:
        return None
    return max(elsewhere, key=lambda member: (_weight(block_hash, member), member.node))


def _weight(block_hash: str, member: Member) -> bytes:
    name = f"{block_hash}|{member.rank.role}|{member.rank.instance}|{member.rank.rank}"
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
