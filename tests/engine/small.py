"""A reference model small enough to run hundreds of times, on one rank or spread over several."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from raddle.agent.engine.reference.exchange import ExchangeClient, ExchangeServer
from raddle.agent.engine.reference.model import Decoder, History, Span
from raddle.agent.engine.reference.shape import parse_shape
from raddle.agent.engine.reference.slots import Experts, Slots
from raddle.agent.engine.reference.weights import load_shared, write_checkpoint
from raddle.agent.engine.reference.worker import Worker
from raddle.model.kinds import RoleKind
from raddle.model.types import ExpertMap, ExpertMapLayer, Member, RankKey

JOB = "j-1"
EPOCH = 3
BLOCK_TOKENS = 8


def config(**changes: object) -> str:
    """The small model's config, with some values of its own."""
    sizes: dict[str, object] = {
        "model_type": "raddle_reference",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "num_attention_heads": 3,
        "head_dim": 16,
        "vocab_size": 61,
        "max_position_embeddings": 512,
        "weights_seed": 7,
    }
    return json.dumps(sizes | changes)


SHAPE = parse_shape(config())


def make_member(
    rank: int,
    *,
    kind: RoleKind = RoleKind.DECODE,
    node: str = "n0",
    engine: str = "",
    data: str = "",
) -> Member:
    return Member(
        rank=RankKey(role=kind.value, instance=0, rank=rank),
        kind=kind,
        node=node,
        engine_address=engine,
        data_address=data,
        incarnation=f"{kind.value}-{rank}",
    )


def expert_map(holders: Sequence[Sequence[int]], ranks: int) -> ExpertMap:
    """A map, the same in every layer, by the ranks that hold each expert."""
    width = len(holders)
    slots = [(rank, expert) for rank in range(ranks) for expert in range(width)]
    row = tuple(expert if rank in holders[expert] else -1 for rank, expert in slots)
    layers = (ExpertMapLayer(physical_to_logical=row),) * SHAPE.layers
    return ExpertMap(slots_per_rank=width, experts=width, layers=layers)


EVERYTHING_HERE = expert_map([(0,)] * SHAPE.experts, 1)


def _no_peer(lost: Member, reason: str, epoch: int) -> None:
    raise AssertionError(f"{lost} is lost at epoch {epoch}: {reason}")


class Ranks:
    """Ranks that talk over loopback; each has all experts and obeys whatever map is given."""

    def __init__(self, folder: Path, count: int) -> None:
        self._shared = load_shared(SHAPE, folder)
        self._slots = Slots(folder)
        for layer, expert in self._slots.wanted(EVERYTHING_HERE, 0):
            self._slots.load_from_disk(layer, expert)
        self._client = ExchangeClient(JOB, 20.0)
        self._servers = [
            ExchangeServer(JOB, lambda _, *asked: self._slots.serve(*asked), self._slots.weights)
            for _ in range(count)
        ]
        self._peers = {r: make_member(r, data=s.address) for r, s in enumerate(self._servers)}

    def decoder(self, held: ExpertMap = EVERYTHING_HERE, rank: int = 0) -> Decoder:
        """What this rank computes with when experts are where the map says."""
        experts = Experts(EPOCH, held, rank, self._slots, self._client, self._peers)
        return Decoder(SHAPE, self._shared, experts)

    def worker(self, step_min_s: float) -> Worker:
        """A worker that serves with all experts; its caller closes it."""
        worker = Worker(SHAPE, self._shared, self._slots, self._client, 0, _no_peer, step_min_s)
        worker.start()
        worker.resume(EPOCH, EVERYTHING_HERE, self._peers)
        return worker

    def close(self) -> None:
        self._client.close()
        for server in self._servers:
            server.close()


@contextlib.contextmanager
def ranks_of(folder: Path, count: int = 1) -> Iterator[Ranks]:
    ranks = Ranks(folder, count)
    try:
        yield ranks
    finally:
        ranks.close()


def extend(
    decoder: Decoder, histories: Sequence[History], parts: Sequence[list[int]]
) -> list[bytes]:
    """One committed step that adds a part to each history; the bits of each one's last logits."""
    spans = [Span(history, part) for history, part in zip(histories, parts, strict=True)]
    decoder.step(spans)
    decoder.commit(spans)
    return [span.logits.tobytes() for span in spans if span.logits is not None]


def bits(history: History) -> bytes:
    """Keys and values of all layers: every layer's hidden states went through them."""
    rows = slice(history.length)
    return history.keys[:, rows].tobytes() + history.values[:, rows].tobytes()


def prompt(number: int, length: int) -> list[int]:
    return [(number * 17 + place * place * 5 + place) % SHAPE.vocabulary for place in range(length)]


def fingerprint(folder: Path) -> str:
    """Weights made anew, a prompt and a decode step: a digest of all resulting bits."""
    write_checkpoint(SHAPE, folder)
    with ranks_of(folder) as ranks:
        history, decoder = History.empty(SHAPE), ranks.decoder()
        logits = [extend(decoder, [history], [part])[0] for part in (prompt(1, 40), [5])]
    return hashlib.sha256(b"".join([*logits, bits(history)])).hexdigest()
