"""Runs the decisions on map files, measures their CPU time, and shows what came out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from raddle.cli.experts.picture import load_picture
from raddle.cli.session import print_data, print_table, printable, say
from raddle.core.experts.balance import balancedness, best_balancedness, die_loads
from raddle.core.experts.coverage import Coverage, DomainLoss, measure_coverage
from raddle.core.experts.layout import BoolArray, FloatArray
from raddle.core.experts.maps import (
    check_map,
    count_duplicates,
    layout_of,
    readable_dies,
)
from raddle.core.experts.place import place_experts
from raddle.core.experts.rebalance import rebalance_map
from raddle.core.experts.repair import repair_map
from raddle.core.experts.sources import Bandwidths, Sources, choose_sources
from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import MapDocument
from raddle.model.types import WeightSource
from raddle.wire.expert_maps import MapReading

RUNS = 5


@dataclass(frozen=True, slots=True)
class Result:
    """A new map and what is said of it."""

    document: MapDocument
    wanted: FloatArray
    cpu_ms: float
    #: (layer, die, expert) that are newly loaded.
    loads: int
    more: dict[str, Any] = field(default_factory=dict[str, Any])


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and its CPU milliseconds: best of five after one warm-up."""
    found = work()
    best = np.inf
    for _ in range(RUNS):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return found, round(float(best) * 1e3, 3)


def place(document: MapDocument, wanted: FloatArray) -> Result:
    layout = layout_of(document)
    table, cpu_ms = timed(lambda: place_experts(wanted, layout))
    document = replace(document, physical_to_logical=table, experts=wanted.shape[1])
    return Result(document, wanted, cpu_ms, int(np.count_nonzero(table >= 0)))


def repair(
    before: MapDocument,
    after: MapDocument,
    wanted: FloatArray,
    fresh: BoolArray,
    swaps: int | None,
    rates: Bandwidths,
) -> Result:
    """Repair; `after` has the old table and the new dies."""
    before = _fitting(before, wanted)
    old, layout = layout_of(before), layout_of(after)
    if not layout.hosts.any():
        raise PermanentError(Reason.DOES_NOT_FIT, "no die is left to hold experts.")
    table = before.physical_to_logical
    readable = readable_dies(after) & ~fresh
    respeeded = old.speeds != layout.speeds

    change, cpu_ms = timed(
        lambda: repair_map(table, wanted, layout, joined=fresh, respeeded=respeeded, swaps=swaps)
    )
    # Who sends the weights is asked once the map is known: another decision, told by itself.
    sources, sources_cpu_ms = timed(lambda: choose_sources(change, table, layout, readable, rates))
    new = replace(after, physical_to_logical=change.table, experts=before.experts)
    more = {
        # At the new speeds: what the repair found, and not what was before the die got slow.
        "balancedness_before": _rounded(
            balancedness(table, wanted, replace(old, speeds=layout.speeds))
        ),
        "donor_slots": change.donor_slots,
        "kept": change.kept,
        "sources_cpu_ms": sources_cpu_ms,
        **_sources(sources),
    }
    return Result(new, wanted, cpu_ms, change.loads, more)


def rebalance(
    document: MapDocument,
    wanted: FloatArray,
    rates: Bandwidths,
    *,
    horizon_s: float,
    gain_min: float,
    swaps: int | None,
) -> Result:
    document = _fitting(document, wanted)
    layout, table = layout_of(document), document.physical_to_logical
    if defects := check_map(table, document.experts, layout):
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"only a sound map can be rebalanced: {defects[0]} (defects: {len(defects)}); mend it"
            " with `raddle experts repair`.",
        )
    found, cpu_ms = timed(
        lambda: rebalance_map(
            table, wanted, layout, rates, horizon_s=horizon_s, gain_min=gain_min, swaps=swaps
        )
    )
    more = {
        "balancedness_before": _rounded(found.balance_before),
        "gain_s": _rounded(found.gain_s),
        "cost_s": _rounded(found.cost_s),
        "reason": found.why.reason,
        "message": found.why.message,
    }
    new = replace(document, physical_to_logical=found.change.table)
    return Result(new, wanted, cpu_ms, found.change.loads, more)


def _fitting(document: MapDocument, wanted: FloatArray) -> MapDocument:
    """The map with the experts of the loads; refused if they are of different models."""
    layers, experts = wanted.shape
    table = document.physical_to_logical
    stated = document.experts_stated
    fits = document.experts == experts if stated else document.experts <= experts
    if len(table) != layers or not fits:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"the map has {len(table)} layers of {document.experts} experts, the loads have"
            f" {layers} layers of {experts}: they are of different models.",
        )
    document = replace(document, experts=experts)
    wrong = (table < -1) | (table >= experts)
    doubles = count_duplicates(table, layout_of(document))
    if wrong.any() or doubles:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            "the map holds an expert twice on a die or one that does not exist:"
            " `raddle experts check` names them.",
        )
    return document


def _sources(sources: Sources) -> dict[str, Any]:
    kinds = (WeightSource.PEER, WeightSource.POOL, WeightSource.DISK)
    counts = {str(kind).lower(): sources.source.count(kind) for kind in kinds}
    return {"sources": counts, "predicted_s": round(sources.predicted_s, 6)}


