"""The custom resource definitions are what the protos say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import json_format
from tools.kubernetes import crds

from raddle.v1 import job_pb2, scheduler_pb2, topology_pb2


def definitions() -> dict[str, dict[str, Any]]:
    import yaml

    found = [yaml.safe_load(path.read_text()) for path in sorted(crds.FOLDER.glob("*.yaml"))]
    return {definition["spec"]["names"]["kind"]: definition for definition in found}


def schema_of(kind: str) -> dict[str, Any]:
    version = definitions()[kind]["spec"]["versions"][0]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def test_the_files_are_what_the_generator_writes() -> None:
    """A change of a proto's field, comment or bound changes them: `make crds`."""
    assert {p.name: p.read_text() for p in crds.FOLDER.glob("*.yaml")} == crds.texts()


@pytest.mark.parametrize(
    ("kind", "message", "own"),
    [
        ("InferenceJob", job_pb2.JobSpec, {"suspend"}),
        ("SuperNode", topology_pb2.SuperNode, set()),
        ("Maintenance", scheduler_pb2.CreateMaintenanceRequest, set()),
    ],
)
def test_every_field_of_a_spec_is_one_of_the_message(
    kind: str, message: Any, own: set[str]
) -> None:
    """Names, nesting and types: what the API server accepts, the message takes."""
    spec = schema_of(kind)["properties"]["spec"]
    example = sample(spec)
    for name in own:
        example.pop(name)
    for role in example.get("roles", ()):
        role.pop("template")
    json_format.ParseDict(json.loads(json.dumps(example)), message())


def sample(schema: dict[str, Any]) -> Any:
    """A value with every field that the schema has."""
    if "enum" in schema:
        return schema["enum"][0]
    match schema["type"]:
        case "object":
            return {name: sample(s) for name, s in schema.get("properties", {}).items()}
        case "array":
            return [sample(schema["items"])]
        case "integer":
            return max(1, schema.get("minimum", 1))
        case "boolean":
            return True
        case _:
            return "1s" if schema.get("pattern") == crds.DURATION else "text"


def test_only_the_role_can_be_scaled() -> None:
    """The job itself has no one size."""
    scaled = {
        kind
        for kind, definition in definitions().items()
        if "scale" in definition["spec"]["versions"][0]["subresources"]
    }
    assert scaled == {"InferenceRole"}


def test_every_field_of_a_spec_has_a_bound_and_a_type() -> None:
    """Texts and lists end somewhere, so that rules over them have a price."""

    def check(path: str, schema: dict[str, Any]) -> None:
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return
        if schema["type"] == "string":
            assert {"maxLength", "enum"} & schema.keys(), path
        if schema["type"] == "array":
            assert "maxItems" in schema, path
            check(f"{path}[]", schema["items"])
        for name, inner in schema.get("properties", {}).items():
            check(f"{path}.{name}", inner)

    for kind in definitions():
        check(kind, schema_of(kind)["properties"]["spec"])
