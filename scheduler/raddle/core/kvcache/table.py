"""Blocks and who holds them, by 64-bit key.

In go batches of keys and the number of an owner, out come presence and owners. Who an owner is,
and whether it may still speak, is the index's business. A row has room for four owners; a block
that more hold keeps the others beside the rows.

Rows are never freed one by one: a row without a living owner is hollow, its key keeps its place,
and owners die at once by a flag. What is dead goes when the rows are laid out anew, which happens
when they get full, and happens in slices: with each batch that is stored some rows of the old
layout move to the new one, in the order of their keys, and what is asked in between is looked up in
one of the two by its key. So no call takes much longer than another, whatever the table's size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raddle.core.kvcache.rows import (
    EMPTY,
    Flags,
    Keys,
    Owners,
    RowNumbers,
    Rows,
    Spaces,
)

OWNERS_MAX = 65_535
_ROWS_MIN = 1_024
_LOAD_MAX = 0.65
_LOAD_AFTER_LAYOUT = 0.43
# Rows that move to the new layout with each stored batch: at least so many, and so many a key, so
# that all have moved long before the new layout is full.
_SLICE_ROWS_MIN = 1_024
_SLICE_ROWS_A_KEY = 8
# Rows that are counted in one piece.
_COUNT_ROWS = 1 << 17


class BlockTable:
    """Which owners hold which key. Keys must be mixed well and never 0."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        #: alive[owner]: a dead one's locations do not count, wherever they still stand.
        self.alive: Flags = np.zeros(OWNERS_MAX + 1, dtype=np.bool_)
        #: Locations of each owner.
        self.counts: NDArray[np.int64] = np.zeros(OWNERS_MAX + 1, dtype=np.int64)
        #: Keys that found no place; they are looked up as missing.
        self.refused = 0
        #: New layouts that were begun, and completed.
        self.layouts_begun = 0
        self.layouts_done = 0
        self._more: dict[int, set[int]] = {}
        self._rows = Rows(_ROWS_MIN)
        #: The layout before, while rows of it are left: those from `_cut` on.
        self._old: Rows | None = None
        self._cut = 0

    @property
    def _used(self) -> int:
        return self._rows.used + (self._old.used if self._old is not None else 0)

    def _split(self, keys: Keys) -> list[tuple[Rows, slice | RowNumbers]]:
        """Where the keys belong now: rows, and which of the keys."""
        if self._old is None:
            return [(self._rows, slice(None))]
        moved = self._old.home(keys) < self._cut
        parts = [(self._rows, moved.nonzero()[0]), (self._old, (~moved).nonzero()[0])]
        return [(rows, at) for rows, at in parts if at.size]

    # --- changes -------------------------------------------------------------------------------

    def add(self, keys: Keys, space: int, owner: int) -> None:
        """The owner holds these keys from now on; what it held already changes nothing."""
        if self._old is None and self._used + keys.size > self._rows.size * _LOAD_MAX:
            self._begin_layout(room=keys.size)
        if self._old is not None:
            self._move_rows(max(_SLICE_ROWS_MIN, _SLICE_ROWS_A_KEY * keys.size))
        if self._used + keys.size > self._blocks_max:
            self.refused += keys.size
            return
        for rows, at in self._split(keys):
            self._add_to(rows, keys[at], space, owner)

    def _add_to(self, rows: Rows, keys: Keys, space: int, owner: int) -> None:
        numbers, good = rows.rows_for(keys, space)
        if not good.all():
            self.refused += int((~good).sum())
            numbers = numbers[good]
        held = rows.holders[numbers]
        new = ~(held == owner).any(axis=1)
        if not new.any():
            return
        numbers, held = numbers[new], held[new]
        if self._more:
            kept = [owner not in self._more.get(key, ()) for key in rows.keys[numbers].tolist()]
            numbers, held = numbers[kept], held[kept]
        free = ~self.alive[held]
        columns = free.argmax(axis=1)
        fits = free[np.arange(numbers.size), columns]
        rows.holders[numbers[fits], columns[fits]] = owner
        if not fits.all():
            for key in rows.keys[numbers[~fits]].tolist():
                self._more.setdefault(key, set()).add(owner)
        self.counts[owner] += len(set(numbers.tolist()))

    def remove(self, keys: Keys, space: int, owner: int) -> None:
        """The owner holds these keys no more."""
        for rows, at in self._split(keys):
            numbers, found = rows.rows_of(keys[at], space)
            numbers = numbers[found]
            which, columns = (rows.holders[numbers] == owner).nonzero()
            places = numbers[which]
            rows.holders[places, columns] = 0
            gone = len(set(places.tolist()))
            if self._more:
                gone += self._remove_more(rows, numbers, owner)
            self.counts[owner] -= gone

    def _remove_more(self, rows: Rows, numbers: RowNumbers, owner: int) -> int:
        """Take the owner out of the overflow of these rows, and fill freed columns from there."""
        gone = 0
        for number, key in zip(numbers.tolist(), rows.keys[numbers].tolist(), strict=True):
            more = self._more.get(key)
            if more is None:
                continue
            if owner in more:
                more.discard(owner)
                gone += 1
            self._promote(rows.holders[number], more)
            if not more:
                del self._more[key]
        return gone

    def _promote(self, held: Owners, more: set[int]) -> None:
        """Fill free columns of a row from its overflow."""
        for column in (~self.alive[held]).nonzero()[0].tolist():
            living = [owner for owner in sorted(more) if self.alive[owner]]
            if not living:
                more.clear()
                return
            held[column] = living[0]
            more.discard(living[0])

    def kill(self, owner: int) -> None:
        """All locations of the owner are void from now on.

        Its number is free when a layout is done that was begun later.
        """
        self.alive[owner] = False
        self.counts[owner] = 0

    # --- layouts -------------------------------------------------------------------------------

    def _begin_layout(self, *, room: int) -> None:
        """New rows, with room for so many keys more; those that are there move bit by bit."""
        assert self._old is None, "a layout is begun before the last one is done"
        living = min(self._used, int(self.counts.sum()))
        self._old, self._cut = self._rows, 0
        self._rows = Rows(max(_ROWS_MIN, int((living + room) / _LOAD_AFTER_LAYOUT)))
        self.layouts_begun += 1

    def rebuild(self) -> None:
        """Lay all rows out anew at once: what is dead is gone, numbers of the dead are free."""
        self._finish_layout()
        self._begin_layout(room=0)
        self._finish_layout()

    def _finish_layout(self) -> None:
        if self._old is not None:
            self._move_rows(len(self._old))

    def clean_some(self) -> None:
        """Begin a layout if none is under way; it goes on with what is stored."""
        if self._old is None:
            self._begin_layout(room=_ROWS_MIN)

    def _move_rows(self, count: int) -> None:
        """Move about so many of the old rows: up to the next empty one."""
        old = self._old
        assert old is not None
        end = old.parting(min(len(old), self._cut + count))
        numbers = self._cut + (old.keys[self._cut : end] != EMPTY).nonzero()[0]
        keys, holders = old.keys[numbers], old.holders[numbers]
        holders[~self.alive[holders]] = 0
        if self._more:
            self._clean_more(keys, holders)
        kept = holders.any(axis=1)
        keys, holders = keys[kept], holders[kept]
        places, good = self._rows.rows_for(keys, old.spaces[numbers[kept]])
        self._rows.holders[places[good]] = holders[good]
        if not good.all():
            self._refuse(keys[~good], holders[~good])
        old.used -= numbers.size
        self._cut = end
        if end >= len(old):
            self._old = None
            self.layouts_done += 1

    def _clean_more(self, keys: Keys, holders: Owners) -> None:
        """Drop the dead from the overflow of these rows, whose free columns are filled."""
        names = np.fromiter(self._more, dtype=np.uint64, count=len(self._more))
        for at in np.isin(keys, names).nonzero()[0].tolist():
            more = self._more[int(keys[at])]
            self._promote(holders[at], more)
            more.intersection_update([owner for owner in sorted(more) if self.alive[owner]])
            if not more:
                del self._more[int(keys[at])]

    def _refuse(self, keys: Keys, holders: Owners) -> None:
        """Keys that found no place in the new layout are known no more."""
        self.refused += keys.size
        gone = np.bincount(holders.ravel(), minlength=OWNERS_MAX + 1)
        gone[0] = 0
        self.counts -= gone
        for key in keys.tolist():
            for owner in self._more.pop(key, ()):
                self.counts[owner] -= self.alive[owner]

    # --- questions -----------------------------------------------------------------------------

    def holders(self, keys: Keys, spaces: int | Spaces, allowed: Flags | None = None) -> Owners:
        """[key, 4]: living (and allowed) owners of each key, 0 for none.

        Of a key with more owners at least one that is allowed is given, if there is one.
        """
        allowed = self.alive if allowed is None else np.logical_and(allowed, self.alive)
        parts = [
            (at, self._holders_in(rows, keys[at], _some(spaces, at), allowed))
            for rows, at in self._split(keys)
        ]
        if len(parts) == 1:
            return parts[0][1]
        found: Owners = np.zeros((keys.size, self._rows.holders.shape[1]), dtype=np.uint16)
        for at, held in parts:
            found[at] = held
        return found

    def _holders_in(self, rows: Rows, keys: Keys, spaces: int | Spaces, allowed: Flags) -> Owners:
        numbers, found = rows.rows_of(keys, spaces)
        held = rows.holders[numbers]
        held[~(allowed[held] & found[:, None])] = 0
        if self._more:
            for at in (found & ~held.any(axis=1)).nonzero()[0].tolist():
                more = self._more.get(int(keys[at]), ())
                held[at, 0] = next((owner for owner in sorted(more) if allowed[owner]), 0)
        return held

    def present(self, keys: Keys, spaces: int | Spaces, allowed: Flags | None = None) -> Flags:
        """[key]: does any living (and allowed) owner hold it?"""
        return np.asarray(self.holders(keys, spaces, allowed).any(axis=1))

    def all_holders(self, key: int, space: int) -> list[int]:
        """Every living owner of one key, in order."""
        wanted = np.array([key], dtype=np.uint64)
        ((rows, _),) = self._split(wanted)
        numbers, found = rows.rows_of(wanted, space)
        if not found[0]:
            return []
        held = {*rows.holders[numbers[0]].tolist(), *self._more.get(key, ())}
        return [owner for owner in sorted(held) if self.alive[owner]]

    def _parts(self) -> list[tuple[Rows, int]]:
        """All rows that count, as rows and the first of them."""
        return [(self._rows, 0), *([] if self._old is None else [(self._old, self._cut)])]

    def copies(self, allowed: Flags) -> Iterator[NDArray[np.int64]]:
        """How many blocks have 0, 1, 2, ... allowed living owners; blocks without one count 0.

        In pieces, to be added up; what is stored between two of them may be missed.
        """
        allowed = np.logical_and(allowed, self.alive)
        ones = allowed.astype(np.uint8)
        most = int(allowed.sum())
        more = {key: sum(bool(allowed[o]) for o in owners) for key, owners in self._more.items()}
        names = np.fromiter(more, dtype=np.uint64, count=len(more))
        for rows, first in self._parts():
            for start in range(first, len(rows), _COUNT_ROWS):
                held = rows.holders[start : start + _COUNT_ROWS]
                counts = ones[held].sum(axis=1, dtype=np.intp)
                if more:
                    keys = rows.keys[start : start + _COUNT_ROWS]
                    for row in np.isin(keys, names).nonzero()[0].tolist():
                        counts[row] += more[int(keys[row])]
                found: NDArray[np.int64] = np.bincount(counts, minlength=most + 1)
                found[0] = 0
                yield found

    def spaces_in_use(self) -> set[int]:
        return {
            space
            for rows, first in self._parts()
            for space in np.unique(rows.spaces[first:][rows.keys[first:] != EMPTY]).tolist()
        }

    @property
    def blocks(self) -> int:
        """Distinct keys with a living owner."""
        return sum(
            int(self.alive[rows.holders[first:]].any(axis=1).sum()) for rows, first in self._parts()
        )

    @property
    def bytes(self) -> int:
        """Of the arrays."""
        return sum(
            rows.keys.nbytes + rows.spaces.nbytes + rows.holders.nbytes for rows, _ in self._parts()
        )

    def validate(self) -> None:
        """Assert what holds between any two calls."""
        living = np.zeros(OWNERS_MAX + 1, dtype=np.int64)
        seen: list[Keys] = []
        for rows, first in self._parts():
            numbers = first + (rows.keys[first:] != EMPTY).nonzero()[0]
            keys = rows.keys[numbers]
            seen.append(keys)
            assert keys.size == rows.used, f"{keys.size} keys, {rows.used} counted"
            if keys.size:
                assert all(part is rows for part, _ in self._split(keys)), "a key stands elsewhere"
            assert (rows.find(keys)[0] == numbers).all(), "a key is not found where it stands"
            held = np.where(self.alive[rows.holders[first:]], rows.holders[first:], 0)
            living += np.bincount(held.ravel(), minlength=OWNERS_MAX + 1)
            for at in np.isin(keys, list(self._more)).nonzero()[0].tolist():
                key = int(keys[at])
                for owner in self._more[key]:
                    assert owner not in rows.holders[numbers[at]], f"{owner} holds {key} twice"
                    living[owner] += self.alive[owner]
        whole = np.concatenate(seen)
        assert np.unique(whole).size == whole.size, "a key stands twice"
        living[0] = 0
        assert (living == self.counts).all(), "locations are counted wrongly"


def _some(spaces: int | Spaces, at: slice | RowNumbers) -> int | Spaces:
    return spaces if isinstance(spaces, int) else spaces[at]
