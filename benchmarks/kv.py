"""The KV index and the restore plan: memory, events, lookups and CPU time, one JSON object.

`make -s bench-kv`. One core, no threads; CPU time, so that other processes do not count.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import numpy as np

from raddle.core.kvcache.index import BlockEvent, BlockIndex, block_keys
from raddle.core.kvcache.restore import KvCosts, Pool, Survivor, plan_restores
from raddle.core.kvcache.rows import Keys
from raddle.model.kv import BlockSpace, KvEventKind, KvTier
from raddle.model.routes import SequenceReport
from raddle.model.types import RankKey

BLOCKS = 1_000_000
COPIES = 2
MEMBERS = 48
BLOCKS_AN_EVENT = 30
CHAINS_A_LOOKUP = 32
CHAIN_BLOCKS = 30
SEQUENCES = 200
SEQUENCE_TOKENS = 4_096
BLOCK_TOKENS = 128
SURVIVORS = 319
PLANS = 20
# Survivors that hold the beginning of a sequence in their own memory, where peers are asked too.
PEERS = 2
_JOB = "j-bench"
_SPACE = BlockSpace(model_digest="bench", block_tokens=BLOCK_TOKENS)


def measure() -> dict[str, Any]:
    """All four figures with the shapes that they were measured with."""
    keys = np.random.default_rng(0).integers(1, 2**64, size=BLOCKS, dtype=np.uint64)
    gc.collect()
    before = resident_bytes()
    index = BlockIndex()
    writers = [_Writer(index, rank) for rank in range(MEMBERS)]
    stored_s, longest_s = _change(writers, keys, KvEventKind.STORED, BLOCKS)
    grown = resident_bytes() - before
    lookups = _lookups_per_s(index, keys)
    # Half of the blocks leave, so that both kinds of events count.
    removed_s, _ = _change(writers, keys, KvEventKind.REMOVED, BLOCKS // 2)
    return {
        "index_bytes_per_location": round(grown / (BLOCKS * COPIES), 1),
        "events_per_s": round((BLOCKS + BLOCKS // 2) * COPIES / (stored_s + removed_s)),
        "event_longest_ms": round(longest_s * 1e3, 2),
        "lookups_per_s": round(lookups),
        "plan_cpu_ms": round(_plan_cpu_ms(peers=0), 3),
        "plan_with_peers_cpu_ms": round(_plan_cpu_ms(peers=PEERS), 3),
        "shapes": {
            "blocks": BLOCKS,
            "copies": COPIES,
            "members": MEMBERS,
            "blocks_an_event": BLOCKS_AN_EVENT,
            "chains_a_lookup": CHAINS_A_LOOKUP,
            "blocks_a_chain": CHAIN_BLOCKS,
            "plan_sequences": SEQUENCES,
            "plan_tokens_a_sequence": SEQUENCE_TOKENS,
            "plan_block_tokens": BLOCK_TOKENS,
            "plan_survivors": SURVIVORS,
            "plan_peers": PEERS,
            "plan_cpu_ms_is": f"median of {PLANS}",
        },
    }


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


class _Writer:
    """One member, a pool host unless said, with its numbered events."""

    def __init__(
        self, index: BlockIndex, rank: int, role: str = "cache", tier: KvTier = KvTier.DRAM
    ) -> None:
        self._index = index
        self._name = (_JOB, RankKey(role=role, instance=0, rank=rank))
        self._tier = tier
        self._sequence = 0

    def tell(self, kind: KvEventKind, keys: Keys) -> None:
        event = BlockEvent(
            kind=kind, sequence=self._sequence, space=_SPACE, keys=keys, tier=self._tier
        )
        self._sequence += 1
        assert self._index.apply(self._name, "a", event)


def _change(
    writers: list[_Writer], keys: Keys, kind: KvEventKind, blocks: int
) -> tuple[float, float]:
    """CPU seconds for that many blocks of each copy, an event at a time; and of the longest one."""
    began = before = time.process_time()
    longest = 0.0
    for copy in range(COPIES):
        for number, start in enumerate(range(0, blocks, BLOCKS_AN_EVENT)):
            writer = writers[(number + copy * MEMBERS // COPIES) % MEMBERS]
            writer.tell(kind, keys[start : min(start + BLOCKS_AN_EVENT, blocks)])
            now = time.process_time()
            longest, before = max(longest, now - before), now
    return time.process_time() - began, longest


def _lookups_per_s(index: BlockIndex, keys: Keys) -> float:
    """Chains a second, in batches, in random order so that no cache is warm."""
    chains = keys[: BLOCKS // CHAIN_BLOCKS * CHAIN_BLOCKS].reshape(-1, CHAIN_BLOCKS)
    chains = chains[np.random.default_rng(1).permutation(len(chains))]
    starts = np.arange(CHAINS_A_LOOKUP, dtype=np.intp) * CHAIN_BLOCKS
    batches = [
        chains[start : start + CHAINS_A_LOOKUP].ravel()
        for start in range(0, len(chains) - CHAINS_A_LOOKUP, CHAINS_A_LOOKUP)
    ]
    began = time.process_time()
    for batch in batches:
        lengths = index.prefix_lengths(_SPACE, batch, starts)
        assert int(lengths.min()) == CHAIN_BLOCKS
    return len(batches) * CHAINS_A_LOOKUP / (time.process_time() - began)


def _plan_cpu_ms(*, peers: int) -> float:
    """Median CPU time of a plan, from the front doors' reports to restores with reasons."""
    rng = np.random.default_rng(2)
    blocks = SEQUENCE_TOKENS // BLOCK_TOKENS
    sequences = []
    index = BlockIndex()
    writers = [_Writer(index, rank) for rank in range(MEMBERS)]
    ranks = [_Writer(index, rank, "decode", KvTier.HBM) for rank in range(SURVIVORS)]
    for number in range(SEQUENCES):
        hashes = tuple(rng.bytes(16).hex() for _ in range(blocks))
        # The newest blocks of some sequences are not written back yet.
        writers[number % MEMBERS].tell(
            KvEventKind.STORED, block_keys(hashes[: blocks - number % 4])
        )
        for peer in range(peers):
            ranks[(number * 7 + peer * 13) % SURVIVORS].tell(
                KvEventKind.STORED, block_keys(hashes[: blocks // 2 + number % (blocks // 2)])
            )
        sequences.append(
            SequenceReport(
                sequence_id=f"s-{number}",
                rank=RankKey(role="decode", instance=0, rank=SURVIVORS),
                prompt_tokens=SEQUENCE_TOKENS,
                sent_tokens=7,
                block_hashes=hashes,
            )
        )
    survivors = [
        Survivor(
            key=RankKey(role="decode", instance=0, rank=rank),
            sequences=rank % 90,
            sequences_max=96,
            tokens=rank % 90 * SEQUENCE_TOKENS,
            tokens_max=570_000,
        )
        for rank in range(SURVIVORS)
    ]
    members = [RankKey(role="cache", instance=0, rank=rank) for rank in range(MEMBERS)]
    pool = Pool(index, _JOB, _SPACE, members, [s.key for s in survivors] if peers else [])
    times = []
    for _ in range(PLANS):
        began = time.process_time()
        plan = plan_restores(sequences, survivors, pool, KvCosts())
        times.append((time.process_time() - began) * 1e3)
        assert sum(restore.tokens_restored > 0 for restore in plan.restores) == SEQUENCES
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Entry point."""
    sys.stdout.write(json.dumps(measure(), indent=1) + "\n")


if __name__ == "__main__":
    main()
