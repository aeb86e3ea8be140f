"""From a resource to the scheduler's spec, and from a job to what is wanted."""

from __future__ import annotations

import pytest

from raddle.model.errors import PermanentError
from raddle.models import config_text
from raddle.operator.spec import Replace, Scale, Update, changes, job_message, replicas
from tests.operator.resources import inference_job, role, stored


def test_a_resource_becomes_the_spec_of_a_job() -> None:
    """Name and namespace come from the metadata, a built-in model by its name, own fields stay."""
    resource = inference_job("demo", role("decode", template={"spec": {"hostNetwork": True}}))
    message = job_message(resource, {})
    assert (message.namespace, message.name) == ("default", "demo")
    assert message.model.config == config_text("raddle-demo")
    assert [r.name for r in message.roles] == ["decode"]


def test_sizes_of_roles_go_before_those_of_the_job() -> None:
    """A prefill or decode role grows by instances, a cache by ranks."""
    resource = inference_job("demo", role("decode"), role("cache", "cache", ranks=2))
    message = job_message(resource, {"decode": 3, "cache": 5})
    assert [(r.instances, r.ranks) for r in message.roles] == [(3, 4), (1, 5)]
    assert [replicas(r) for r in resource["spec"]["roles"]] == [1, 2]


def test_an_unknown_field_is_refused_by_its_name() -> None:
    """What the API server let through is still checked here."""
    with pytest.raises(PermanentError, match="nonsense"):
        job_message(inference_job("demo", role("decode", nonsense=1)), {})


def test_the_same_spec_asks_for_nothing() -> None:
    """Defaults that the scheduler filled in, and the order of roles, are no difference."""
    resource = inference_job("demo", role("decode"), role("cache", "cache", ranks=2))
    have = stored(job_message(resource, {}))
    resource["spec"]["roles"].reverse()
    del resource["spec"]["model"]["weightDtype"]
    assert changes(job_message(resource, {}), have) == []


def test_what_can_change_is_changed_by_the_fitting_calls() -> None:
    """Priority and recovery are updated together, then roles are scaled one by one."""
    have = stored(job_message(inference_job(), {}))
    recovery = {"allowedOptions": ["REMAP"]}
    resource = inference_job("demo", role("decode", ranks=6), priority=5, recovery=recovery)
    wanted = changes(job_message(resource, {"decode": 2}), have)
    assert wanted == [
        Update(("priority", "recovery")),
        Scale("decode", instances=2),
        Scale("decode", ranks=6),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"roles": [role("decode", slotsPerRank=11)]},
        {"roles": [role("decode"), role("prefill", "prefill")]},
        {"model": {"config": "deepseek-r1"}},
    ],
)
def test_what_cannot_change_asks_for_another_job(change: dict[str, object]) -> None:
    """Another model or another layout of roles is another job."""
    have = stored(job_message(inference_job(), {}))
    found = changes(job_message(inference_job("demo", **change), {}), have)
    assert [type(item) for item in found] == [Replace]
