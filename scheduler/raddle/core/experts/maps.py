"""Expert maps as arrays, back and forth, and what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raddle.core.experts.copies import count_copies
from raddle.core.experts.layout import EMPTY, BoolArray, IntArray, Layout
from raddle.model.expert_map import DieState, MapDocument
from raddle.model.types import ExpertMap, ExpertMapLayer


def to_expert_map(table: IntArray, slots_per_rank: int, experts: int) -> ExpertMap:
    layers = tuple(ExpertMapLayer(physical_to_logical=tuple(row)) for row in table.tolist())
    return ExpertMap(slots_per_rank=slots_per_rank, experts=experts, layers=layers)


def to_array(expert_map: ExpertMap) -> IntArray:
    """[layers, slots]"""
    rows = [layer.physical_to_logical for layer in expert_map.layers]
    found: IntArray = np.array(rows, dtype=np.int64)
    return found


def coverage_margin(expert_map: ExpertMap) -> int:
    """Ranks that may be lost, whichever they are, until an expert has no copy; -1: one has none.

    For maps that hold no expert twice on a rank; dead slots are -1.
    """
    if not expert_map.layers:
        return 0
    return int(count_copies(to_array(expert_map), expert_map.experts).min()) - 1


def layout_of(document: MapDocument) -> Layout:
    """The layout of a map file's dies; the living ones without the shared expert are hosts."""
    dies = document.dies
    domains = [list(range(len(dies))), [d.npu for d in dies], [d.node for d in dies]]
    domains.append([d.rack for d in dies])
    return Layout.of(
        np.array(domains, dtype=np.int64),
        np.array(document.slots_per_die, dtype=np.int64),
        hosts=np.array([d.state is DieState.LIVE and not d.shared for d in dies], dtype=bool),
        speeds=np.array([d.speed for d in dies]),
    )


def readable_dies(document: MapDocument) -> BoolArray:
    """[dies] whose memory can be read."""
    return np.array([die.state is not DieState.LOST for die in document.dies], dtype=bool)


def count_duplicates(table: IntArray, layout: Layout) -> int:
    """Copies of an expert on a die that has it already, over all layers."""
    ordered = np.sort(layout.to_grid(table), axis=2)
    return int(
        np.count_nonzero((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0))
    )


def find_uncovered(table: IntArray, experts: int, layout: Layout) -> tuple[tuple[int, int], ...]:
    """(layer, expert) without a copy on a host, in order."""
    held = (table >= 0) & (table < experts) & layout.hosts[layout.slot_die]
    layer, expert = np.nonzero(count_copies(np.where(held, table, EMPTY), experts) == 0)
    return tuple(zip(layer.tolist(), expert.tolist(), strict=True))


def check_map(
    table: IntArray, experts: int, layout: Layout, layers: Sequence[int] | None = None
) -> list[str]:
    """Every defect of a map [layers, slots], one sentence each, in the order of the layers.

    Args:
        layers: what to call the layers; by default their places from 0.
    """
    names = range(len(table)) if layers is None else layers
    found: list[tuple[int, int, str]] = []
    slot_die = layout.slot_die
    for layer, slot in np.argwhere((table < EMPTY) | (table >= experts)).tolist():
        text = f"slot {slot} (die {slot_die[slot]}) holds {table[layer, slot]}, which is no expert"
        found.append((layer, 0, f"{text} of {experts}"))
    idle = ~layout.hosts[slot_die]
    for layer, slot in np.argwhere((table >= 0) & idle).tolist():
        text = f"slot {slot} holds expert {table[layer, slot]}, but die {slot_die[slot]} hosts none"
        found.append((layer, 1, text))
    for layer, die, expert, times in _doubles(table, layout):
        found.append((layer, 2, f"die {die} holds expert {expert} {times} times"))
    for layer, expert in find_uncovered(table, experts, layout):
        found.append((layer, 3, f"expert {expert} has no live copy"))
    found.sort(key=lambda defect: defect[:2])
    return [f"layer {names[layer]}: {text}" for layer, _, text in found]


def _doubles(table: IntArray, layout: Layout) -> list[tuple[int, int, int, int]]:
    """(layer, die, expert, how often)"""
    layer, slot = np.nonzero(table >= 0)
    place = np.stack([layer, layout.slot_die[slot], table[layer, slot]])
    unique, times = np.unique(place, axis=1, return_counts=True)
    double = times > 1
    rows = np.concatenate([unique[:, double], times[None, double]]).T.tolist()
    return [(row[0], row[1], row[2], row[3]) for row in rows]
