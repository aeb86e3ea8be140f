"""Machines, loads and checks that the tests of expert maps share."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from raddle.core.experts.balance import die_loads
from raddle.core.experts.layout import FloatArray, IntArray, Layout
from raddle.core.experts.maps import check_map


def make_domains(dies: int, *, dies_a_node: int = 16, nodes_a_rack: int = 4) -> IntArray:
    """Consecutive dies: die, NPU, node and rack of each."""
    die = np.arange(dies)
    node = die // dies_a_node
    return np.stack([die, die // 2, node, node // nodes_a_rack])


def make_layout(dies: int, slots: int, lost: tuple[int, ...] = (), *, node: int = 16) -> Layout:
    """Dies of a CloudMatrix384 (or of smaller nodes), some of them lost."""
    hosts = np.ones(dies, dtype=bool)
    hosts[list(lost)] = False
    return Layout.of(make_domains(dies, dies_a_node=node), slots, hosts=hosts)


def permuted(layout: Layout, order: list[int]) -> Layout:
    """The same dies in another order."""
    return Layout.of(
        layout.domains[:, order],
        layout.slots[order],
        hosts=layout.hosts[order],
        speeds=layout.speeds[order],
    )


def lognormal(layers: int, experts: int, seed: int = 0, sigma: float = 0.8) -> FloatArray:
    return np.random.default_rng(seed).lognormal(0.0, sigma, (layers, experts))


def zipf(layers: int, experts: int) -> FloatArray:
    """Exact ties: the first expert halved weighs what the second does."""
    return np.tile(1 / np.arange(1, experts + 1), (layers, 1))


def assert_sound(table: IntArray, experts: int, layout: Layout) -> None:
    """Every expert has a copy, none twice on a die, and only hosts hold any."""
    assert check_map(table, experts, layout) == []


def sharing(table: IntArray, experts: int, layout: Layout, level: int) -> int:
    """Copies that share a member of a level although there are members enough."""
    member = layout.domains[level][layout.slot_die]
    members = len(np.unique(layout.domains[level][layout.hosts]))
    found = 0
    for row in table:
        for expert in range(experts):
            places = member[row == expert]
            found += min(len(places), members) - len(set(places.tolist()))
    return found


def held(table: IntArray, layout: Layout) -> set[tuple[int, int, int]]:
    """(layer, die, expert) that a map has on its hosts."""
    layer, slot = np.nonzero((table >= 0) & layout.hosts[layout.slot_die])
    die = layout.slot_die[slot]
    rows = zip(layer.tolist(), die.tolist(), table[layer, slot].tolist(), strict=True)
    return set(rows)


def slowest(table: IntArray, loads: FloatArray, layout: Layout) -> list[float]:
    found: list[float] = (die_loads(table, loads, layout) / layout.speeds).max(axis=1).tolist()
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[FloatArray, Layout]:
    """Small instances of any shape: uneven slots, shared-expert dies, slow dies, equal loads."""
    experts = draw(st.integers(1, 24))
    dies = draw(st.integers(1, 12))
    least = -(-experts // dies)
    width = draw(st.integers(least, least + 3))
    slots = np.full(dies, width)
    if draw(st.booleans()):
        slots += np.array(draw(st.lists(st.integers(0, 2), min_size=dies, max_size=dies)))
    shared = draw(st.integers(0, 2))
    slots = np.concatenate([slots, np.full(shared, width)])
    speeds = np.ones(dies + shared)
    if draw(st.booleans()):
        speeds[draw(st.integers(0, dies - 1))] = 0.5
    hosts = np.arange(dies + shared) < dies
    domains = make_domains(dies + shared, dies_a_node=4, nodes_a_rack=2)
    layout = Layout.of(domains, slots, hosts=hosts, speeds=speeds)
    layers = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["equal", "zero", "zipf", "lognormal"]))
    if kind in ("equal", "zero"):
        return np.full((layers, experts), float(kind == "equal")), layout
    if kind == "zipf":
        return zipf(layers, experts), layout
    return lognormal(layers, experts, draw(st.integers(0, 9))), layout
