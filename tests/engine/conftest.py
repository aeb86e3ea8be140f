"""The small model's weights, written once, and one rank that holds all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raddle.agent.engine.reference.model import Decoder
from raddle.agent.engine.reference.weights import write_checkpoint
from tests.engine.small import SHAPE, ranks_of


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "small"
    write_checkpoint(SHAPE, folder)
    return folder


@pytest.fixture(scope="session")
def decoder(checkpoint: Path) -> Iterator[Decoder]:
    with ranks_of(checkpoint) as ranks:
        yield ranks.decoder()
