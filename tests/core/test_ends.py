"""What an incident says of a rank whose process ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raddle.core.events import Woken
from raddle.model import keys
from raddle.model.health import EXIT_CODE_UNKNOWN, RankStage
from tests.core.test_pod_words import incidents
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
    key = keys.acks(world.store[keys.placement(uid)].instances[0].ranks[0].node, uid)
    acks = world.store[key]
    first = next(status for status in acks.ranks if (status.role, status.rank) == ("decode", 0))
    end = replace(first, stage=stage, exit_code=exit_code, message=message)
    ranks = tuple(end if status == first else status for status in acks.ranks)
    world.observe(key, replace(acks, ranks=ranks))
    world.now += 0.02
    world.handle(Woken())
    (incident,) = incidents(world)
    assert incident.why.message.startswith(sentence)
