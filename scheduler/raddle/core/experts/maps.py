"""Expert maps as arrays, back and forth, and what is wrong with one.

A map is an int array [layers, slots], -1 for an empty or dead slot; slot s sits on rank
s // slots_per_rank.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raddle.model.types import ExpertMap, ExpertMapLayer

IntArray = npt.NDArray[np.int64]


def to_expert_map(table: IntArray, slots_per_rank: int, experts: int) -> ExpertMap:
    layers = tuple(ExpertMapLayer(physical_to_logical=tuple(row)) for row in table.tolist())
    return ExpertMap(slots_per_rank=slots_per_rank, experts=experts, layers=layers)


def to_array(expert_map: ExpertMap) -> IntArray:
    """[layers, slots]"""
    rows = [layer.physical_to_logical for layer in expert_map.layers]
    found: IntArray = np.array(rows, dtype=np.int64)
    return found


def check_map(table: IntArray, experts: int, slots_per_rank: int, live: list[int]) -> list[str]:
    """Every defect of a map, in words: uncovered experts, doubles on a rank, wrong numbers."""
    defects: list[str] = []
    alive = set(live)
    for layer, row in enumerate(table.tolist()):
        wrong = sorted({e for e in row if not -1 <= e < experts})
        if wrong:
            defects.append(f"layer {layer}: no such experts: {wrong}")
        held = {e for slot, e in enumerate(row) if e >= 0 and slot // slots_per_rank in alive}
        missing = sorted(set(range(experts)) - held)
        if missing:
            defects.append(f"layer {layer}: experts without a live copy: {missing}")
        for rank in live:
            own = [e for e in row[rank * slots_per_rank : (rank + 1) * slots_per_rank] if e >= 0]
            twice = sorted({e for e in own if own.count(e) > 1})
            if twice:
                defects.append(f"layer {layer}: rank {rank} holds twice: {twice}")
    return defects
