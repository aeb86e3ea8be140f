"""Where the copies of each expert are, level by level, while maps change.

Tables of counts tell for any number of moves at once whether an expert's copies would sit on more
or on fewer members (dies, NPUs, nodes, racks) than before. An expert with one copy may go anywhere
and is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raddle.core.experts.layout import IntArray

# A move changes each level by one member at most: two moves never add up to a narrower level.
LEVEL_BASE = 8
# More copies than this of one expert share a domain in no machine.
_COPIES_MAX = 1024
_Counts = npt.NDArray[np.int16]


@dataclass(slots=True)
class _Level:
    #: [dies] the member that each die belongs to, from 0.
    member: IntArray
    members: int
    #: Flat [layers, experts, members]: copies there.
    copies: _Counts
    #: [pairs] members that hold no copy although there are copies enough.
    missing: IntArray

    def gain(self, pair: IntArray, origin: IntArray, target: IntArray) -> IntArray:
        """Members more (or less) that hold a copy after each move."""
        here, there = self.member[origin], self.member[target]
        first = pair * self.members
        new = self.copies[first + there] == 0
        gone = self.copies[first + here] == 1
        return np.where(here != there, new.astype(np.int64) - gone, 0)

    def move(self, pair: IntArray, origin: IntArray, target: IntArray) -> None:
        first = pair * self.members
        self.copies[first + self.member[origin]] -= 1
        self.copies[first + self.member[target]] += 1


@dataclass(slots=True)
class Places:
    """The copies of experts that have several, the narrowest level first.

    An expert of a layer is a pair: layer x experts + expert.
    """

    levels: list[_Level]
    #: [layers, experts]
    copies: IntArray

    @staticmethod
    def of(pair: IntArray, die: IntArray, copies: IntArray, domains: IntArray) -> Places:
        """Count copies.

        Args:
            pair, die: each copy of an expert that has several.
            copies: [layers, experts]
            domains: [levels, dies]
        """
        levels: list[_Level] = []
        for domain in domains:
            if (domain == domain[:1]).all():
                break
            member = np.unique(domain, return_inverse=True)[1].reshape(-1).astype(np.int64)
            members = int(member.max()) + 1
            counts: _Counts = np.zeros(copies.size * members, dtype=np.int16)
            at = pair * members + member[die]
            np.add.at(counts, at, np.int16(1))
            # As many copies as a member has count together as one.
            held = np.rint(np.bincount(pair, 1.0 / counts[at], copies.size)).astype(np.int64)
            missing = np.where(copies.ravel() > 1, np.minimum(copies.ravel(), members) - held, 0)
            levels.append(_Level(member, members, counts, missing))
        return Places(levels, copies)

    def gain(self, pair: IntArray, origin: IntArray, target: IntArray) -> IntArray:
        """How much farther apart each move brings an expert's copies.

        Negative where they would share more. A narrow level outweighs all wider ones.
        """
        found: IntArray = np.zeros(len(pair), dtype=np.int64)
        for level in self.levels:
            found = found * LEVEL_BASE + level.gain(pair, origin, target)
        return found

    def move(self, pair: IntArray, origin: IntArray, target: IntArray) -> None:
        """Follow moves; no expert of a layer moves twice."""
        for level in self.levels:
            level.missing[pair] -= level.gain(pair, origin, target)
            level.move(pair, origin, target)

    def sharing(self, levels: int) -> IntArray:
        """[layers, experts] how much copies share that could be apart on the narrowest levels."""
        found: IntArray = np.zeros(self.copies.size, dtype=np.int64)
        for level in self.levels[:levels]:
            found = found * _COPIES_MAX + level.missing
        return found.reshape(self.copies.shape)

    def crowded(self, pair: IntArray) -> IntArray:
        """[pairs, dies] how much a copy on each die would leave others behind by going."""
        found: IntArray = np.zeros((len(pair), 1), dtype=np.int64)
        for level in self.levels:
            several = level.copies[pair[:, None] * level.members + level.member[None, :]] > 1
            found = found * 2 + several
        return found
