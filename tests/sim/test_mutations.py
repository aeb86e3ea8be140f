"""Each mutation of the control plane fails some seed: the simulator catches what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from raddle.core import lifecycle, recover
from raddle.core.context import DONE_BY_STAGE, FENCED_OR_LATER, Context, has_done
from raddle.core.recovery.planner import InstanceDecision, plan_instance
from raddle.core.recovery.request import InstanceRecovery
from raddle.model import keys
from raddle.model.health import RankStatus
from raddle.model.job import AssignmentStage, Job
from raddle.scheduler.leader import Leader
from raddle.sim.run import Verdict, simulate
from raddle.sim.schedulers import SchedulersStore
from raddle.store.protocol import Transaction
from tests.sim.test_simulation import set_back_by_two_epochs

# Enough for every mutation below; the first seed that fails ends the search.
_SEEDS = 12
Patch = pytest.MonkeyPatch


def _publish_when_fenced(patch: Patch) -> None:
    """An epoch goes live when its ranks are fenced, repaired or not."""
    patch.setitem(DONE_BY_STAGE, AssignmentStage.PREPARE, FENCED_OR_LATER)


def _no_catching_up(patch: Patch) -> None:
    """A leader decides before its mirror holds the takeover's revision."""

    async def at_once(_leader: Leader) -> None:
        return None

    patch.setattr(Leader, "_mirror_holds_term", at_once)


def _no_fence(patch: Patch) -> None:
    """A leader's commits do not compare the leader key."""
    whole = SchedulersStore.commit

    async def unfenced(store: SchedulersStore, transaction: Transaction, **more: Any) -> Any:
        if transaction.writes[0].key != keys.LEADER:
            compares = tuple(c for c in transaction.compares if c.key != keys.LEADER)
            transaction = replace(transaction, compares=compares)
        return await whole(store, transaction, **more)

    patch.setattr(SchedulersStore, "commit", unfenced)


def _no_loads(patch: Patch) -> None:
    """A plan does not name the experts that its map needs loaded."""

    def unloaded(request: InstanceRecovery) -> InstanceDecision:
        return replace(plan_instance(request), moves={})

    patch.setattr(recover, "plan_instance", unloaded)


def _no_wait_for_new_processes(patch: Patch) -> None:
    """Members are told to each other before all processes have an address."""

    def done(context: Context, job: Job, status: RankStatus | None) -> bool:
        _, stage = context.state.stages[job.uid]
        return stage is AssignmentStage.START or has_done(context, job, status)

    patch.setattr(lifecycle, "has_done", done)


def _dies_are_not_given_back(patch: Patch) -> None:
    """A job that ends keeps its dies in the leader's mind."""
    patch.setattr(lifecycle, "release", lambda _context, _placement: None)


def _epochs_of_live_agents_are_ignored(patch: Patch) -> None:
    """A new epoch is above what the store knows, not above what ranks are at."""

    def above_the_store(context: Context, job: Job) -> Job:
        return replace(job, epoch=job.epoch + 1, epoch_term=context.term)

    for module in (recover, lifecycle):
        patch.setattr(module, "at_next_epoch", above_the_store)


MUTATIONS = [
    _publish_when_fenced,
    _no_catching_up,
    _no_fence,
    _no_loads,
    _no_wait_for_new_processes,
    _dies_are_not_given_back,
]


def _failing(seeds: range) -> Iterator[Verdict]:
    return (verdict for verdict in map(simulate, seeds) if verdict.failures)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__.strip("_"))
def test_a_mutation_is_caught(
    mutation: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutated control plane fails within a few seeds, with a sentence, and never hangs."""
    mutation(monkeypatch)
    found = next(_failing(range(_SEEDS)), None)
    assert found is not None, mutation.__doc__
    assert all(found.failures)


def test_epochs_below_those_of_live_ranks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that ignores what agents say of their ranks' epochs breaks an invariant."""
    _epochs_of_live_agents_are_ignored(monkeypatch)
    with pytest.raises(AssertionError, match="ahead of the job's epoch"):
        set_back_by_two_epochs()
