"""Ranks that find this folder in PYTHONPATH wait on their way to or from the pool, if told to.

A folder in `$RADDLE_TEST_HOLDS` is a hold: its name begins with the call and the kind of rank that
it is about, its file `blocks` names blocks. A rank whose call is about one of them says so there
in a file with the number of its process, and waits until the folder is gone.
"""

import asyncio
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from raddle.agent.engine.reference.block_store import Block
from raddle.agent.engine.reference.pool import PoolPeers
from raddle.model.types import Fence, Member

_HOLDS = Path(os.environ["RADDLE_TEST_HOLDS"])
_true_get, _true_put = PoolPeers.get, PoolPeers.put


async def _wait(call: str, peers: PoolPeers, names: Iterable[str]) -> None:
    for hold in _holds(f"{call}-{peers._writer.role}", set(names)):
        (hold / str(os.getpid())).touch()
        while hold.exists():  # noqa: ASYNC110 - another process ends it
            await asyncio.sleep(0.01)  # the pause between two looks


def _holds(point: str, names: set[str]) -> list[Path]:
    found = list(_HOLDS.glob(f"{point}-*"))
    return [hold for hold in found if names & set((hold / "blocks").read_text().split())]


async def _get(
    self: PoolPeers, fence: Fence, member: Member, names: Sequence[str]
) -> list[tuple[str, Block]]:
    """Waits with what this member has in hand, while others' answers may still be on their way."""
    found = await _true_get(self, fence, member, names)
    await _wait("get", self, [name for name, _ in found])
    return found


async def _put(
    self: PoolPeers,
    fence: Fence,
    member: Member,
    blocks: Sequence[tuple[str, Block]],
    evict_idle_s: float | None = None,
) -> set[str] | None:
    """Waits before anything is sent."""
    await _wait("put", self, [name for name, _ in blocks])
    return await _true_put(self, fence, member, blocks, evict_idle_s)


PoolPeers.get = _get  # type: ignore[method-assign]
PoolPeers.put = _put  # type: ignore[method-assign]
