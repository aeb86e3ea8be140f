"""Where the weights of a map change come from, and how long the loads take.

In go the loads of a `MapChange`, the map before it and who may be read from; out comes a source
for each load. A load takes the source that would have it there first: a live copy (the closest
of equally busy ones), the hosts' DRAM pool, or the disk. Links are loaded by the loads before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.layout import BoolArray, FloatArray, IntArray, Layout
from raddle.core.experts.repair import MapChange
from raddle.model.types import WeightSource

# Loads are given their sources in at most so many groups; within one, links look alike.
_GROUPS_MAX = 8
_GROUP_MIN = 16
# Every level that source and target do not share makes a copy this much dearer: the fabric is
# flat, so distance decides among equally busy sources only.
_DISTANCE_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """What turns loads into seconds; 0 for a source that does not exist."""

    expert_bytes: int
    peer_bytes_per_s: float
    #: The hosts' DRAM pool, for each die that reads from it.
    pool_bytes_per_s: float
    #: The checkpoint, for each die that reads from it.
    disk_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Sources:
    """[loads] in the order of the change."""

    source: tuple[WeightSource, ...]
    #: Die to read from, -1 where the source is no die.
    die: IntArray
    #: Until the busiest link is done.
    predicted_s: float


def choose_sources(
    change: MapChange, before: IntArray, layout: Layout, readable: BoolArray, rates: Bandwidths
) -> Sources:
    """Choose a source for each load.

    Args:
        before: [layers, slots] what is in memory now.
        readable: [dies] who can be read from: the living, and those that are being drained.
    """
    target = layout.slot_die[change.slot]
    grid = layout.to_grid(before)
    grid[:, ~readable] = -1
    size = rates.expert_bytes
    peer_s = size / rates.peer_bytes_per_s if rates.peer_bytes_per_s else np.inf
    far = (layout.domains[:, :, None] != layout.domains[:, None, :]).sum(axis=0)
    distance_s = peer_s * (1 + _DISTANCE_SHARE * far)
    others = np.array(
        [
            size / rate if rate else np.inf
            for rate in (rates.pool_bytes_per_s, rates.disk_bytes_per_s)
        ]
    )
    sends, receives = np.zeros(layout.dies), np.zeros(layout.dies)
    reads = np.zeros(layout.dies)
    chosen = np.full(change.loads, -1, dtype=np.int64)
    group = max(_GROUP_MIN, -(-change.loads // _GROUPS_MAX))
    for start in range(0, change.loads, group):
        part = slice(start, start + group)
        holds = (grid[change.layer[part]] == change.expert[part, None, None]).any(axis=2)
        ready = np.where(holds, sends + distance_s[target[part]], np.inf)
        pool_or_disk = reads[target[part], None] + others
        best = np.concatenate([ready, pool_or_disk], axis=1).argmin(axis=1)
        chosen[part] = best
        of_peer = best < layout.dies
        sends += np.bincount(best[of_peer], minlength=layout.dies) * peer_s
        receives += np.bincount(target[part][of_peer], minlength=layout.dies) * peer_s
        spent = others[best[~of_peer] - layout.dies]
        reads += np.bincount(target[part][~of_peer], spent, minlength=layout.dies)
    kinds = (WeightSource.POOL, WeightSource.DISK)
    source = tuple(
        WeightSource.PEER if best < layout.dies else kinds[best - layout.dies]
        for best in chosen.tolist()
    )
    busiest: FloatArray = np.maximum(sends, receives + reads)
    die = np.where(chosen < layout.dies, chosen, -1)
    return Sources(source, die, float(busiest.max(initial=0.0)))
