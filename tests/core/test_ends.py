"""What an incident says of a rank whose process ended."""

from __future__ import annotations

import pytest

from raddle.model.health import EXIT_CODE_UNKNOWN, RankStage
from tests.core.test_pod_words import incidents
from tests.core.test_second_faults import exits
from tests.core.world import World, submit


@pytest.mark.parametrize(
    ("stage", "exit_code", "message", "sentence"),
    [
        (RankStage.EXITED, 3, "", "rank process ended with exit code 3"),
        (RankStage.EXITED, -9, "it is gone", "rank process ended by signal 9: it is gone"),
        (RankStage.EXITED, EXIT_CODE_UNKNOWN, "it is gone", "rank process ended: it is gone"),
        (RankStage.FAILED, 0, "no image", "rank process failed: no image"),
    ],
)
def test_an_end_is_told_as_far_as_it_is_known(
    world: World, stage: RankStage, exit_code: int, message: str, sentence: str
) -> None:
    """An exit code, a signal, or the end alone; never a number that means nothing."""
    uid = submit(world)
    exits(world, uid, 0, stage=stage, exit_code=exit_code, message=message)
    (incident,) = incidents(world)
    assert incident.why.message.startswith(sentence)
