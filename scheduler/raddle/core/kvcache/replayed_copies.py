"""Copies that are made again while a trace is replayed, each sent by a host that holds the block.

Every host has a budget of its own, so what one host alone holds leaves it no faster than that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from raddle.core.kvcache.pool import RepairLoop


class HostCopies:
    """Queues by sending host. A host sends one block after another."""

    def __init__(self, bytes_per_s: float, block_bytes: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._block_bytes = block_bytes
        self._queues: dict[int, RepairLoop[int]] = {}
        #: By host: what it is sending, and the number of the sending.
        self._sending: dict[int, tuple[int, int]] = {}
        self._number = 0
        #: Blocks that wait in a queue.
        self.waiting = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self._sending

    def begin_anew(self, hosts: Collection[int]) -> None:
        """Forget what waits; what hosts that are gone were sending does not arrive."""
        for gone in [host for host in self._queues if host not in hosts]:
            del self._queues[gone]
            self._sending.pop(gone, None)
        for host in hosts:
            if host not in self._queues:
                self._queues[host] = RepairLoop(self._bytes_per_s)
            self._queues[host].clear()
        self.waiting = 0

    def add(self, block: int, holders: Sequence[int], heat: float) -> None:
        """Queue a block with the holder that has the least to send, unless it is on its way."""
        if any(block == sent for sent, _ in self._sending.values()):
            return
        host = min(holders, key=lambda holder: len(self._queues[holder]))
        self._queues[host].add(block, heat=heat, size_bytes=self._block_bytes)
        self.waiting += 1

    def begin(self, now: float) -> list[tuple[float, int, int]]:
        """Let hosts that send nothing begin: when each is done, the host and the sending."""
        begun: list[tuple[float, int, int]] = []
        for host, queue in self._queues.items():
            if host in self._sending or not len(queue):
                continue
            block = queue.take(max(now, queue.free_at_s))
            assert block is not None
            self.waiting -= 1
            self._number += 1
            self._sending[host] = (block, self._number)
            begun.append((queue.free_at_s, host, self._number))
        return begun

    def arrived(self, host: int, number: int) -> int | None:
        """The block that was sent; None if the host did not live to send it."""
        block, sending = self._sending.get(host, (0, 0))
        if sending != number:
            return None
        del self._sending[host]
        return block
