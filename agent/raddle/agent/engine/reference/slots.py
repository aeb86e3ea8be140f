"""The experts of one rank: which it holds, loading them, and answering for any expert.

`Slots` is the rank's own memory; `Experts` sends each row to a rank that holds the wanted expert,
itself included, and puts the answers back in order.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from raddle.agent.engine.reference import numerics
from raddle.agent.engine.reference.exchange import ExchangeClient, pack_rows, unpack_rows
from raddle.agent.engine.reference.weights import (
    F32,
    Expert,
    FloatArray,
    expert_bytes,
    expert_from_bytes,
    load_expert,
)
from raddle.model.stats import ExpertLoad
from raddle.model.types import ExpertMap, Member


class Slots:
    """Experts in this rank's memory, by (layer, expert)."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._held: dict[tuple[int, int], Expert] = {}
        self._lock = threading.Lock()

    def wanted(self, expert_map: ExpertMap, rank: int) -> list[tuple[int, int]]:
        """(layer, expert) that the map puts on this rank."""
        width = expert_map.slots_per_rank
        return [
            (number, expert)
            for number, layer in enumerate(expert_map.layers)
            for expert in layer.physical_to_logical[rank * width : (rank + 1) * width]
            if expert >= 0
        ]

    def has(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._held

    def keep_only(self, wanted: list[tuple[int, int]]) -> None:
        """Drop what the map does not ask for any more."""
        keep = set(wanted)
        with self._lock:
            self._held = {key: value for key, value in self._held.items() if key in keep}

    def load_from_disk(self, layer: int, expert: int) -> int:
        """Bytes loaded."""
        return self._put(layer, expert, load_expert(self._checkpoint, layer, expert))

    def load_from_bytes(self, layer: int, expert: int, data: bytes) -> int:
        return self._put(layer, expert, expert_from_bytes(data))

    def _put(self, layer: int, expert: int, loaded: Expert) -> int:
        with self._lock:
            self._held[layer, expert] = loaded
        return sum(m.values.size for m in (loaded.gate, loaded.up, loaded.down))

    def weights(self, layer: int, expert: int) -> bytes | None:
        """An expert's bytes for a peer; None if it is not here."""
        found = self._held.get((layer, expert))
        return expert_bytes(found) if found is not None else None

    def serve(self, layer: int, body: bytes) -> bytes | None:
        """Answer rows of a peer; None if an expert is not here."""
        experts, quantised, scale = unpack_rows(body)
        answer = self.compute(layer, experts, quantised, scale)
        return None if answer is None else answer.tobytes()

    def compute(
        self, layer: int, experts: list[int], quantised: FloatArray, scale: FloatArray
    ) -> FloatArray | None:
        """[rows, hidden]: row i through expert experts[i]."""
        out = np.empty_like(quantised, dtype=F32)
        wanted = np.array(experts)
        for expert in dict.fromkeys(experts):
            found = self._held.get((layer, expert))
            if found is None:
                return None
            rows = np.flatnonzero(wanted == expert)
            out[rows] = numerics.feed_forward(quantised[rows], scale[rows], found)
        return out


class Experts:
    """Routes rows to replicas by the map of one epoch."""

    def __init__(
        self,
        epoch: int,
        expert_map: ExpertMap,
        rank: int,
        slots: Slots,
        client: ExchangeClient,
        peers: Mapping[int, Member],
    ) -> None:
        self._epoch = epoch
        self._rank = rank
        self._slots = slots
        self._client = client
        self._peers = peers
        self._hosts = [
            _hosts(layer.physical_to_logical, expert_map.slots_per_rank, set(peers), rank)
            for layer in expert_map.layers
        ]
        self.loads = np.zeros((len(expert_map.layers), expert_map.experts), dtype=np.int64)
        self._told = self.loads.copy()

    def take_loads(self) -> tuple[ExpertLoad, ...]:
        """Tokens since the last call, for layers that had any; the worker counts on meanwhile."""
        now = self.loads.copy()
        new, self._told = now - self._told, now
        return tuple(
            ExpertLoad(layer=int(layer), tokens=tuple(new[layer].tolist()))
            for layer in np.flatnonzero(new.any(axis=1))
        )

    def __call__(
        self, layer: int, chosen: list[list[int]], quantised: FloatArray, scale: FloatArray
    ) -> FloatArray:
        pairs = [(row, expert) for row, experts in enumerate(chosen) for expert in experts]
        by_rank: dict[int, list[int]] = {}
        for number, (_, expert) in enumerate(pairs):
            self.loads[layer, expert] += 1
            by_rank.setdefault(self._hosts[layer][expert], []).append(number)
        out = np.empty((len(pairs), quantised.shape[1]), dtype=F32)
        bodies = {}
        for rank, numbers in by_rank.items():
            if rank != self._rank:
                rows = [pairs[n][0] for n in numbers]
                experts = [pairs[n][1] for n in numbers]
                bodies[rank] = pack_rows(experts, quantised[rows], scale[rows])
        mine = by_rank.get(self._rank, [])
        if mine:
            rows = [pairs[n][0] for n in mine]
            own = self._slots.compute(
                layer, [pairs[n][1] for n in mine], quantised[rows], scale[rows]
            )
            assert own is not None, "the map names an expert here that is not loaded"
            out[mine] = own
        for rank, answer in self._client.dispatch(self._epoch, layer, bodies, self._peers).items():
            out[by_rank[rank]] = answer
        return out


def _hosts(slots: tuple[int, ...], width: int, live: set[int], rank: int) -> dict[int, int]:
    """The rank to ask for each expert: this one if it can, else replicas by turns of ranks."""
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(slots):
        if expert >= 0 and slot // width in live:
            holders.setdefault(expert, []).append(slot // width)
    return {
        expert: rank if rank in ranks else ranks[rank % len(ranks)]
        for expert, ranks in holders.items()
    }
