"""Rebalance under drifting loads: only where the gain pays for the moves.

In go the map in service, the loads as they are now and what moves cost; out comes a new map, or
the same one with the reason. Time that a layer takes falls by the gain in balance until the loads
have drifted on (the horizon); the moves cost their transfer. Two thresholds make hysteresis: a
layer is looked at only once it is well below what it could reach, and then it is brought close to
that, so that the same drift has to build up again before anything moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.balance import balance_of_layers, die_loads, least_times
from raddle.core.experts.layout import FloatArray, IntArray, Layout
from raddle.core.experts.repair import MapChange, remap_layers
from raddle.core.experts.sources import Bandwidths, choose_sources
from raddle.model.types import Why

# A gain in balance below this share is left to the next drift.
GAIN_MIN = 0.05
# The gain has to be this many times what the moves cost: loads drift on while they are made.
_PAYS_FACTOR = 2.0
HORIZON_S = 600.0
# An epoch change stops the instance this long (the control plane's own target).
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Rebalance:
    """What was decided; without a gain the change is empty."""

    change: MapChange
    balance_before: float
    #: Of the new map, if it was taken or not.
    balance_after: float
    gain_s: float
    cost_s: float
    why: Why


def rebalance_map(
    table: IntArray,
    loads: FloatArray,
    layout: Layout,
    rates: Bandwidths,
    *,
    horizon_s: float = HORIZON_S,
    gain_min: float = GAIN_MIN,
    swaps: int | None = None,
) -> Rebalance:
    """Move experts if that pays within the horizon.

    Args:
        table: [layers, slots], valid for the hosts of `layout`.
        loads: [layers, experts] now, any unit.
        horizon_s: seconds for which the loads are expected to stay as they are.
        gain_min: smallest relative gain of balance, of a layer and of the whole.
        swaps: as for `repair_map`.
    """
    now = balance_of_layers(die_loads(table, loads, layout), layout)
    even = loads.sum(axis=1) / layout.speeds[layout.hosts].sum()
    least = least_times(loads, layout)
    reach = np.divide(even, least, out=np.ones(len(even)), where=least > 0)
    behind = np.flatnonzero(now * (1 + gain_min) < reach)
    kept = remap_layers(table, loads, layout, np.zeros(0, dtype=np.int64))
    before = float(now.mean())
    if not len(behind):
        text = f"balance {before:.3f}, every layer is within {gain_min:.0%} of its best"
        return Rebalance(kept, before, before, 0.0, 0.0, Why(reason="BALANCED", message=text))
    change = remap_layers(table, loads, layout, behind, swaps=swaps)
    carried = die_loads(change.table, loads, layout)
    after = float(balance_of_layers(carried, layout).mean())
    sources = choose_sources(change, table, layout, layout.hosts, rates)
    gain = after / before - 1 if before > 0 else 0.0
    gain_s = horizon_s * gain / (1 + gain)
    cost_s = sources.predicted_s + _PAUSE_S
    numbers = f"balance {before:.3f} -> {after:.3f} for {change.loads} loads"
    if gain < gain_min:
        why = Why(reason="SMALL_GAIN", message=f"{numbers} is less than {gain_min:.0%}")
        return Rebalance(kept, before, after, gain_s, cost_s, why)
    if gain_s < cost_s * _PAYS_FACTOR:
        text = f"{numbers} gains {gain_s:.2f} s in {horizon_s:g} s and costs {cost_s:.2f} s"
        return Rebalance(kept, before, after, gain_s, cost_s, Why(reason="TOO_DEAR", message=text))
    text = f"{numbers}, {gain_s:.1f} s gained in {horizon_s:g} s for {cost_s:.2f} s"
    return Rebalance(change, before, after, gain_s, cost_s, Why(reason="PAYS", message=text))
