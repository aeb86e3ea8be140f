"""A bridge over a loss: experts that are gated off until their weights have arrived.

A masked expert gets no token; the others of a token's choice take its weight. That costs quality,
so it is done only for large instances and few experts, and always ends at a deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.copies import count_copies
from raddle.core.experts.layout import IntArray, Layout
from raddle.model.reasons import Decision
from raddle.model.types import Why

# Smaller instances lose too much with any expert.
BRIDGE_RANKS_MIN = 32
# At most this share of the experts of any layer is gated off.
BRIDGE_SHARE_MAX = 1 / 32
# Weights that are this late did not come: the mask ends, and with it the bridge.
_DEADLINE_FACTOR = 3.0
_DEADLINE_MIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Bridge:
    """Which experts to mask; none if masking is refused or not needed."""

    #: (layer, expert) in order.
    masked: tuple[tuple[int, int], ...]
    #: Seconds from the fence until the mask ends whatever happened; 0 without a mask.
    deadline_s: float
    why: Why


def plan_bridge(
    table: IntArray, experts: int, layout: Layout, *, predicted_s: float, ranks: int
) -> Bridge:
    """Mask what has no live copy while a repair loads it.

    Args:
        table: [layers, slots] the map before the repair; only its hosts count.
        predicted_s: seconds that the repair's loads take.
        ranks: ranks of the instance before the loss.
    """
    live = np.where(layout.hosts[layout.slot_die], table, -1)
    layer, expert = np.nonzero(count_copies(live, experts) == 0)
    if not len(layer):
        return Bridge(
            (), 0.0, Why(reason=Decision.NOT_NEEDED, message="every expert has a live copy")
        )
    if ranks < BRIDGE_RANKS_MIN:
        text = f"{ranks} ranks are fewer than {BRIDGE_RANKS_MIN}: no expert can be spared"
        return Bridge((), 0.0, Why(reason=Decision.TOO_SMALL, message=text))
    worst = int(np.bincount(layer).max())
    most = int(experts * BRIDGE_SHARE_MAX)
    if worst > most:
        text = f"{worst} of {experts} experts of a layer are lost, a bridge carries {most}"
        return Bridge((), 0.0, Why(reason=Decision.TOO_MANY_LOST, message=text))
    deadline_s = max(predicted_s * _DEADLINE_FACTOR, _DEADLINE_MIN_S)
    text = f"{len(layer)} experts wait for their weights, {deadline_s:.1f} s at most"
    masked = tuple(zip(layer.tolist(), expert.tolist(), strict=True))
    return Bridge(masked, deadline_s, Why(reason=Decision.MASKED, message=text))
