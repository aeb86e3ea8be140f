"""A prefill or decode rank's insides: weights, worker, blocks, and the change of epochs."""

from __future__ import annotations

import asyncio
from pathlib import Path

from raddle.agent.engine.reference.block_store import Block, BlockStore
from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.agent.engine.reference.config import RankConfig
from raddle.agent.engine.reference.exchange import ExchangeClient, PeerLost, rank_members
from raddle.agent.engine.reference.fences import Standing
from raddle.agent.engine.reference.model import History
from raddle.agent.engine.reference.pool import PoolClient
from raddle.agent.engine.reference.reports import Reports
from raddle.agent.engine.reference.shape import parse_shape
from raddle.agent.engine.reference.slots import Slots
from raddle.agent.engine.reference.weights import load_shared
from raddle.agent.engine.reference.worker import Sequence, Worker
from raddle.model.errors import PermanentError, Reason, TemporaryError
from raddle.model.kinds import RoleKind
from raddle.model.stats import PeerFault, RankState, RankStats
from raddle.model.types import (
    ExpertMap,
    ExpertMove,
    Fence,
    Member,
    RankKey,
    SequenceRestore,
    WeightSource,
)

_PREFETCHED_BLOCKS_MAX = 4_096
# Finished blocks that a rank keeps beside its sequences, for itself and for peers.
_OWN_BYTES_MAX = 1 << 26
_LOADS_EVERY_S = 5.0


