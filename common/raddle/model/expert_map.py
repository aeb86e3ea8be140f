"""An expert map on its own, with the dies that it is laid out on: what map files say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt


class DieState(StrEnum):
    """Whether a die of a map can hold experts, and whether its memory can be read."""

    LIVE = "live"
    # Holds nothing, its memory is gone.
    LOST = "lost"
    # Is to hold nothing, but what it holds may still be read.
    DRAINED = "drained"


@dataclass(frozen=True, slots=True, kw_only=True)
class MapDie:
    """One die: its failure domains by number, its state and speed."""

    npu: int
    node: int
    rack: int
    state: DieState = DieState.LIVE
    #: Holds the shared expert alone: its slots stay -1.
    shared: bool = False
    #: Relative; 1.0 for a healthy die.
    speed: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapDocument:
    """A map file. Slots are die by die: the first `slots_per_die[0]` columns are die 0's."""

    #: [layers, slots] logical experts, -1 for an empty or dead slot.
    physical_to_logical: npt.NDArray[np.int64]
    experts: int
    slots_per_die: tuple[int, ...]
    dies: tuple[MapDie, ...]
    #: False: the file does not say how many, `experts` is the highest number and one.
    experts_stated: bool = True
