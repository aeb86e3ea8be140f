"""Admission: what can never run is refused with the field and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from raddle.core.admission import check_spec
from raddle.core.cluster import Cluster
from raddle.model.errors import PermanentError, Reason
from raddle.model.job import EngineSpec, JobSpec, LaunchSpec, RecoverySpec
from tests.core.machines import (
    DEEPSEEK,
    DENSE,
    make_cache,
    make_cluster,
    make_role,
    make_spec,
    make_supernode,
)


def refusal(spec: JobSpec, cluster: Cluster | None = None) -> PermanentError:
    with pytest.raises(PermanentError) as error:
        check_spec(spec, cluster or make_cluster())
    return error.value


def test_a_job_that_fits_gives_its_model() -> None:
    """EP320 of DeepSeek-V3 with one slot a rank passes."""
    role = make_role(ranks=320, slots_per_rank=1)
    shape = check_spec(make_spec(role, make_cache(), config=DEEPSEEK), make_cluster())
    assert (shape.moe_layers, shape.experts) == (58, 256)


def test_too_few_slots_are_counted_in_the_refusal() -> None:
    """20 ranks x 8 slots cannot hold 256 experts."""
    error = refusal(make_spec(make_role(ranks=20, slots_per_rank=8), config=DEEPSEEK))
    assert error.reason is Reason.DOES_NOT_FIT
    assert "20 ranks x 8 slots = 160 slots cannot hold 256 experts" in error.message
    assert error.details["field"] == "roles[0].slots_per_rank"


def test_shared_expert_ranks_hold_no_routed_expert() -> None:
    """Of 18 ranks two host the shared expert: 16 slots are left, 16 experts fit, 17 ranks not."""
    fits = make_role(ranks=18, slots_per_rank=1, shared_expert_ranks=2)
    check_spec(make_spec(fits), make_cluster())
    error = refusal(make_spec(replace(fits, ranks=17)))
    assert "15 ranks x 1 slots = 15 slots cannot hold 16 experts" in error.message


def test_experts_that_overflow_a_die_are_refused() -> None:
    """58 layers x 44 MB x 30 slots are more than a die's memory."""
    error = refusal(make_spec(make_role(ranks=16, slots_per_rank=30), config=DEEPSEEK))
    assert error.reason is Reason.DOES_NOT_FIT
    assert "GB a die" in error.message


def test_an_instance_larger_than_a_supernode_is_refused() -> None:
    """Two supernodes of 32 dies don't make one of 40."""
    cluster = make_cluster(make_supernode("a", nodes=2), make_supernode("b", nodes=2))
    error = refusal(make_spec(make_role(ranks=40)), cluster)
    assert error.message == "roles[0].ranks needs 40 dies in one supernode; the largest has 32."


def test_instances_count_together() -> None:
    """Three instances of 24 dies fit one by one, but not together into 64 dies."""
    cluster = make_cluster(make_supernode(nodes=4))
    error = refusal(make_spec(make_role(ranks=20, spares=4, instances=3)), cluster)
    assert error.message == "roles need 72 dies together; the machine has 64."


def test_pool_memory_counts_together() -> None:
    """Two pools of one host each can't both have more than half of the only host."""
    cluster = make_cluster(make_supernode(nodes=1))
    cache = make_cache(ranks=1, instances=2, dram_bytes=2_000_000_000_000)
    error = refusal(make_spec(make_role(), cache), cluster)
    assert error.reason is Reason.DOES_NOT_FIT
    assert "host memory" in error.message


def test_no_machine_yet() -> None:
    """Before a supernode is applied the refusal says what to do."""
    assert "apply a supernode first" in refusal(make_spec(), Cluster([])).message


