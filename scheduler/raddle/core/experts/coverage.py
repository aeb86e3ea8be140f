"""How much an expert map can lose: exactly, for each failure domain and in dies.

In goes a map and the failure domains of its ranks; out comes what the loss of the worst member of
each level takes with it, and how many dies may go, in the worst case, before an expert is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raddle.core.cluster import DOMAIN_LEVELS
from raddle.core.experts.maps import IntArray


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """The worst loss of one member of a level."""

    level: str
    #: Number of the member, as `domains` names it.
    member: int
    #: (layer, expert) pairs whose every copy it holds.
    experts_lost: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """`margin_dies` is how many dies may be lost, whichever they are, and all experts live on."""

    margin_dies: int
    worst: tuple[DomainLoss, ...]
    #: (layer, expert) pairs without any copy now.
    uncovered: int


def coverage_margin(
    table: IntArray,
    slots_per_rank: int,
    experts: int,
    domains: IntArray,
    levels: Sequence[str] = DOMAIN_LEVELS,
) -> Coverage:
    """Measure a map [layers, slots]; ranks of dead slots take no part.

    Args:
        domains: [levels, ranks] in the order of `levels`.
    """
    layer, slot = np.nonzero(table >= 0)
    pair = layer * experts + table[layer, slot]
    rank = slot // slots_per_rank
    pairs = table.shape[0] * experts
    copies = np.bincount(pair, minlength=pairs)
    named = zip(levels, domains, strict=True)
    return Coverage(
        margin_dies=int(copies.min()) - 1 if pairs else 0,
        worst=tuple(_worst(name, level[rank], pair, pairs) for name, level in named),
        uncovered=int(np.count_nonzero(copies == 0)),
    )


def _worst(level: str, member: IntArray, pair: IntArray, pairs: int) -> DomainLoss:
    """The member that holds all copies of most experts; ties go to the lowest."""
    lowest = np.full(pairs, np.iinfo(np.int64).max, dtype=np.int64)
    highest = np.full(pairs, -1, dtype=np.int64)
    np.minimum.at(lowest, pair, member)
    np.maximum.at(highest, pair, member)
    alone = lowest[lowest == highest]
    if not len(alone):
        return DomainLoss(level, int(member.min()) if len(member) else 0, 0)
    lost = np.bincount(alone)
    worst = int(np.argmax(lost))
    return DomainLoss(level, worst, int(lost[worst]))
