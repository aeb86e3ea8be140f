"""Blocks of KV in the memory of one process, with a limit, and what is told of each change."""

from __future__ import annotations

import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from raddle.model.kv import KvEventKind


class Block(NamedTuple):
    """A block's bytes and the CRC-32 that the rank made which computed them, and its node."""

    payload: bytes
    checksum: int
    #: Empty at the rank itself.
    writer_node: str = ""

    @staticmethod
    def of(payload: bytes) -> Block:
        return Block(payload, zlib.crc32(payload))

    @property
    def is_whole(self) -> bool:
        return zlib.crc32(self.payload) == self.checksum


@dataclass(slots=True)
class _Kept:
    block: Block
    used_s: float


class BlockStore:
    """The least recently used blocks go first when room is to be made."""

    def __init__(
        self,
        bytes_max: int,
        changed: Callable[[KvEventKind, tuple[str, ...]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bytes_max = bytes_max
        self._changed = changed
        self._clock = clock
        self._blocks: OrderedDict[str, _Kept] = OrderedDict()
        self._bytes = 0
        #: Called with the names of blocks that are new here.
        self.added: Callable[[tuple[str, ...]], None] = lambda _: None
        #: The share of its room that the store may use now.
        self.room_share: Callable[[], float] = lambda: 1.0

    def put(
        self, blocks: Sequence[tuple[str, Block]], *, evict_idle_s: float | None = 0.0
    ) -> tuple[int, tuple[str, ...]]:
        """(how many were new, names of those that found no room).

        Room is made of blocks that were not used for `evict_idle_s`; None makes none.
        """
        room = int(self._bytes_max * self.room_share())
        changes: list[tuple[KvEventKind, str]] = []
        refused: list[str] = []
        for name, block in blocks:
            if name in self._blocks:
                continue
            size = len(block.payload)
            if evict_idle_s is not None and size <= room:
                gone = self._evict(self._bytes + size - room, evict_idle_s)
                changes += [(KvEventKind.REMOVED, old) for old in gone]
            if self._bytes + size > room:
                refused.append(name)
                continue
            self._blocks[name] = _Kept(block, self._clock())
            self._bytes += size
            changes.append((KvEventKind.STORED, name))
        for kind, group in groupby(changes, key=lambda change: change[0]):
            self._changed(kind, tuple(name for _, name in group))
        new = tuple(name for kind, name in changes if kind is KvEventKind.STORED)
        self.added(new)
        return len(new), tuple(refused)

    def _evict(self, bytes_wanted: int, idle_s: float) -> list[str]:
        """Drop the oldest blocks that are idle for so long, until as much is free."""
        gone: list[str] = []
        before = self._clock() - idle_s
        while bytes_wanted > 0 and self._blocks:
            name, oldest = next(iter(self._blocks.items()))
            if oldest.used_s > before:
                break
            del self._blocks[name]
            self._bytes -= len(oldest.block.payload)
            bytes_wanted -= len(oldest.block.payload)
            gone.append(name)
        return gone

    def get(self, names: Iterable[str]) -> list[tuple[str, Block]]:
        """The blocks that are here; that is a use of them."""
        found = []
        for name in names:
            kept = self._blocks.get(name)
            if kept is not None:
                kept.used_s = self._clock()
                self._blocks.move_to_end(name)
                found.append((name, kept.block))
        return found

    def peek(self, name: str) -> Block | None:
        """A block without using it."""
        kept = self._blocks.get(name)
        return kept.block if kept is not None else None

    def idle_s(self, name: str) -> float:
        """How long a block was not used; 0 for one that is not here."""
        kept = self._blocks.get(name)
        return self._clock() - kept.used_s if kept is not None else 0.0

    def names(self) -> tuple[str, ...]:
        """All blocks, the least recently used first."""
        return tuple(self._blocks)
