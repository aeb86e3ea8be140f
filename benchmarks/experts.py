"""Expert placement, repair and drift: CPU time, balance and moves. `make -s bench-experts`.

58 layers x 256 experts, one thread. Times are CPU milliseconds of the algorithm alone: minimum,
median and maximum of repeated runs after one warm-up. Balancedness is mean / max die load under
equal split, averaged over the layers; loads are (layer, die, expert) that are newly loaded. Where
SGLang or vLLM can be imported, their full placement runs beside ours in the same process.
"""

from __future__ import annotations

import os

# Before numpy: its matrix library would start threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cluster import say
from raddle.core.experts.balance import balancedness, best_balancedness
from raddle.core.experts.layout import FloatArray, IntArray, Layout
from raddle.core.experts.maps import count_duplicates, find_uncovered
from raddle.core.experts.place import place_experts
from raddle.core.experts.rebalance import rebalance_map
from raddle.core.experts.repair import repair_map
from raddle.core.experts.sources import Bandwidths

LAYERS, EXPERTS = 58, 256
SHAPES = ((288, 32), (320, 32), (384, 32), (288, 144), (384, 192), (288, 288), (320, 320))
RUNS = 5
LOST = {"one_die": [17], "two_dies": [3, 17], "node": list(range(16, 32))}
# CloudMatrix384, INT8 experts of DeepSeek-V3; see docs/guide/machines.md.
RATES = Bandwidths(44_040_192, 196e9, 151e9, 2.5e9)
BATCHES = (1, 2, 4, 8, 16)
# Of `calibrated`: the hottest experts of a layer, how many of them are those of the layer below and
# how many have one of the low, hotter indices; among the others, how much sooner these come.
HOT, LOW = EXPERTS // 8, EXPERTS // 4
HOT_CARRIED, HOT_LOW = (8, 11), (18, 23)
LOW_FACTOR = 3.0