class Serving:
    """Everything of a rank that computes."""

    def __init__(
        self, config: RankConfig, key: RankKey, standing: Standing, reports: Reports
    ) -> None:
        self.config = config
        self.shape = parse_shape(config.model_config)
        self.block_tokens = config.kv_block_tokens
        self._key = key
        self._standing = standing
        self._reports = reports
        self._loop = asyncio.get_running_loop()
        self._cache_key = cache_key(self.shape.digest)
        self._slots = Slots(Path(config.checkpoint))
        self._client = self._exchange_client()
        self.pool = PoolClient(key, config.node, config.tls())
        self.worker = Worker(
            self.shape,
            load_shared(self.shape, Path(config.checkpoint)),
            self._slots,
            self._client,
            key.rank,
            self._peer_lost,
            self.config.step_min_s,
        )
        self._members: tuple[Member, ...] = ()
        self._peers: dict[int, Member] = {}
        self._map: ExpertMap | None = None
        #: Finished blocks in the rank's own memory, which peers may read.
        self.blocks = BlockStore(_OWN_BYTES_MAX, reports.kv_changed)
        reports.full_report = self.blocks.names
        self._prefetched: dict[str, Block] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.worker.start()
        self._counting = self._loop.create_task(self._report_loads())

    async def _report_loads(self) -> None:
        """Tell the experts' loads from time to time, if there were any."""
        while True:
            await asyncio.sleep(_LOADS_EVERY_S)
            epoch, loads = self.worker.take_loads()
            if loads:
                self._reports.counted(RankStats(epoch=epoch, expert_loads=loads))

    def _exchange_client(self) -> ExchangeClient:
        config = self.config
        return ExchangeClient(config.job_uid, config.step_deadline_s, config.tls())

    # --- peers, from the exchange's threads ----------------------------------------------------

    def serve_peer(self, epoch: int, layer: int, body: bytes) -> bytes | None:
        """Answer expert traffic of this epoch; anything older or newer is refused."""
        if epoch != self._standing.epoch:
            return None
        return self._slots.serve(layer, body)

    def weights(self, layer: int, expert: int) -> bytes | None:
        return self._slots.weights(layer, expert)

    def _peer_lost(self, peer: Member, reason: str, epoch: int) -> None:
        fault = PeerFault(
            peer=peer.rank, peer_incarnation=peer.incarnation, reason=reason, epoch=epoch
        )
        self._loop.call_soon_threadsafe(self._reports.peer_fault, fault)

    # --- epochs --------------------------------------------------------------------------------

    async def quiesce(self, epoch: int, *, abort: bool) -> int:
        return await asyncio.to_thread(self.worker.quiesce, epoch, abort=abort)

    def set_members(self, members: tuple[Member, ...]) -> None:
        self._members = members
        self._peers = rank_members(members, self._key)
        self.pool.set_members([m for m in members if m.kind is RoleKind.CACHE])

    def set_expert_map(self, expert_map: ExpertMap) -> None:
        self._map = expert_map
        self._slots.keep_only(self._slots.wanted(expert_map, self._key.rank))

    async def load_experts(self, moves: tuple[ExpertMove, ...]) -> tuple[int, int]:
        """(experts, bytes) loaded now: what the moves name, then whatever else is missing."""
        return await asyncio.to_thread(self._load_experts, moves)

    def _load_experts(self, moves: tuple[ExpertMove, ...]) -> tuple[int, int]:
        if self._map is None:
            raise PermanentError(Reason.INVALID_ARGUMENT, "set the expert map before loading.")
        sources = {(m.layer, m.expert): m for m in moves if m.source is WeightSource.PEER}
        count = size = 0
        client = self._exchange_client()
        try:
            for layer, expert in self._slots.wanted(self._map, self._key.rank):
                if not self._slots.has(layer, expert):
                    size += self._load(layer, expert, sources.get((layer, expert)), client)
                    count += 1
        finally:
            client.close()
        return count, size

    def _load(
        self, layer: int, expert: int, move: ExpertMove | None, client: ExchangeClient
    ) -> int:
        """From the peer that the plan names; the checkpoint is there if that fails."""
        peer = self._peers.get(move.source_rank) if move is not None else None
        if peer is not None:
            try:
                data = client.weights(peer, layer, expert)
                return self._slots.load_from_bytes(layer, expert, data)
            except PeerLost:
                pass
        return self._slots.load_from_disk(layer, expert)

    async def restore_kv(
        self, fence: Fence, sequences: tuple[SequenceRestore, ...]
    ) -> tuple[int, int]:
        """(tokens restored, blocks missing): fetch the blocks of sequences that come here.

        What is not here comes from the pool, and what the pool lacks from the peers that the plan
        names.
        """
        names = [name for sequence in sequences for name in sequence.block_hashes]
        names = list(dict.fromkeys(names))[:_PREFETCHED_BLOCKS_MAX]
        found = self._own(names)
        missing = [name for name in names if name not in found]
        found |= await self.pool.get(fence, missing, everywhere=True)
        missing = [name for name in missing if name not in found]
        keys = dict.fromkeys(key for sequence in sequences for key in sequence.peers)
        members = {member.rank: member for member in self._members}
        peers = [members[key] for key in keys if key in members and key != self._key]
        found |= await self.pool.get_from(fence, peers, missing)
        self._prefetched = found
        return len(found) * self.block_tokens, len(names) - len(found)

    def _own(self, names: list[str]) -> dict[str, Block]:
        """Those of the blocks that this rank has in its own memory, whole ones only."""
        return {name: block for name, block in self.blocks.get(names) if block.is_whole}

    def resume(self, epoch: int) -> None:
        if self._map is None:
            raise PermanentError(Reason.INVALID_ARGUMENT, "set the expert map before resuming.")
        self.worker.resume(epoch, self._map, self._peers)

    @property
    def state(self) -> RankState:
        return self.worker.state

    # --- sequences -----------------------------------------------------------------------------

    async def new_history(self, tokens: list[int]) -> tuple[History, int]:
        """A history with the blocks that are here or in the pool, and how many tokens that are.

        The last token is always computed: its logits give the next one.
        """
        names = block_hashes(self._cache_key, tokens[:-1], self.block_tokens)
        history = History.empty(self.shape)
        known = {name: self._prefetched[name] for name in names if name in self._prefetched}
        known |= self._own([name for name in names if name not in known])
        if len(known) < len(names):
            fence = Fence(job_uid=self._standing.job_uid, epoch=self._standing.epoch)
            known |= await self.pool.get(fence, [name for name in names if name not in known])
        for name in names:
            if name not in known:
                break
            history.load_block(known[name].payload, self.block_tokens)
        # What was fetched is in this rank's memory now.
        self.blocks.put(list(known.items()))
        restored = history.length
        self._reports.counted(
            RankStats(kv_tokens_restored=restored, kv_tokens_recomputed=len(tokens) - restored)
        )
        return history, restored

    def require_room(self, tokens: list[int], final: int) -> None:
        """Refuse a sequence that the model or this rank cannot take.

        Raises:
            PermanentError: INVALID_ARGUMENT or LIMIT_EXCEEDED.
            TemporaryError: LIMIT_EXCEEDED when the rank is full now.
        """
        if not tokens or final > self.shape.context_max:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"a sequence must have 1 to {self.shape.context_max} tokens, completion included.",
            )
        if not all(0 <= token < self.shape.vocabulary for token in tokens):
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"tokens must be below {self.shape.vocabulary}."
            )
        limit = self.config.max_sequences
        if limit and self.worker.running >= limit:
            raise TemporaryError(Reason.LIMIT_EXCEEDED, f"{limit} sequences run here already.")

    def finished_blocks(self, sequence: Sequence, done: int) -> dict[str, bytes]:
        """Blocks of a sequence's history beyond the first `done`."""
        full = sequence.history.length // self.block_tokens
        if full <= done:
            return {}
        rows = sequence.tokens[: full * self.block_tokens]
        names = block_hashes(self._cache_key, rows, self.block_tokens)
        return {
            names[number]: sequence.history.block(number, self.block_tokens)
            for number in range(done, full)
        }

    def put_later(self, blocks: dict[str, bytes]) -> None:
        """Keep finished blocks here and in the pool; called from the computing thread."""
        self._loop.call_soon_threadsafe(self._start_put, blocks)

    def _start_put(self, blocks: dict[str, bytes]) -> None:
        fence = Fence(job_uid=self._standing.job_uid, epoch=self._standing.epoch)
        made = {name: Block.of(payload) for name, payload in blocks.items()}
        self.blocks.put(list(made.items()))
        task = asyncio.create_task(self.pool.put(fence, made))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def flush_puts(self) -> None:
        """Return once all blocks handed over so far are in the pool, or could not be put there."""
        await asyncio.gather(*tuple(self._tasks), return_exceptions=True)

    async def close(self) -> None:
        self._counting.cancel()
        self.worker.close()
        await self.flush_puts()
        await self.pool.close()
