"""Agents that have stopped renewing their leases, seen before the leases end.

One event that silences many nodes lets their leases end up to a renewal apart, and the first one
must not be judged alone. What is left of a lease tells since when nobody renewed it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raddle.core.nodes import LEASE_TTL_S
from raddle.model import keys
from raddle.model.errors import RaddleError
from raddle.scheduler.mirror import Mirror
from raddle.store.protocol import Store

# Leases are renewed four times in their life; who has missed two renewals is quiet. etcd tells
# whole seconds, rounded down.
_QUIET_LEFT_S = LEASE_TTL_S / 2
# On larger machines so many are asked, evenly spread.
_ASKED_MAX = 512
_TIMEOUT_S = 0.4
# Nodes that fall silent together are asked about together.
_FRESH_S = 0.2


class QuietNodes:
    """Finds them, at most once in a moment."""

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        clock: Callable[[], float],
        nodes: Callable[[], list[str]],
    ) -> None:
        self._store = store
        self._mirror = mirror
        self._clock = clock
        self._nodes = nodes
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[list[str]] | None = None

    async def found(self) -> tuple[str, ...]:
        """Quiet nodes; none where the store does not say."""
        now = self._clock()
        if self._asking is None or now > self._asked_s + _FRESH_S:
            self._asked_s = now
            self._asking = asyncio.create_task(self._ask(self._nodes()))
        return tuple(await asyncio.shield(self._asking))

    async def _ask(self, nodes: list[str]) -> list[str]:
        asked = nodes[:: -(-len(nodes) // _ASKED_MAX) or 1]
        found = await asyncio.gather(*(self._is_quiet(node) for node in asked))
        return [node for node, quiet in zip(asked, found, strict=True) if quiet]

    async def _is_quiet(self, node: str) -> bool:
        lease = self._mirror.lease(keys.health(node))
        if not lease:
            # A record that nobody has to renew says nothing of who wrote it.
            return True
        try:
            left_s = await self._store.lease_left_s(lease, timeout_s=_TIMEOUT_S)
        except RaddleError:
            return False
        return left_s < _QUIET_LEFT_S