def loads_of(name: str, seed: int = 1) -> FloatArray:
    """Loads [layers, experts] of one kind.

    `calibrated` follows statistics of published recordings of DeepSeek-V3: lognormal with a sigma
    of 0.4 to 0.9 a layer, no expert at zero; 25 to 34 % of the hottest eighth are those of the
    layer below, and the first quarter of the indices has 56 to 72 % of it and on average 35 to
    41 % of the load.
    """
    rng = np.random.default_rng(seed)
    shape = (LAYERS, EXPERTS)
    if name == "uniform":
        return rng.uniform(0.8, 1.2, shape)
    if name == "zipf":
        falling = 1 / np.arange(1, EXPERTS + 1)
        return np.stack([rng.permutation(falling) for _ in range(LAYERS)])
    if name == "lognormal":
        return rng.lognormal(0.0, 1.0, shape)
    if name == "grouped":
        groups = np.repeat(rng.lognormal(0.0, 0.8, (LAYERS, 8)), EXPERTS // 8, axis=1)
        return groups * rng.lognormal(0.0, 0.5, shape)
    return _calibrated(rng)


def _calibrated(rng: np.random.Generator) -> FloatArray:
    rows: list[NDArray[np.float64]] = []
    before = _hottest(rng, np.zeros(0, dtype=np.int64))
    for _ in range(LAYERS):
        hot = before = _hottest(rng, before)
        others = np.setdiff1d(np.arange(EXPERTS), hot)
        # Low indices are hotter among the others too.
        turn = rng.exponential(size=len(others)) * np.where(others < LOW, 1 / LOW_FACTOR, 1.0)
        row = np.empty(EXPERTS)
        row[np.concatenate([hot, others[np.argsort(turn)]])] = -np.sort(
            -rng.lognormal(0.0, rng.uniform(0.4, 0.9), EXPERTS)
        )
        rows.append(row)
    return np.stack(rows)


def _hottest(rng: np.random.Generator, before: IntArray) -> IntArray:
    """The hottest eighth of a layer, in any order: some of the layer below, mostly low indices."""
    low_count = int(rng.integers(HOT_LOW[0], HOT_LOW[1] + 1))
    count = int(rng.integers(HOT_CARRIED[0], HOT_CARRIED[1] + 1)) if len(before) else 0
    carried = rng.choice(before, count, replace=False)
    fresh = np.setdiff1d(np.arange(EXPERTS), before)
    low, high = fresh[fresh < LOW], fresh[fresh >= LOW]
    more_low = min(max(low_count - int(np.count_nonzero(carried < LOW)), 0), HOT - count)
    chosen = [
        carried,
        rng.choice(low, more_low, replace=False),
        rng.choice(high, HOT - count - more_low, replace=False),
    ]
    return rng.permutation(np.concatenate(chosen))


LOADS = ("uniform", "zipf", "lognormal", "grouped", "calibrated")


def layout_of(slots: int, dies: int, lost: list[int] | None = None) -> Layout:
    """The first dies of a CloudMatrix384."""
    die = np.arange(dies)
    hosts = np.ones(dies, dtype=bool)
    hosts[lost or []] = False
    return Layout.of(np.stack([die, die // 2, die // 16, die // 64]), slots // dies, hosts=hosts)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work gives, and its CPU milliseconds."""
    found = work()
    spent: list[float] = []
    for _ in range(RUNS):
        began = time.process_time()
        work()
        spent.append((time.process_time() - began) * 1e3)
    figures = {"min": min(spent), "median": median(spent), "max": max(spent)}
    return found, {name: round(value, 3) for name, value in figures.items()}


def case(slots: int, dies: int, kind: str) -> dict[str, Any]:
    """One shape under one kind of load."""
    loads, layout = loads_of(kind), layout_of(slots, dies)
    table, cpu_ms = timed(lambda: place_experts(loads, layout))
    found: dict[str, Any] = {"place": {"cpu_ms": cpu_ms, **_quality(table, loads, layout)}}
    found["place"]["loads"] = int(np.count_nonzero(table >= 0))
    for name, lost in LOST.items():
        left = layout_of(slots, dies, lost)
        if len(lost) < dies and left.host_slots >= EXPERTS:
            found[name] = _repaired(table, loads, left)
    noise = np.random.default_rng(2).standard_normal(loads.shape)
    found["drift_5_percent"] = _drifted(table, loads * (1 + 0.05 * noise).clip(0.5), layout)
    for peer, run in peers().items():
        found[peer] = _peer(run, loads, slots, dies)
    return found


def _quality(table: IntArray, loads: FloatArray, layout: Layout) -> dict[str, Any]:
    return {
        "balancedness": round(balancedness(table, loads, layout), 4),
        "bound": round(best_balancedness(loads, layout), 4),
        "duplicates": count_duplicates(table, layout),
        "uncovered": len(find_uncovered(table, EXPERTS, layout)),
        "sharing_an_npu": sharing(table, layout, 1),
    }


def sharing(table: IntArray, layout: Layout, level: int) -> int:
    """Copies that share a member of a level although living ones are left without any."""
    member = layout.domains[level][layout.slot_die]
    members = len(np.unique(layout.domains[level][layout.hosts]))
    layer, slot = np.nonzero(table >= 0)
    pair = layer * EXPERTS + table[layer, slot]
    copies = np.bincount(pair, minlength=LAYERS * EXPERTS)
    places = np.bincount(
        np.unique(np.stack([pair, member[slot]]), axis=1)[0], minlength=LAYERS * EXPERTS
    )
    return int(np.maximum(np.minimum(copies, members) - places, 0).sum())


def _repaired(table: IntArray, loads: FloatArray, left: Layout) -> dict[str, Any]:
    """A valid map at once, and one with the default number of swaps."""
    found: dict[str, Any] = {}
    for name, swaps in (("valid", 0), ("balanced", None)):
        change, cpu_ms = timed(partial(repair_map, table, loads, left, swaps=swaps))
        found[name] = {"cpu_ms": cpu_ms, "loads": change.loads}
        found[name] |= _quality(change.table, loads, left)
    return found


def _drifted(table: IntArray, loads: FloatArray, layout: Layout) -> dict[str, Any]:
    found, cpu_ms = timed(lambda: rebalance_map(table, loads, layout, RATES))
    return {
        "cpu_ms": cpu_ms,
        "loads": found.change.loads,
        "balancedness_before": round(found.balance_before, 4),
        "balancedness_possible": round(found.balance_after, 4),
        "reason": found.why.reason,
    }


def batch() -> dict[str, Any]:
    """CPU of repairing one die in each of n instances of EP320: linear in n."""
    loads = loads_of("lognormal")
    table = place_experts(loads, layout_of(320, 320))
    lefts = [layout_of(320, 320, [17 + number]) for number in range(max(BATCHES))]

    def repair(count: int) -> None:
        for left in lefts[:count]:
            repair_map(table, loads, left)

    return {str(count): timed(partial(repair, count))[1] for count in BATCHES}


def peers() -> dict[str, Callable[..., Any]]:
    """Full placement of what is installed: (weight tensor, slots, groups, nodes, dies) -> map."""
    found: dict[str, Callable[..., Any]] = {}
    try:
        sglang = importlib.import_module("sglang.srt.eplb.eplb_algorithms.deepseek")
        found["sglang"] = lambda *args: sglang.rebalance_experts(*args, enable_hierarchical=False)
    except ImportError:
        pass
    try:
        vllm = importlib.import_module("vllm.distributed.eplb.policy.default")
        found["vllm"] = vllm.DefaultEplbPolicy.rebalance_experts
    except ImportError:
        pass
    return found


def _peer(run: Callable[..., Any], loads: FloatArray, slots: int, dies: int) -> dict[str, Any]:
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    weight = torch.from_numpy(loads)
    answer, cpu_ms = timed(lambda: run(weight, slots, 1, 1, dies))
    table = np.asarray(answer[0] if isinstance(answer, tuple) else answer, dtype=np.int64)
    return {"cpu_ms": cpu_ms, **_quality(table, loads, layout_of(slots, dies))}


def measure() -> dict[str, Any]:
    """Everything, by shape and load."""
    cases: dict[str, Any] = {}
    for slots, dies in SHAPES:
        for kind in LOADS:
            cases[f"{slots}/{dies} {kind}"] = case(slots, dies, kind)
        say(f"experts: {slots} slots on {dies} dies")
    return {"experts": {"cases": cases, "batch_of_repairs_cpu_ms": batch()}}


def main() -> None:
    """Entry point."""
    result = measure()
    result["peers"] = sorted(peers())
    result["host"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
