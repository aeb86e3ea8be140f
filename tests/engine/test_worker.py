"""The computing thread of a rank, by itself."""

from __future__ import annotations

import queue
from pathlib import Path

from raddle.agent.engine.reference.model import History
from raddle.agent.engine.reference.worker import Sequence
from tests.engine.small import EPOCH, SHAPE, prompt, ranks_of


def test_steps_keep_their_pace(checkpoint: Path) -> None:
    """After a step the next one waits as long as it is told to; a fence and the end do not."""
    came: queue.Queue[int | None] = queue.Queue()
    tokens = prompt(1, 5)
    with ranks_of(checkpoint) as ranks:
        worker = ranks.worker(step_min_s=3600.0)
        final, history = len(tokens) + 4, History.empty(SHAPE)
        worker.add(Sequence("s", tokens, final, history, came.put, lambda _: None))
        assert came.get(timeout=20.0) is not None
        worker.quiesce(EPOCH + 1, abort=True)
        worker.close()
        assert came.get(timeout=20.0) is None
    assert came.empty()