def _rounded(value: float) -> float:
    return round(value, 6)


def show(result: Result, form: str, bytes_per_expert: int) -> bool:
    """Figures as data, or a picture of the dies and the figures for people.

    Returns:
        Whether every expert has a copy; if not, they are named and a warning goes to stderr.
    """
    document, layout = result.document, layout_of(result.document)
    table = document.physical_to_logical
    coverage = measure_coverage(table, document.experts, layout)
    balance = balancedness(table, result.wanted, layout)
    bound = best_balancedness(result.wanted, layout)
    figures = {
        "cpu_ms": result.cpu_ms,
        "balancedness": _rounded(balance),
        "bound": _rounded(bound),
        "gap": _rounded(max(bound - balance, 0.0)),
        "duplicates": count_duplicates(table, layout),
        "uncovered": len(coverage.uncovered),
        "loads": result.loads,
        "bytes": result.loads * bytes_per_expert,
        "margin": coverage.margin_dies,
        **result.more,
    }
    uncovered = coverage.uncovered
    if form != "table":
        print_data(figures | {"uncovered_experts": _pairs(uncovered)}, form)
    else:
        sys.stdout.write(load_picture(document, die_loads(table, result.wanted, layout)) + "\n\n")
        print_table(["FIGURE", "VALUE"], [[name, _text(value)] for name, value in figures.items()])
        _print_uncovered(uncovered)
    if uncovered:
        say(
            f"raddle: warning: {len(uncovered)} experts (of one layer each) have no copy, for"
            f" {layout.host_slots} slots a layer are left for {document.experts} experts: mask"
            " them, or bring dies back with --joined."
        )
    return not uncovered


def _print_uncovered(uncovered: Sequence[tuple[int, int]]) -> None:
    """The experts without a copy, a line a layer."""
    for layer, pairs in groupby(uncovered, key=itemgetter(0)):
        experts = [expert for _, expert in pairs]
        shown = ", ".join(map(str, experts))
        sys.stdout.write(f"layer {layer}: no copy of {len(experts)} experts: {shown}\n")


def _pairs(pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    return [list(pair) for pair in pairs]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return f"{value:,}" if type(value) is int else str(value)


def check(reading: MapReading, form: str) -> bool:
    """Name every defect, one a line, those of the file first; True if there is none."""
    document, table = reading.document, reading.document.physical_to_logical
    defects = list(reading.defects)
    if len(table):
        defects += check_map(table, document.experts, layout_of(document), reading.layers)
    if form != "table":
        print_data({"defects": defects, "valid": not defects}, form)
    else:
        sys.stdout.writelines(printable(defect) + "\n" for defect in defects)
    if not defects and form == "table":
        layers, slots = table.shape
        guessed = "" if document.experts_stated else " (the file does not say how many)"
        sys.stdout.write(
            f"no defect: {layers} layers, {document.experts} experts{guessed}, {slots} slots on"
            f" {len(document.dies)} dies\n"
        )
    return not defects


def coverage(document: MapDocument, form: str) -> None:
    """The coverage report."""
    layout = layout_of(document)
    table = np.where(
        document.physical_to_logical < document.experts, document.physical_to_logical, -1
    )
    found = measure_coverage(table, document.experts, layout)
    if form != "table":
        print_data(_coverage_data(found), form)
        return
    rows = [
        [
            loss.level,
            len(loss.members),
            ", ".join(map(str, loss.members)),
            loss.experts_lost,
            _some(loss),
        ]
        for one in found.worst_one
        for loss in (one, *(two for two in found.worst_two if two.level == one.level))
    ]
    print_table(["LEVEL", "LOST", "WORST", "EXPERTS LOST", "WHICH (LAYER/EXPERT)"], rows)
    sys.stdout.write(f"\nmargin: {found.margin_dies} dies may be lost, whichever they are\n")
    _print_uncovered(found.uncovered)
    if not found.extra_copies:
        sys.stdout.write("no more copy can raise it: every die holds every expert\n")
        return
    layer, expert, die = found.extra_copies[0]
    sys.stdout.write(
        f"{found.extra_copies_needed} more copies raise it by one; the first: layer {layer},"
        f" expert {expert} on die {die}\n"
    )


def _some(loss: DomainLoss) -> str:
    shown = ", ".join(f"{layer}/{expert}" for layer, expert in loss.experts[:6])
    return shown + (", ..." if loss.experts_lost > 6 else "")  # noqa: PLR2004 - as above


def _coverage_data(found: Coverage) -> dict[str, Any]:
    def loss(worst: DomainLoss) -> dict[str, Any]:
        return {
            "members": list(worst.members),
            "experts_lost": worst.experts_lost,
            "experts": _pairs(worst.experts),
        }

    two = {worst.level: loss(worst) for worst in found.worst_two}
    return {
        "margin": found.margin_dies,
        "uncovered": len(found.uncovered),
        "uncovered_experts": _pairs(found.uncovered),
        "levels": {
            worst.level: {"one": loss(worst), "two": two.get(worst.level)}
            for worst in found.worst_one
        },
        "extra_copies_needed": found.extra_copies_needed,
        "extra_copies": [
            {"layer": layer, "expert": expert, "die": die}
            for layer, expert, die in found.extra_copies
        ],
    }