BAD: list[tuple[str, Callable[[JobSpec], JobSpec], Reason, str]] = [
    ("name", lambda s: replace(s, name="Job_1"), Reason.INVALID_NAME, "name"),
    ("separator", lambda s: replace(s, name="a/b"), Reason.INVALID_NAME, "name"),
    ("control", lambda s: replace(s, namespace="a\nb"), Reason.INVALID_NAME, "namespace"),
    ("long", lambda s: replace(s, name="a" * 64), Reason.INVALID_NAME, "name"),
    (
        "model name",
        lambda s: replace(s, model=replace(s.model, name="a\x1b[31m")),
        Reason.INVALID_NAME,
        "model.name",
    ),
    (
        "long uri",
        lambda s: replace(s, model=replace(s.model, weights_uri="x" * 1_025)),
        Reason.LIMIT_EXCEEDED,
        "model.weights_uri",
    ),
    (
        "no config",
        lambda s: replace(s, model=replace(s.model, config="")),
        Reason.INVALID_ARGUMENT,
        "model.config",
    ),
    (
        "dtype",
        lambda s: replace(s, model=replace(s.model, weight_dtype="int3")),
        Reason.INVALID_ARGUMENT,
        "int3",
    ),
    ("no roles", lambda s: replace(s, roles=()), Reason.INVALID_ARGUMENT, "roles"),
    ("twice", lambda s: replace(s, roles=s.roles * 2), Reason.INVALID_ARGUMENT, "used twice"),
    (
        "option",
        lambda s: replace(s, recovery=RecoverySpec(allowed_options=("PRAY",))),
        Reason.INVALID_ARGUMENT,
        "PRAY",
    ),
    (
        "pause",
        lambda s: replace(s, recovery=RecoverySpec(max_pause=-1.0)),
        Reason.INVALID_ARGUMENT,
        "max_pause",
    ),
    (
        "pause without end",
        lambda s: replace(s, recovery=RecoverySpec(max_pause=2.0**62)),
        Reason.INVALID_ARGUMENT,
        "max_pause",
    ),
    (
        "masking",
        lambda s: replace(s, recovery=RecoverySpec(allow_masking=True)),
        Reason.ENGINE_UNSUPPORTED,
        "recovery.allow_masking",
    ),
    (
        "negative MTP layers",
        lambda s: replace(s, model=replace(s.model, mtp_layers=-5)),
        Reason.INVALID_ARGUMENT,
        "model.mtp_layers",
    ),
    (
        "negative context",
        lambda s: replace(s, model=replace(s.model, max_context_tokens=-7)),
        Reason.INVALID_ARGUMENT,
        "model.max_context_tokens",
    ),
    ("only cache", lambda s: replace(s, roles=(make_cache(),)), Reason.INVALID_ARGUMENT, "prefill"),
]


@pytest.mark.parametrize(
    ("change", "reason", "text"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_fields_are_named(
    change: Callable[[JobSpec], JobSpec], reason: Reason, text: str
) -> None:
    """Each refusal names its field, one reason each."""
    error = refusal(change(make_spec()))
    assert error.reason is reason
    assert text in error.message


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"instances": 0}, Reason.INVALID_ARGUMENT, "instances"),
        ({"ranks": -1}, Reason.INVALID_ARGUMENT, "ranks"),
        ({"ranks": 1 << 40}, Reason.LIMIT_EXCEEDED, "ranks"),
        ({"slots_per_rank": 2_000}, Reason.LIMIT_EXCEEDED, "slots_per_rank"),
        ({"tp": 2}, Reason.INVALID_ARGUMENT, "tp"),
        ({"engine": EngineSpec(driver="vllm")}, Reason.INVALID_ARGUMENT, "engine.driver"),
        (
            {"engine": EngineSpec(driver="simulated", attach=True)},
            Reason.ENGINE_UNSUPPORTED,
            "engine.attach",
        ),
        (
            {"engine": EngineSpec(driver="simulated", launch=LaunchSpec(command="sh"))},
            Reason.ENGINE_UNSUPPORTED,
            "engine.launch",
        ),
    ],
)
def test_bad_numbers_of_a_role_are_named(
    changes: dict[str, Any], reason: Reason, field: str
) -> None:
    """Counts are positive and bounded, tp is 1, the driver is known."""
    error = refusal(make_spec(make_role(**changes)))
    assert (error.reason, error.details["field"]) == (reason, f"roles[0].{field}")


def test_expert_parallelism_needs_experts() -> None:
    """A dense model with slots is refused, without slots it passes."""
    error = refusal(make_spec(make_role(), config=DENSE))
    assert "has no experts" in error.message
    check_spec(make_spec(make_role(slots_per_rank=0), config=DENSE), make_cluster())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dram_bytes": 0}, "dram_bytes must be above 0"),
        ({"dram_bytes": 4_000_000_000_000}, "more than a host's"),
        ({"ranks": 49}, "the largest machine has 48 hosts"),
        ({"spares": 1}, "no spares"),
    ],
)
def test_cache_roles_take_host_memory(changes: dict[str, Any], text: str) -> None:
    """A pool needs memory that its hosts have, one member a host, and no dies."""
    assert text in refusal(make_spec(make_role(), make_cache(**changes))).message
