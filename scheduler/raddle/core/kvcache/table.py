"""Blocks and who holds them, in flat arrays: an open-addressing table over 64-bit keys.

In go batches of keys and the number of an owner, out come rows, presence and owners. Who an owner
is, and whether it may still speak, is the index's business. A row takes 20 bytes: key 8, space 4,
four owners of 2 bytes; a block that more than four owners hold keeps the others beside the arrays.

Rows are probed in windows of eight neighbours, so that a batch costs a dozen numpy calls whatever
its size. Rows are never freed one by one: a row without a living owner is hollow, its key keeps
its place until the next rebuild, and owners die at once by a flag.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Rows = NDArray[np.intp]
Owners = NDArray[np.uint16]
Flags = NDArray[np.bool_]

OWNERS_MAX = 65_535
HOLDERS_A_ROW = 4
_WINDOW = 8
# A key that finds no place this near to its home is not recorded (chosen keys could make it far).
_PROBES_MAX = 256
_ROWS_MIN = 1_024
_LOAD_MAX = 0.65
_LOAD_AFTER_REBUILD = 0.43
_HALF = np.uint64(32)
_EMPTY = np.uint64(0)


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
        self._used = 0
        self._more: dict[int, set[int]] = {}
        self._allocate(_ROWS_MIN)

    def _allocate(self, size: int) -> None:
        self._size = size
        rows = size + _PROBES_MAX + _WINDOW
        self._keys: Keys = np.zeros(rows, dtype=np.uint64)
        self._spaces: NDArray[np.uint32] = np.zeros(rows, dtype=np.uint32)
        self._holders: Owners = np.zeros((rows, HOLDERS_A_ROW), dtype=np.uint16)
        self._windows: Keys = np.lib.stride_tricks.sliding_window_view(self._keys, _WINDOW)

    # --- rows ----------------------------------------------------------------------------------

    def _home(self, keys: Keys) -> Rows:
        return (((keys >> _HALF) * np.uint64(self._size)) >> _HALF).astype(np.intp)

    def _stops(self, keys: Keys, rows: Rows) -> tuple[Rows, Keys]:
        """In each window: the row of the key, else the first empty one, else the window's first."""
        windows = self._windows[rows]
        ends = (windows == keys[:, None]) | (windows == _EMPTY)
        rows = rows + ends.argmax(axis=1)
        return rows, self._keys[rows]

    def _find(self, keys: Keys) -> tuple[Rows, Keys]:
        """(row, what stands there): the key, or 0 where it would go, or another: no place."""
        rows, got = self._stops(keys, self._home(keys))
        open_ones = ((got != keys) & (got != _EMPTY)).nonzero()[0]
        for _ in range(_PROBES_MAX // _WINDOW):
            if not open_ones.size:
                break
            some = keys[open_ones]
            rows[open_ones], got[open_ones] = self._stops(some, rows[open_ones] + _WINDOW)
            left = (got[open_ones] != some) & (got[open_ones] != _EMPTY)
            open_ones = open_ones[left]
        return rows, got

    def _rows_of(self, keys: Keys, spaces: int | NDArray[np.uint32]) -> tuple[Rows, Flags]:
        """(row, is it there) by key; equal keys of another space are not there."""
        rows, got = self._find(keys)
        return rows, (got == keys) & (self._spaces[rows] == spaces)

    def _rows_for(self, keys: Keys, space: int) -> Rows:
        """Rows of the keys, made where they are missing; what finds no place is left out."""
        rows, got = self._find(keys)
        while True:
            missing = (got == _EMPTY).nonzero()[0]
            if not missing.size:
                break
            # Two keys may choose the same row: the later one wins it, the other looks on.
            places = rows[missing]
            self._keys[places] = keys[missing]
            self._spaces[places] = space
            rows[missing], got[missing] = self._find(keys[missing])
            self._used += len(set(places.tolist()))
        good = (got == keys) & (self._spaces[rows] == space)
        if not good.all():
            self.refused += int((~good).sum())
            rows = rows[good]
        return rows

    # --- changes -------------------------------------------------------------------------------

    def add(self, keys: Keys, space: int, owner: int) -> None:
        """The owner holds these keys from now on; what it held already changes nothing."""
        if self._used + keys.size > self._size * _LOAD_MAX:
            self.rebuild(room=keys.size)
        if self._used + keys.size > self._blocks_max:
            self.refused += keys.size
            return
        rows = self._rows_for(keys, space)
        held = self._holders[rows]
        new = ~(held == owner).any(axis=1)
        if not new.any():
            return
        rows, held = rows[new], held[new]
        if self._more:
            kept = [owner not in self._more.get(key, ()) for key in self._keys[rows].tolist()]
            rows, held = rows[kept], held[kept]
        free = ~self.alive[held]
        columns = free.argmax(axis=1)
        fits = free[np.arange(rows.size), columns]
        self._holders[rows[fits], columns[fits]] = owner
        if not fits.all():
            for key in self._keys[rows[~fits]].tolist():
                self._more.setdefault(key, set()).add(owner)
        self.counts[owner] += len(set(rows.tolist()))

    def remove(self, keys: Keys, space: int, owner: int) -> None:
        """The owner holds these keys no more."""
        rows, found = self._rows_of(keys, space)
        rows = rows[found]
        at, columns = (self._holders[rows] == owner).nonzero()
        places = rows[at]
        self._holders[places, columns] = 0
        gone = len(set(places.tolist()))
        if self._more:
            gone += self._remove_more(rows, owner)
        self.counts[owner] -= gone

    def _remove_more(self, rows: Rows, owner: int) -> int:
        """Take the owner out of the overflow of these rows, and fill freed columns from there."""
        gone = 0
        for row, key in zip(rows.tolist(), self._keys[rows].tolist(), strict=True):
            more = self._more.get(key)
            if more is None:
                continue
            if owner in more:
                more.discard(owner)
                gone += 1
            self._promote(row, more)
            if not more:
                del self._more[key]
        return gone

    def _promote(self, row: int, more: set[int]) -> None:
        for column in (~self.alive[self._holders[row]]).nonzero()[0].tolist():
            living = [owner for owner in sorted(more) if self.alive[owner]]
            if not living:
                more.clear()
                return
            self._holders[row, column] = living[0]
            more.discard(living[0])

    def kill(self, owner: int) -> None:
        """All locations of the owner are void from now on; its number is free after a rebuild."""
        self.alive[owner] = False
        self.counts[owner] = 0

    def rebuild(self, *, room: int = 0) -> None:
        """Drop dead locations and hollow rows, with room for `room` more keys.

        Rows are laid out in the order of their keys: with home h of the i-th key the place is
        max over j <= i of (h_j - j) + i, which is what inserting one by one in that order gives.
        """
        self._holders[~self.alive[self._holders]] = 0
        rows = (self._keys != _EMPTY).nonzero()[0]
        for row in rows[np.isin(self._keys[rows], self._more_keys())].tolist():
            more = self._more[int(self._keys[row])]
            self._promote(row, more)
            more.intersection_update([owner for owner in sorted(more) if self.alive[owner]])
        self._more = {key: more for key, more in self._more.items() if more}
        rows = rows[self._holders[rows].any(axis=1)]
        rows = rows[self._keys[rows].argsort(kind="stable")]
        keys, spaces, holders = self._keys[rows], self._spaces[rows], self._holders[rows]
        size = max(_ROWS_MIN, int((rows.size + room) / _LOAD_AFTER_REBUILD))
        while True:
            self._allocate(size)
            home = self._home(keys)
            count: Rows = np.arange(rows.size, dtype=np.intp)
            places: Rows = np.maximum.accumulate(home - count) + count
            if not rows.size or int((places - home).max()) < _PROBES_MAX:
                break
            size += size // 2
        self._keys[places], self._spaces[places], self._holders[places] = keys, spaces, holders
        self._used = rows.size

    def _more_keys(self) -> Keys:
        return np.fromiter(self._more, dtype=np.uint64, count=len(self._more))

    # --- questions -----------------------------------------------------------------------------

    def holders(
        self, keys: Keys, spaces: int | NDArray[np.uint32], allowed: Flags | None = None
    ) -> Owners:
        """[key, 4]: living (and allowed) owners of each key, 0 for none.

        Of a key with more owners at least one that is allowed is given, if there is one.
        """
        allowed = self.alive if allowed is None else np.logical_and(allowed, self.alive)
        rows, found = self._rows_of(keys, spaces)
        held = self._holders[rows]
        held[~(allowed[held] & found[:, None])] = 0
        if self._more:
            for at in (found & ~held.any(axis=1)).nonzero()[0].tolist():
                more = self._more.get(int(keys[at]), ())
                held[at, 0] = next((owner for owner in sorted(more) if allowed[owner]), 0)
        return held

    def present(
        self, keys: Keys, spaces: int | NDArray[np.uint32], allowed: Flags | None = None
    ) -> Flags:
        """[key]: does any living (and allowed) owner hold it?"""
        return np.asarray(self.holders(keys, spaces, allowed).any(axis=1))

    def all_holders(self, key: int, space: int) -> list[int]:
        """Every living owner of one key, in order."""
        rows, found = self._rows_of(np.array([key], dtype=np.uint64), space)
        if not found[0]:
            return []
        held = {*self._holders[rows[0]].tolist(), *self._more.get(key, ())}
        return [owner for owner in sorted(held) if self.alive[owner]]

    def copies(self, allowed: Flags) -> NDArray[np.int64]:
        """How many blocks have 0, 1, 2, ... allowed living owners; blocks without one count 0."""
        allowed = np.logical_and(allowed, self.alive)
        counts = allowed[self._holders].sum(axis=1)
        for row in np.isin(self._keys, self._more_keys()).nonzero()[0].tolist():
            counts[row] += sum(bool(allowed[o]) for o in self._more[int(self._keys[row])])
        found: NDArray[np.int64] = np.bincount(counts[counts > 0], minlength=1)
        return found

    def spaces_in_use(self) -> set[int]:
        return set(np.unique(self._spaces[self._keys != _EMPTY]).tolist())

    @property
    def blocks(self) -> int:
        """Distinct keys with a living owner."""
        return int(self.alive[self._holders].any(axis=1).sum())

    @property
    def bytes(self) -> int:
        """Of the arrays."""
        return self._keys.nbytes + self._spaces.nbytes + self._holders.nbytes

    def validate(self) -> None:
        """Assert what holds between any two calls."""
        keys = self._keys[self._keys != _EMPTY]
        assert keys.size == self._used, f"{keys.size} keys, {self._used} counted"
        assert np.unique(keys).size == keys.size, "a key stands twice"
        rows, got = self._find(keys)
        assert (got == keys).all(), "a key is not found where it stands"
        held = np.where(self.alive[self._holders], self._holders, 0)
        living = np.bincount(held.ravel(), minlength=OWNERS_MAX + 1)
        for key, more in self._more.items():
            row = rows[(keys == key).nonzero()[0][0]]
            for owner in more:
                assert owner not in self._holders[row], f"{owner} holds {key} twice"
                living[owner] += self.alive[owner]
        living[0] = 0
        assert (living == self.counts).all(), "locations are counted wrongly"
