"""Rebalance under drifting loads: only where the gain pays for the moves.

In go the map in service, the loads as they are now and what moves cost; out comes a new map, or
the same one with the reason. Time that a layer takes falls by the gain in balance until the loads
have drifted on (the horizon); the moves cost their transfer. What makes hysteresis: a layer is
looked at only once it is well below what it could reach; its new map has to be better by as much
for loads that differ by noise from those that it was made for; and then it is close to its best,
so that the same drift has to build up again before anything moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raddle.core.experts.balance import balance_of_layers, die_loads, least_times
from raddle.core.experts.layout import FloatArray, IntArray, Layout, numbers
from raddle.core.experts.repair import MapChange, remap_layers
from raddle.core.experts.sources import Bandwidths, choose_sources
from raddle.model.reasons import Decision
from raddle.model.types import Why

# A gain in balance below this share is left to the next drift.
GAIN_MIN = 0.05
# The gain has to be this many times what the moves cost: loads drift on while they are made.
_PAYS_FACTOR = 2.0
# Loads of the same traffic differ by this from look to look. A map that was made for one look is
# better there than at the next, with few slots a die by more than 5 %.
NOISE_SHARE = 0.05
# With few layers this look may be an unlucky one for a good map: so many standard deviations.
_SPREADS = 3.0
# The gain has to be there at so many other looks: multiples of these numbers are their noise.
_ROOTS = np.sqrt([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
HORIZON_S = 600.0
# An epoch change stops the instance this long (the control plane's own target).
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Rebalance:
    """What was decided; without a gain the change is empty."""

    change: MapChange
    balance_before: float
    #: Of the new map for these loads, if it was taken or not.
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
        loads: [layers, experts] now, any unit; whole numbers are taken for counts of tokens.
        horizon_s: seconds for which the loads are expected to stay as they are.
        gain_min: smallest relative gain of balance, of a layer and of the whole.
        swaps: as for `repair_map`.
    """
    now = balance_of_layers(die_loads(table, loads, layout), layout)
    behind = np.flatnonzero(now * (1 + gain_min) < _reach(loads, layout))
    kept = remap_layers(table, loads, layout, numbers(0))
    before = float(now.mean())
    if not len(behind):
        text = f"balance {before:.3f}, every layer is within {gain_min:.0%} of its best"
        return Rebalance(
            kept, before, before, 0.0, 0.0, Why(reason=Decision.BALANCED, message=text)
        )
    change = remap_layers(table, loads, layout, behind, swaps=swaps)
    later = _at_other_looks(change.table, loads, layout)
    sure = behind[later[:, behind].min(axis=0) >= now[behind] * (1 + gain_min)]
    if 0 < len(sure) < len(behind):
        # Layers that may gain by chance alone take no moves from the others.
        behind, change = sure, remap_layers(table, loads, layout, sure, swaps=swaps)
        later = _at_other_looks(change.table, loads, layout)
    after = float(balance_of_layers(die_loads(change.table, loads, layout), layout).mean())
    expected = np.tile(now, (len(later), 1))
    expected[:, behind] = later[:, behind]
    whole = expected.mean(axis=1)
    least = float(whole.mean() - _SPREADS * whole.std())
    sources = choose_sources(change, table, layout, layout.hosts, rates)
    gain = max(least / before - 1, 0.0) if before > 0 else 0.0
    gain_s = horizon_s * gain / (1 + gain)
    cost_s = sources.predicted_s + _PAUSE_S
    said = f"balance {before:.3f} -> {after:.3f}, in noise {least:.3f}, for {change.loads} loads"
    if gain < gain_min:
        why = Why(reason=Decision.SMALL_GAIN, message=f"{said} is less than {gain_min:.0%}")
        return Rebalance(kept, before, after, gain_s, cost_s, why)
    if gain_s < cost_s * _PAYS_FACTOR:
        text = f"{said} gains {gain_s:.2f} s in {horizon_s:g} s and costs {cost_s:.2f} s"
        return Rebalance(
            kept, before, after, gain_s, cost_s, Why(reason=Decision.TOO_DEAR, message=text)
        )
    text = f"{said}, {gain_s:.1f} s gained in {horizon_s:g} s for {cost_s:.2f} s"
    return Rebalance(change, before, after, gain_s, cost_s, Why(reason=Decision.PAYS, message=text))


def _reach(loads: FloatArray, layout: Layout) -> FloatArray:
    """[layers] no map is more balanced than this."""
    even = loads.sum(axis=1) / layout.speeds[layout.hosts].sum()
    least = least_times(loads, layout)
    reach: FloatArray = np.divide(even, least, out=np.ones(len(even)), where=least > 0)
    return reach


def _at_other_looks(table: IntArray, loads: FloatArray, layout: Layout) -> FloatArray:
    """[looks, layers] balance of a map for loads that differ by noise; always the same noise."""
    place = numbers(loads.size).reshape(loads.shape) + 1
    noise = np.full(loads.shape, NOISE_SHARE)
    if (loads == np.rint(loads)).all():
        noise = np.hypot(noise, 1 / np.sqrt(np.maximum(loads, 1.0)))
    found: list[FloatArray] = []
    for root in _ROOTS:
        # Evenly between the limits that make the variance 1.
        shift = np.sqrt(12.0) * (place * root % 1.0 - 0.5)
        look = np.maximum(loads * (1 + noise * shift), 0.0)
        found.append(balance_of_layers(die_loads(table, look, layout), layout))
    return np.stack(found)
