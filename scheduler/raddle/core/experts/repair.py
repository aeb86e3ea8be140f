"""Repair of an expert map after ranks left or came: keep what is fine, move the fewest.

In go the old map, the ranks that are lost and those whose seat has a new process; out come the
new map and the loads that it needs. An expert without a live copy goes to an empty slot, else a
replica of another expert gives its slot (a donor); sources are live copies, near ones first, else
the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raddle.core.experts.maps import IntArray
from raddle.model.types import ExpertMove, WeightSource


@dataclass(frozen=True, slots=True)
class RepairedMap:
    """The new map [layers, slots], the loads by rank, and what it cost."""

    table: IntArray
    moves: dict[int, tuple[ExpertMove, ...]]
    #: Replicas of other experts that gave their slot.
    donor_slots: int
    #: (layer, expert) that no live rank can take.
    uncovered: tuple[tuple[int, int], ...]
    #: Slots that keep what they have in memory.
    kept: int = 0

    @property
    def experts_moved(self) -> int:
        return sum(len(moves) for moves in self.moves.values())


def repair_map(
    table: IntArray,
    slots_per_rank: int,
    experts: int,
    *,
    live: Sequence[int],
    joined: Sequence[int] = (),
    domains: IntArray | None = None,
    guests_refused: Sequence[int] = (),
) -> RepairedMap:
    """Repair a map.

    Args:
        table: [layers, slots] before.
        live: ranks that serve afterwards, those of `joined` included.
        joined: ranks whose seat has a new process: what the map gives them is loaded anew.
        domains: [levels, ranks]; near sources are preferred. None: by rank number.
        guests_refused: ranks that take no expert (they host the shared expert).
    """
    new = table.copy()
    ranks = table.shape[1] // slots_per_rank
    alive = np.zeros(ranks, dtype=bool)
    alive[list(live)] = True
    new[:, ~np.repeat(alive, slots_per_rank)] = -1
    fresh = np.zeros(ranks, dtype=bool)
    fresh[list(joined)] = True
    hosts = alive.copy()
    hosts[list(guests_refused)] = False
    work = _Repair(new, slots_per_rank, experts, alive, fresh, hosts, domains)
    for layer in range(new.shape[0]):
        work.layer(layer)
    moves = {rank: tuple(found) for rank, found in sorted(work.moves.items())}
    untouched = (new >= 0) & (new == table) & ~np.repeat(fresh, slots_per_rank)
    kept = int(np.count_nonzero(untouched))
    return RepairedMap(new, moves, work.donor_slots, tuple(work.uncovered), kept)


class _Repair:
    """One repair under way; `table` is changed in place."""

    def __init__(
        self,
        table: IntArray,
        slots_per_rank: int,
        experts: int,
        alive: np.ndarray[tuple[int], np.dtype[np.bool_]],
        fresh: np.ndarray[tuple[int], np.dtype[np.bool_]],
        hosts: np.ndarray[tuple[int], np.dtype[np.bool_]],
        domains: IntArray | None,
    ) -> None:
        self.table = table
        self.width = slots_per_rank
        self.experts = experts
        self.alive = alive
        self.fresh_slots = np.repeat(fresh, slots_per_rank)
        self.fresh = fresh
        #: Slots that may take another expert.
        self.host_slots = np.repeat(hosts, slots_per_rank)
        self.domains = domains
        self.moves: dict[int, list[ExpertMove]] = {}
        self.donor_slots = 0
        self.uncovered: list[tuple[int, int]] = []
        #: Loads added to each rank by this repair, over all layers: spread them.
        self.added = np.zeros(len(alive), dtype=np.int64)

    def layer(self, layer: int) -> None:
        """Choose all slots first: only then is it known which copies stay to be read from."""
        row = self.table[layer]
        counts = np.bincount(row[row >= 0], minlength=self.experts)
        self.added += np.bincount(
            np.flatnonzero(self.fresh_slots & (row >= 0)) // self.width, minlength=len(self.added)
        )
        chosen: list[int] = []
        for expert in np.flatnonzero(counts == 0):
            slot = self._slot_for(row, counts)
            if slot is None:
                self.uncovered.append((layer, int(expert)))
                continue
            if row[slot] >= 0:
                counts[row[slot]] -= 1
                self.donor_slots += 1
            row[slot] = expert
            counts[expert] = 1
            chosen.append(slot)
            self.added[slot // self.width] += 1
        anew = np.flatnonzero(self.fresh_slots & (row >= 0)).tolist()
        for slot in sorted({*chosen, *map(int, anew)}):
            self._load(layer, slot, int(row[slot]))

    def _slot_for(
        self, row: IntArray, counts: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> int | None:
        """An empty slot of the least burdened rank, else that of a replica which gives way.

        Replicas of new processes go first, since they would have to be loaded in any case; then
        those of the most replicated expert.
        """
        empty = np.flatnonzero(self.host_slots & (row < 0))
        if len(empty):
            burden = self.added[empty // self.width]
            return int(empty[int(np.argmin(burden))])
        spare = np.flatnonzero(self.host_slots & (row >= 0) & (counts[np.maximum(row, 0)] > 1))
        if not len(spare):
            return None
        burden = self.added[spare // self.width]
        keys = np.lexsort((spare, burden, -counts[row[spare]], ~self.fresh_slots[spare]))
        return int(spare[int(keys[0])])

    def _load(self, layer: int, slot: int, expert: int) -> None:
        rank = slot // self.width
        source_rank = self._nearest_copy(layer, expert, rank)
        source = WeightSource.DISK if source_rank is None else WeightSource.PEER
        move = ExpertMove(
            layer=layer, expert=expert, slot=slot, source=source, source_rank=source_rank or 0
        )
        self.moves.setdefault(rank, []).append(move)

    def _nearest_copy(self, layer: int, expert: int, rank: int) -> int | None:
        """A live rank that has the weights in memory, the one with most domains in common."""
        holders = np.flatnonzero(self.table[layer] == expert) // self.width
        holders = holders[self.alive[holders] & ~self.fresh[holders] & (holders != rank)]
        if not len(holders):
            return None
        if self.domains is None:
            return int(holders[0])
        common = (self.domains[:, holders] == self.domains[:, rank : rank + 1]).sum(axis=0)
        return int(holders[int(np.argmax(common))])
