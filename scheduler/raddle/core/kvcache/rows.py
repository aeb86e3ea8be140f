"""Rows of an open-addressing table over 64-bit keys, in flat arrays.

A row takes 20 bytes: key 8, space 4, four owners of 2 bytes. Rows are probed in windows of eight
neighbours, so that a batch costs a dozen numpy calls whatever its size. Homes grow with keys and
rows are never freed one by one, so an empty row parts the table: keys with a home before it stand
before it, all others after it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Spaces = NDArray[np.uint32]
RowNumbers = NDArray[np.intp]
Owners = NDArray[np.uint16]
Flags = NDArray[np.bool_]

HOLDERS_A_ROW = 4
_WINDOW = 8
# A key that finds no place this near to its home is not recorded (chosen keys could make it far).
PROBES_MAX = 256
_SEARCH = 4_096
_HALF = np.uint64(32)
EMPTY = np.uint64(0)


class Rows:
    """A fixed number of rows. Keys must be mixed well and never 0."""

    def __init__(self, size: int) -> None:
        self.size = size
        #: Rows with a key.
        self.used = 0
        rows = size + PROBES_MAX + _WINDOW
        self.keys: Keys = np.zeros(rows, dtype=np.uint64)
        self.spaces: Spaces = np.zeros(rows, dtype=np.uint32)
        self.holders: Owners = np.zeros((rows, HOLDERS_A_ROW), dtype=np.uint16)
        self._windows: Keys = np.lib.stride_tricks.sliding_window_view(self.keys, _WINDOW)

    def __len__(self) -> int:
        return self.keys.size

    def home(self, keys: Keys) -> RowNumbers:
        return (((keys >> _HALF) * np.uint64(self.size)) >> _HALF).astype(np.intp)

    def _stops(self, keys: Keys, rows: RowNumbers) -> tuple[RowNumbers, Keys]:
        """In each window: the row of the key, else the first empty one, else the window's first."""
        windows = self._windows[rows]
        ends = (windows == keys[:, None]) | (windows == EMPTY)
        rows = rows + ends.argmax(axis=1)
        return rows, self.keys[rows]

    def find(self, keys: Keys) -> tuple[RowNumbers, Keys]:
        """(row, what stands there): the key, or 0 where it would go, or another: no place."""
        rows, got = self._stops(keys, self.home(keys))
        open_ones = ((got != keys) & (got != EMPTY)).nonzero()[0]
        for _ in range(PROBES_MAX // _WINDOW):
            if not open_ones.size:
                break
            some = keys[open_ones]
            rows[open_ones], got[open_ones] = self._stops(some, rows[open_ones] + _WINDOW)
            left = (got[open_ones] != some) & (got[open_ones] != EMPTY)
            open_ones = open_ones[left]
        return rows, got

    def rows_of(self, keys: Keys, spaces: int | Spaces) -> tuple[RowNumbers, Flags]:
        """(row, is it there) by key; equal keys of another space are not there."""
        rows, got = self.find(keys)
        return rows, (got == keys) & (self.spaces[rows] == spaces)

    def rows_for(self, keys: Keys, spaces: int | Spaces) -> tuple[RowNumbers, Flags]:
        """(row, did it find one) by key; rows are made where they are missing."""
        rows, got = self.find(keys)
        while True:
            missing = (got == EMPTY).nonzero()[0]
            if not missing.size:
                break
            # Two keys may choose the same row: the later one wins it, the other looks on.
            places = rows[missing]
            self.keys[places] = keys[missing]
            self.spaces[places] = spaces if isinstance(spaces, int) else spaces[missing]
            rows[missing], got[missing] = self.find(keys[missing])
            self.used += len(set(places.tolist()))
        return rows, (got == keys) & (self.spaces[rows] == spaces)

    def parting(self, start: int) -> int:
        """The first empty row from `start` on, or the end."""
        for begin in range(start, len(self), _SEARCH):
            empty = (self.keys[begin : begin + _SEARCH] == EMPTY).nonzero()[0]
            if empty.size:
                return begin + int(empty[0])
        return len(self)
