"""The dies of one expert-parallel instance as arrays: slots, failure domains, speeds.

A map is an int table [layers, slots], slots die by die, -1 for an empty or dead slot. The
algorithms see it as a grid [layers, dies, slots of the widest die], where -2 stands for a slot
that the die does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raddle.core.cluster import DOMAIN_LEVELS
from raddle.model.errors import PermanentError, Reason

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

EMPTY = -1
NO_SLOT = -2
# More copies than this of one expert share a domain in no machine: levels never add up wrongly.
_LEVEL_BASE = 1024.0
# Sums and ratios of loads up to this stay finite.
LOAD_MAX = 1e100


def nearness(holds: BoolArray, members: list[IntArray]) -> FloatArray:
    """[rows, dies] what each die has in common with the dies that hold [rows, dies].

    The sum of `Layout.closeness` over the holders, without that table of all pairs of dies.
    """
    row, die = np.nonzero(holds)
    found = np.zeros(holds.shape)
    for member in members:
        count = int(member.max()) + 1
        shared = np.bincount(row * count + member[die], minlength=len(holds) * count)
        found = found * _LEVEL_BASE + shared.reshape(-1, count)[:, member]
    return found


def numbers(count: int) -> IntArray:
    return np.arange(count, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a map is laid out on; nothing in it changes from layer to layer."""

    #: [dies] physical slots a layer.
    slots: IntArray
    #: [levels, dies], narrow to wide: the die itself first.
    domains: IntArray
    #: [dies] which may hold routed experts: alive, and no shared-expert rank.
    hosts: BoolArray
    #: [dies] relative speed, 1.0 for a healthy die.
    speeds: FloatArray
    levels: tuple[str, ...] = DOMAIN_LEVELS

    @staticmethod
    def of(
        domains: IntArray,
        slots: int | IntArray,
        *,
        hosts: BoolArray | None = None,
        speeds: FloatArray | None = None,
        levels: tuple[str, ...] = DOMAIN_LEVELS,
    ) -> Layout:
        """A layout with defaults: all dies host experts at full speed."""
        dies = len(domains[0])
        all_hosts: BoolArray = np.ones(dies, dtype=bool)
        full_speed: FloatArray = np.ones(dies)
        return Layout(
            slots=np.broadcast_to(np.asarray(slots, dtype=np.int64), (dies,)),
            domains=domains,
            hosts=all_hosts if hosts is None else hosts,
            speeds=full_speed if speeds is None else speeds,
            levels=levels,
        )

    @property
    def dies(self) -> int:
        return len(self.domains[0])

    @property
    def width(self) -> int:
        """Slots of the widest die."""
        return int(self.slots.max(initial=0))

    @property
    def is_even(self) -> bool:
        return bool((self.slots == self.width).all())

    @property
    def slot_die(self) -> IntArray:
        """[slots] the die of each slot."""
        return np.repeat(numbers(self.dies), self.slots)

    @property
    def host_slots(self) -> int:
        return int(self.slots[self.hosts].sum())

    def _cells(self) -> tuple[IntArray, IntArray]:
        """Die and place in the die of each slot."""
        die = self.slot_die
        first = np.cumsum(self.slots) - self.slots
        return die, numbers(len(die)) - first[die]

    def to_grid(self, table: IntArray) -> IntArray:
        """[layers, slots] -> [layers, dies, width], a copy."""
        if self.is_even:
            return table.reshape(len(table), self.dies, self.width).copy()
        grid = np.full((len(table), self.dies, self.width), NO_SLOT, dtype=np.int64)
        die, place = self._cells()
        grid[:, die, place] = table
        return grid

    def to_table(self, grid: IntArray) -> IntArray:
        """[layers, dies, width] -> [layers, slots]."""
        if self.is_even:
            return grid.reshape(len(grid), -1)
        die, place = self._cells()
        return grid[:, die, place]

    def host_order(self) -> IntArray:
        """The hosts by their own numbers, so that the order of the arrays has no say in a map."""
        hosts = np.flatnonzero(self.hosts)
        return hosts[np.argsort(self.domains[0, hosts], kind="stable")].astype(np.int64)

    def only(self, dies: IntArray) -> Layout:
        """These dies alone, renumbered from 0 in this order."""
        return Layout(
            self.slots[dies],
            self.domains[:, dies],
            self.hosts[dies],
            self.speeds[dies],
            self.levels,
        )

    def closeness(self) -> FloatArray:
        """[dies, dies]: what two copies on these dies have in common, the narrowest level first.

        One shared level outweighs any number of copies that share only wider ones.
        """
        found = np.zeros((self.dies, self.dies))
        for level in self.domains:
            # Who shares a narrow level shares the wider ones too: counted there as well.
            found = found * _LEVEL_BASE + (level[:, None] == level[None, :])
        return found

    def members(self) -> list[IntArray]:
        """For each level the member of each die, counted from 0."""
        found = [np.unique(level, return_inverse=True)[1] for level in self.domains]
        return [member.reshape(-1).astype(np.int64) for member in found]

    def spread_order(self) -> IntArray:
        """[dies]: an order whose runs differ in racks first, then nodes, then NPUs.

        A run of c dies has c different NPUs, nodes and racks as far as the machine has as many.
        """
        keys: list[IntArray] = []
        for child, parent in zip(self.domains[:-1], self.domains[1:], strict=True):
            pairs, where = np.unique(np.stack([parent, child]), axis=1, return_inverse=True)
            parents: IntArray = pairs[0]
            number = numbers(len(parents)) - np.searchsorted(parents, parents, side="left")
            keys.append(number[where.reshape(-1)])
        keys.append(self.domains[-1])
        return np.lexsort(keys[::-1]).astype(np.int64)


def require_loads(loads: FloatArray, what: str = "loads") -> FloatArray:
    """Loads as floats [layers, experts].

    Raises:
        PermanentError: INVALID_ARGUMENT for NaN, infinite, huge or negative numbers, or a wrong
            shape.
    """
    if loads.ndim != 2 or 0 in loads.shape:  # noqa: PLR2004 - two dimensions
        shape = " x ".join(map(str, loads.shape)) or "a single number"
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"{what}: must be two-dimensional, [layers, experts], and not empty; got {shape}.",
        )
    found = loads.astype(np.float64)
    for name, wrong in (
        ("not finite", ~np.isfinite(found)),
        ("negative", found < 0),
        (f"above {LOAD_MAX:g}", found > LOAD_MAX),
    ):
        if wrong.any():
            layer, expert = np.argwhere(wrong)[0].tolist()
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"{what}: layer {layer}, expert {expert} is {name} ({found[layer, expert]:g}).",
            )
    return found
