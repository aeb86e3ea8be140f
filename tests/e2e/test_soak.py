"""The soak itself: it must not pass without its load."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from raddle.cli.cluster import LocalCluster
from tests.soak import Soak


async def test_a_soak_whose_load_has_ended_fails(tmp_path: Path) -> None:
    """What ended the load is raised, during the faults and after them."""

    async def broken() -> None:
        raise OSError("the load is gone")

    run = Soak(LocalCluster(tmp_path), random.Random(1))
    serving = asyncio.create_task(broken())
    await asyncio.wait({serving})
    with pytest.raises(OSError, match="the load is gone"):
        await run.strike(60.0, serving)
    with pytest.raises(OSError, match="the load is gone"):
        await run.serve_on(serving)
