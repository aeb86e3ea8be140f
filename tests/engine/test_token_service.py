"""What a rank does for a front door's stream ends with the stream."""

from __future__ import annotations

from typing import Any

import pytest

from raddle.agent.engine.reference.fences import Standing
from raddle.agent.engine.reference.model import History
from raddle.agent.engine.reference.token_service import TokenService
from raddle.agent.engine.reference.worker import Sequence
from raddle.v1 import reference_pb2, types_pb2
from tests.engine.small import BLOCK_TOKENS, EPOCH, JOB, SHAPE


class Rank:
    """A rank's insides as far as streams need them: the sequences that it works on."""

    block_tokens = BLOCK_TOKENS

    def __init__(self) -> None:
        self.worker = self
        self.sequences: list[Sequence] = []

    def require_room(self, tokens: list[int], final: int) -> None:
        """There is room."""

    async def new_history(self, tokens: list[int]) -> tuple[History, int]:
        return History.empty(SHAPE), 0

    def add(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)


@pytest.mark.parametrize("answers", [1, 2])
async def test_a_sequence_ends_with_its_stream(answers: int) -> None:
    """A front door that leaves, before the first token or later, leaves no sequence behind."""
    rank: Any = Rank()
    service = TokenService(Standing(JOB, EPOCH), rank)
    fence = types_pb2.Fence(job_uid=JOB, epoch=EPOCH)
    stream: Any = service._generate(
        reference_pb2.GenerateRequest(fence=fence, prompt_tokens=[1, 2], max_tokens=3)
    )
    await anext(stream)
    (sequence,) = rank.sequences
    for token in range(answers - 1):
        sequence.emit(token)
        await anext(stream)
    await stream.aclose()
    assert rank.sequences == []
