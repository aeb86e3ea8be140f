"""The definitions on a real API server: what it takes, what it refuses and in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tools.kubernetes import crds
from tools.kubernetes.cluster import CommandError

from tests.kubernetes import ApiServer
from tests.operator.resources import inference_job, role

NAMESPACE = "definitions"


@pytest.fixture(scope="module")
def api(served_definitions: ApiServer) -> ApiServer:
    """The API server with our definitions and a namespace of these tests."""
    served_definitions.make_namespace(NAMESPACE)
    return served_definitions


def resource(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "raddle.dev/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    }


def job(name: str, *roles: dict[str, Any], **more: Any) -> dict[str, Any]:
    return resource("InferenceJob", name, inference_job(name, *roles, **more)["spec"])


def apply(api: ApiServer, item: dict[str, Any], *more: str) -> dict[str, Any]:
    text = api.kubectl(
        "apply", "-n", NAMESPACE, "-o", "json", "-f", "-", *more, stdin=json.dumps(item)
    )
    found: dict[str, Any] = json.loads(text)
    return found


def refusal(api: ApiServer, item: dict[str, Any], *more: str) -> str:
    with pytest.raises(CommandError) as caught:
        apply(api, item, *more)
    return str(caught.value)


def test_defaults_are_filled_in(api: ApiServer) -> None:
    """A short job is a whole one."""
    short = job("defaults")
    short["spec"] = {
        "model": {"config": "raddle-demo"},
        "roles": [{"name": "d", "kind": "decode", "ranks": 1, "engine": {"driver": "simulated"}}],
    }
    spec = apply(api, short)["spec"]
    assert spec["suspend"] is False
    assert spec["model"]["kvBlockTokens"] == 128
    assert spec["roles"][0]["instances"] == 1


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (job("1st"), "metadata.name must be at most 63 lower-case letters"),
        (job("x", role("c", "cache")), "at least one of kind prefill or decode"),
        (job("x", role("d"), role("d")), "Duplicate value"),
        (job("x", role("d"), role("c", "cache", dramBytes=0)), "a cache role needs dramBytes"),
        (job("x", role("d", kvReplicas=2)), "kvReplicas belongs to a cache role"),
        (job("x", role("d"), role("c", "cache", spares=1)), "leave slotsPerRank and spares out"),
        (job("x", role("d", "train")), 'supported values: "prefill", "decode", "cache"'),
        (job("x", role("d", ranks=0)), "should be greater than or equal to 1"),
        (job("x", role("d", engine={"driver": "vllm"})), "supported values"),
        (job("x", recovery={"allowedOptions": ["PRAY"]}), "supported values"),
        (job("x", nonsense=1), 'unknown field "spec.nonsense"'),
        (resource("SuperNode", "sn9", {"machine": "mine"}), "every other field has to be given"),
        (resource("Maintenance", "m", {"subject": "somewhere/else"}), "should match"),
    ],
)
def test_a_bad_resource_is_refused_in_words_that_help(
    api: ApiServer, item: dict[str, Any], words: str
) -> None:
    """The message says what is wrong with which field."""
    assert words in refusal(api, item)


def test_what_runs_cannot_change_unless_it_is_suspended(api: ApiServer) -> None:
    """Sizes, priority and templates may; model and layout wait for `suspend`."""
    apply(api, job("running"))
    apply(api, job("running", role("decode", ranks=8, instances=2, template={"spec": {}})))
    apply(api, job("running", role("decode", ranks=8), priority=4))
    other = job("running", role("decode", ranks=8, slotsPerRank=11))
    assert "set spec.suspend to true first" in refusal(api, other)
    model = job("running", role("decode", ranks=8))
    model["spec"]["model"]["config"] = "deepseek-r1"
    assert "model cannot change while the job runs" in refusal(api, model)
    apply(api, job("running", role("decode", ranks=8), suspend=True))
    other["spec"]["suspend"] = True
    apply(api, other)


def test_two_managers_own_fields_of_their_own(api: ApiServer) -> None:
    """Roles are merged by name; who writes another's field is refused unless forced."""
    flags = ("--server-side", "--field-manager")
    apply(api, job("shared", role("decode"), role("prefill", "prefill")), *flags, "team")
    size = resource("InferenceJob", "shared", {})
    del size["spec"]
    size["spec"] = {"priority": 9}
    assert "conflict" in refusal(api, size, *flags, "scaler").lower()
    found = apply(api, size, *flags, "scaler", "--force-conflicts")
    assert found["spec"]["priority"] == 9
    assert [r["name"] for r in found["spec"]["roles"]] == ["decode", "prefill"]


def test_a_role_is_scaled_and_a_maintenance_cannot_change(api: ApiServer) -> None:
    """`kubectl scale` works on the role."""
    spec = {"job": "j", "role": "decode", "kind": "decode", "replicas": 1}
    apply(api, resource("InferenceRole", "j-decode", spec))
    api.kubectl("scale", "-n", NAMESPACE, "ir/j-decode", "--replicas=3")
    found = json.loads(api.kubectl("get", "-n", NAMESPACE, "ir", "j-decode", "-o", "json"))
    assert found["spec"]["replicas"] == 3
    other = resource("InferenceRole", "j-decode", spec | {"role": "other"})
    assert "cannot change" in refusal(api, other)
    apply(api, resource("Maintenance", "fan", {"subject": "sn0/n07"}))
    moved = resource("Maintenance", "fan", {"subject": "sn0/n08"})
    assert "delete it and make another one" in refusal(api, moved)
    # Operators of other tests on this server would carry it out.
    api.kubectl("delete", "mt", "fan")


def test_people_find_their_way(api: ApiServer) -> None:
    """Short names, the category, explain, and columns."""
    apply(api, job("shown"))
    assert "shown" in api.kubectl("get", "-n", NAMESPACE, "ij")
    assert "inferencejob.raddle.dev/shown" in api.kubectl(
        "get", "-n", NAMESPACE, "raddle", "-o", "name"
    )
    explained = api.kubectl("explain", "ij.spec.roles.spreadNodes")
    assert "An instance sits on at least so many nodes" in explained
    header = api.kubectl("get", "-n", NAMESPACE, "ij").splitlines()[0].split()
    assert header == ["NAME", "STATE", "READY", "RANKS", "EPOCH", "INCIDENT", "AGE"]


def test_every_definition_is_established(api: ApiServer) -> None:
    """And the server says nothing against any schema."""
    for path in crds.FOLDER.glob("*.yaml"):
        name = f"{Path(path).stem}.raddle.dev"
        found = json.loads(api.kubectl("get", "crd", name, "-o", "json"))
        conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
        assert conditions["NamesAccepted"] == "True"
        assert conditions.get("NonStructuralSchema", "False") == "False"
