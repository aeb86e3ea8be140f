"""Ranks that are held in the middle of a transfer of blocks, and what ranks hold at rest."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from raddle import models
from raddle.agent.engine.reference.block_store import Block
from raddle.agent.engine.reference.blocks import block_hashes, cache_key
from raddle.agent.engine.reference.config import RankAddress, read_address
from raddle.agent.engine.reference.pool import BLOCKS_A_CALL
from raddle.agent.engine.reference.shape import parse_shape
from raddle.model.types import Fence
from raddle.telemetry.channels import make_channel
from raddle.traces import TraceRequest, block_tokens
from raddle.v1 import engine_pb2, engine_pb2_grpc, reference_pb2, reference_pb2_grpc, types_pb2
from raddle.wire.codec import to_message
from tests.e2e.served import Served

HELD = Path(__file__).parent / "held"
BLOCK_TOKENS = 16
# No block of the trace has such a number.
_FRESH = 1_000_000


def fresh_request(number: int, blocks: int, output_tokens: int) -> TraceRequest:
    """A prompt of which no rank has a block."""
    tokens = block_tokens(_FRESH + number, blocks * BLOCK_TOKENS, 512)
    return TraceRequest(tuple(tokens), output_tokens)


def blocks_of(tokens: Sequence[int]) -> list[str]:
    """Names of the full blocks of these tokens."""
    digest = parse_shape(models.config_text("raddle-demo")).digest
    return block_hashes(cache_key(digest), tokens, BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Hold:
    """A place at which ranks wait; see `held/sitecustomize.py`."""

    folder: Path

    def holders(self, served: Served) -> list[int]:
        """Running ranks that wait here."""
        running = served.cluster.rank_processes().values()
        return [pid for pid in running if (self.folder / str(pid)).exists()]

    async def holder(self, served: Served) -> int:
        """Wait until a rank waits here; gives its process."""

        async def held() -> bool:
            return bool(self.holders(served))

        await served.cluster.until(held, f"a rank waits at {self.folder.name}")
        return self.holders(served)[0]

    def release(self) -> None:
        self.folder.rename(self.folder.with_name(f"over-{self.folder.name}"))


class Holds:
    """Makes the ranks that are started from now on wait where they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        folder.mkdir()
        monkeypatch.setenv("RADDLE_TEST_HOLDS", str(folder))
        monkeypatch.setenv("PYTHONPATH", str(HELD))

    def at(self, point: str, blocks: Sequence[str]) -> Hold:
        """Ranks wait at the point, as `get-decode`, with any of these blocks."""
        name = f"{point}-{blocks[0]}"
        making = self._folder / f"making-{name}"
        making.mkdir()
        (making / "blocks").write_text("\n".join(blocks))
        return Hold(making.rename(self._folder / name))


# --- what ranks say of themselves ------------------------------------------------------------


def rank_folders(served: Served) -> Iterator[tuple[Path, RankAddress]]:
    """Folder and address of the running ranks, and of all the job's ranks that ever ran."""
    for path in served.cluster.folder.glob(f"state/agent-*/ranks/*/{served.uid}/*"):
        address = read_address(path)
        if address is not None:
            yield path, address


def running_ranks(served: Served) -> list[RankAddress]:
    processes = served.cluster.rank_processes()
    return [address for _, address in rank_folders(served) if address.incarnation in processes]


def logs_of(served: Served, role: str) -> str:
    """All that ranks of a role logged."""
    found = [path for path, address in rank_folders(served) if address.role == role]
    return "".join((path / "rank.log").read_text() for path in found)


@asynccontextmanager
async def channel_to(address: RankAddress) -> AsyncIterator[grpc.aio.Channel]:
    channel = make_channel(address.engine_address, identity="agent/test")
    try:
        yield channel
    finally:
        await channel.close()


def fence_of(job_uid: str, epoch: int) -> Any:
    return to_message(Fence(job_uid=job_uid, epoch=epoch), types_pb2.Fence)


async def assert_nothing_is_held(served: Served, names: Sequence[str]) -> None:
    """At rest no rank holds a sequence, and every copy of these blocks is whole and the same."""
    fence = fence_of(served.uid, (await served.job()).job.epoch)
    payloads: dict[str, set[bytes]] = {}
    for address in running_ranks(served):
        async with channel_to(address) as channel:
            assert await _sequences_held(address, channel, fence) == 0, address
            for name, block in await _blocks(channel, fence, names):
                assert block.is_whole, (address, name)
                payloads.setdefault(name, set()).add(block.payload)
    assert sorted(payloads) == sorted(names), "blocks are lost"
    assert all(len(copies) == 1 for copies in payloads.values()), "copies of a block differ"


async def _sequences_held(address: RankAddress, channel: grpc.aio.Channel, fence: Any) -> int:
    """A rank that serves at this very epoch goes on, and says what it holds."""
    if address.role == "cache":
        return 0
    stub: Any = engine_pb2_grpc.EngineStub(channel)
    keep = engine_pb2.QUIESCE_MODE_KEEP
    request = engine_pb2.QuiesceRequest(fence=fence, mode=keep)
    return int((await stub.Quiesce(request, timeout=5.0)).sequences_held)


async def _blocks(
    channel: grpc.aio.Channel, fence: Any, names: Sequence[str]
) -> list[tuple[str, Block]]:
    """Those of the blocks that a rank has."""
    stub: Any = reference_pb2_grpc.PoolMemberStub(channel)
    found = []
    for start in range(0, len(names), BLOCKS_A_CALL):
        some = names[start : start + BLOCKS_A_CALL]
        request = reference_pb2.GetBlocksRequest(fence=fence, block_hashes=some)
        answer = await stub.GetBlocks(request, timeout=5.0)
        found += [(b.block_hash, Block(b.payload, b.checksum)) for b in answer.blocks]
    return found
