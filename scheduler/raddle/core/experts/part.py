"""Exchanges that keep the copies of an expert in different failure domains.

In go maps whose copies may share a die, an NPU, a node or a rack although there are members enough
for all of them; out come maps in which as few as possible do, with little change of the dies'
loads. Sharing a narrow level outweighs any number of copies that share only wider ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.exchange import Working, divided
from raddle.core.experts.layout import EMPTY, BoolArray, FloatArray, IntArray, numbers

_LEVEL_BASE = 1024.0
# Exchanges a layer: more were not needed at 384 slots, and each costs some load.
_ROUNDS_MAX = 64


@dataclass(slots=True)
class _Places:
    """Where the copies of all experts are, on one level."""

    weight: float
    #: [dies] the member that each die belongs to, from 0.
    member: IntArray
    #: [layers, experts, members] copies there.
    copies: IntArray
    #: [layers, experts] members that hold a copy.
    members_held: IntArray

    @staticmethod
    def of(grid: IntArray, experts: int, level: IntArray, weight: float) -> _Places:
        member = np.unique(level, return_inverse=True)[1].reshape(-1).astype(np.int64)
        layers, count = len(grid), int(member.max()) + 1
        layer, die, place = np.nonzero(grid >= 0)
        index = (layer * experts + grid[layer, die, place]) * count + member[die]
        copies = np.bincount(index, minlength=layers * experts * count)
        held = np.bincount(np.unique(index) // count, minlength=layers * experts)
        return _Places(
            weight,
            member,
            copies.reshape(layers, experts, count),
            held.reshape(layers, experts),
        )

    def move(self, layer: IntArray, expert: IntArray, origin: IntArray, target: IntArray) -> None:
        """Follow one expert a layer from die to die."""
        for die, change in ((origin, -1), (target, 1)):
            at = (layer, expert, self.member[die])
            self.copies[at] += change
            held = self.copies[at] == (change + 1) // 2
            self.members_held[layer[held], expert[held]] += change

    def gain(
        self, layer: IntArray, expert: IntArray, origin: IntArray, target: IntArray
    ) -> IntArray:
        """Members more (or less) that hold a copy after such moves; all arrays broadcast."""
        here, there = self.member[origin], self.member[target]
        new = self.copies[layer, expert, there] == 0
        gone = self.copies[layer, expert, here] == 1
        gained = new.astype(np.int64) - gone
        return np.where(here != there, gained, 0)


def part_copies(work: Working, copies: IntArray, levels_kept: int) -> None:
    """Exchange until no copies share what they need not, or many exchanges a layer are done.

    Args:
        copies: [layers, experts] copies of each expert.
        levels_kept: so many levels count, the narrowest first.
    """
    domains = work.layout.domains[:levels_kept]
    if work.layout.is_even and copies.max() <= len(np.unique(domains[1:2])):
        # Who is apart on NPUs is apart on dies.
        domains = domains[1:]
    levels = _levels(work.grid, copies, domains)
    if not levels:
        return
    active = numbers(len(work.grid))
    for _ in range(_ROUNDS_MAX):
        shared = sum(
            level.weight
            * (np.minimum(copies[active], level.copies.shape[2]) - level.members_held[active])
            for level in levels
        )
        assert isinstance(shared, np.ndarray)
        keep = shared.max(axis=1) > 0
        active, expert = active[keep], shared[keep].argmax(axis=1)
        if not len(active):
            return
        active = active[_part_one(work, levels, active, expert)]


def _levels(grid: IntArray, copies: IntArray, domains: IntArray) -> list[_Places]:
    """Levels with more than one member, the narrowest with the highest weight."""
    found: list[_Places] = []
    weight = 1.0
    for level in domains[::-1]:
        if (level != level[0]).any():
            found.append(_Places.of(grid, copies.shape[1], level, weight))
            weight *= _LEVEL_BASE
    return found


def _part_one(
    work: Working, levels: list[_Places], layers: IntArray, expert: IntArray
) -> BoolArray:
    """Move the copy of each layer's expert that shares most; tells where that was possible."""
    rows = numbers(len(layers))
    grid = work.grid[layers]
    width = grid.shape[2]
    flat = grid.reshape(len(rows), -1)
    die = np.repeat(numbers(work.layout.dies), width)
    crowded = np.zeros((len(rows), work.layout.dies))
    for level in levels:
        held = level.copies[layers, expert] > 1
        crowded += level.weight * held[:, level.member]
    closest = np.where(flat == expert[:, None], np.repeat(crowded, width, axis=1), -1.0)
    here, place = divided(closest.argmax(axis=1), width)
    gained = np.zeros(flat.shape)
    row, other = layers[:, None], np.maximum(flat, 0)
    for level in levels:
        mine = level.gain(row, expert[:, None], here[:, None], numbers(work.layout.dies)[None, :])
        theirs = level.gain(row, other, die[None, :], here[:, None])
        both = np.repeat(mine, width, axis=1) + np.where(flat >= 0, theirs, 0)
        gained += level.weight * both
    gained[(flat < EMPTY) | (flat == expert[:, None])] = -np.inf
    most = gained.max(axis=1)
    # Of those that part as far as it matters, the one that shifts the least load.
    own = work.weight[layers, here, place][:, None]
    shift: FloatArray = np.abs(own - work.weight[layers].reshape(flat.shape))
    shift[gained < most[:, None] / 2] = np.inf
    best = shift.argmin(axis=1)
    there, place_there = divided(best, width)
    good: BoolArray = most > 0
    at, came = layers[good], flat[rows, best][good]
    work.swap(at, (here[good], place[good]), (there[good], place_there[good]))
    for level in levels:
        level.move(at, expert[good], here[good], there[good])
        real = came >= 0
        level.move(at[real], came[real], there[good][real], here[good][real])
    return good
