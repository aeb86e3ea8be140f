"""How much an expert map can lose: exactly, for each failure domain and in dies.

In goes a map and its layout; out comes what the loss of the worst member, and of the worst two
members, of each level takes with it, how many dies may go in the worst case before an expert is
gone, and which extra copies would raise that number. Nothing is sampled: an expert is lost with
one or two members only if all its copies sit on them, and that is counted for all at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.layout import IntArray, Layout, numbers

# Extra copies that are named; their number is always given.
EXTRA_COPIES_MAX = 1_000


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """The worst loss of one or of two members of a level."""

    level: str
    #: Numbers of the members, as `domains` names them, in order.
    members: tuple[int, ...]
    #: (layer, expert) pairs whose every copy they hold.
    experts: tuple[tuple[int, int], ...]

    @property
    def experts_lost(self) -> int:
        return len(self.experts)


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a map can lose."""

    #: Dies that may be lost, whichever they are, and all experts live on; -1: one is gone now.
    margin_dies: int
    #: (layer, expert) pairs without any copy now.
    uncovered: tuple[tuple[int, int], ...]
    #: For each level that has a member: the worst one.
    worst_one: tuple[DomainLoss, ...]
    #: For each level that has two members: the worst two.
    worst_two: tuple[DomainLoss, ...]
    #: So many copies more, one of each expert that has the fewest, raise the margin by one; 0 if
    #: none can, since these are on every die that hosts any.
    extra_copies_needed: int
    #: The first of them: (layer, expert, die), the die that shares least with the other copies.
    extra_copies: tuple[tuple[int, int, int], ...]


def measure_coverage(table: IntArray, experts: int, layout: Layout) -> Coverage:
    """Measure a map [layers, slots]; slots of dies that host nothing take no part."""
    layer, slot = np.nonzero((table >= 0) & layout.hosts[layout.slot_die])
    die = layout.slot_die[slot]
    pair = layer * experts + table[layer, slot]
    # A die that holds an expert twice loses it once.
    unique = np.unique(pair * layout.dies + die)
    pair, die = np.divmod(unique, layout.dies)
    pairs = len(table) * experts
    copies = np.bincount(pair, minlength=pairs)
    one: list[DomainLoss] = []
    two: list[DomainLoss] = []
    for name, level in zip(layout.levels, layout.domains, strict=True):
        found = _Level(name, level[die], pair, pairs, np.unique(level[layout.hosts]), experts)
        one += found.worst_one()
        two += found.worst_two()
    fewest = int(copies.min()) if pairs else 0
    possible = fewest < np.count_nonzero(layout.hosts)
    short = np.flatnonzero(copies == fewest) if possible else numbers(0)
    extra = _extra(short[:EXTRA_COPIES_MAX], pair, die, experts, layout)
    return Coverage(
        margin_dies=fewest - 1,
        uncovered=_named(np.flatnonzero(copies == 0), experts),
        worst_one=tuple(one),
        worst_two=tuple(two),
        extra_copies_needed=len(short),
        extra_copies=extra,
    )


def _named(pairs: IntArray, experts: int) -> tuple[tuple[int, int], ...]:
    layer, expert = np.divmod(pairs, experts)
    return tuple(zip(layer.tolist(), expert.tolist(), strict=True))


class _Level:
    """One level: which members hold all copies of an expert, if these are one or two."""

    def __init__(
        self,
        name: str,
        member: IntArray,
        pair: IntArray,
        pairs: int,
        members: IntArray,
        experts: int,
    ) -> None:
        self.name, self.members, self.experts = name, members, experts
        at = np.searchsorted(members, member)
        self.first = np.full(pairs, len(members), dtype=np.int64)
        self.last = np.full(pairs, -1, dtype=np.int64)
        np.minimum.at(self.first, pair, at)
        np.maximum.at(self.last, pair, at)
        elsewhere = (at != self.first[pair]) & (at != self.last[pair])
        self.few = (self.last >= 0) & (np.bincount(pair[elsewhere], minlength=pairs) == 0)

    def _alone(self) -> IntArray:
        """[members] experts that a member holds all copies of."""
        alone = self.first[self.few & (self.first == self.last)]
        return np.bincount(alone, minlength=len(self.members))

    def _loss(self, *indices: int) -> DomainLoss:
        among = np.isin(self.first, indices) & np.isin(self.last, indices) & self.few
        members = tuple(int(self.members[index]) for index in indices)
        return DomainLoss(self.name, members, _named(np.flatnonzero(among), self.experts))

    def worst_one(self) -> list[DomainLoss]:
        if not len(self.members):
            return []
        return [self._loss(int(np.argmax(self._alone())))]

    def worst_two(self) -> list[DomainLoss]:
        count = len(self.members)
        if count < 2:  # noqa: PLR2004 - two members
            return []
        both = self.few & (self.first < self.last)
        index = self.first[both] * count + self.last[both]
        lost = np.bincount(index, minlength=count * count).reshape(count, count)
        alone = self._alone()
        lost += alone[:, None] + alone[None, :]
        lost[np.tril_indices(count)] = -1
        one, other = divmod(int(np.argmax(lost)), count)
        return [self._loss(one, other)]


def _extra(
    short: IntArray, pair: IntArray, die: IntArray, experts: int, layout: Layout
) -> tuple[tuple[int, int, int], ...]:
    """One more copy of each of these experts, where it shares least with the others."""
    near = np.zeros((len(short), layout.dies))
    at = np.searchsorted(short, pair)
    mine = at < len(short)
    mine[mine] = short[at[mine]] == pair[mine]
    np.add.at(near, at[mine], layout.closeness()[die[mine]])
    taken = np.zeros(near.shape, dtype=bool)
    taken[at[mine], die[mine]] = True
    near[taken | ~layout.hosts] = np.inf
    layer, expert = np.divmod(short, experts)
    named = zip(layer.tolist(), expert.tolist(), near.argmin(axis=1).tolist(), strict=True)
    return tuple(named)
