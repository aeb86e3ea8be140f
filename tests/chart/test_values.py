"""Values: complete in schema and README, and refused with a clear word when they are nonsense."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import CHART, MATRIX, environment, refusal, render, run
from tests.support import ROOT


def test_the_chart_passes_the_strict_lint() -> None:
    """`helm lint --strict` finds nothing."""
    result = run("lint", "--strict", str(CHART))
    assert result.returncode == 0, result.stdout + result.stderr


def test_readme_and_dashboard_are_what_the_generator_writes() -> None:
    """The README follows the comments in values.yaml, the dashboard its list of panels."""
    command = [sys.executable, "tools/docs/chart.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_the_chart_has_the_version_of_the_project() -> None:
    """Images are tagged with it."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]


def _paths(schema: dict[str, Any], prefix: str = "") -> set[str]:
    """Every value that a schema names."""
    found = set()
    for key, inner in schema.get("properties", {}).items():
        found |= _paths(inner, f"{prefix}{key}.") or {prefix + key}
    return found


def _closed(schema: Any, path: str = "") -> list[str]:
    """Objects with named properties that let unknown ones in."""
    found = []
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("additionalProperties") is not False:
            found.append(path)
        for key, inner in schema.items():
            found += _closed(inner, f"{path}/{key}")
    elif isinstance(schema, list):
        for inner in schema:
            found += _closed(inner, path)
    return found


def test_the_schema_names_every_value_and_no_other() -> None:
    """values.yaml and the schema have the same keys, and no object takes unknown ones.

    But `global`, where the charts around this one have theirs.
    """
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert _closed(schema) == ["/properties/global"]
    for path in _paths({"properties": schema["properties"]}):
        value: Any = values
        for key in path.split("."):
            # Below an empty map (`issuerRef: {}`) the schema knows more than the defaults show.
            assert value == {} or key in value, path
            value = value.get(key, {})
    known = _paths({"properties": schema["properties"]})
    for path in _leaves(values):
        assert any(f"{p}.".startswith(f"{path}.") or path.startswith(f"{p}.") for p in known), path


def test_no_setting_is_given_twice(tmp_path: Path) -> None:
    """What the chart sets for a daemon cannot be set beside it, whatever the values are."""
    own: set[tuple[str, str]] = set()
    for values in MATRIX.values():
        for document in render(values):
            daemon = document["metadata"]["labels"].get("app.kubernetes.io/component", "")
            if document["kind"] in ("Deployment", "DaemonSet"):
                prefix = f"RADDLE_{daemon.upper()}_"
                taken = [v.removeprefix(prefix) for v in environment(document) if prefix in v]
                own |= {(daemon, name.lower()) for name in taken}
    own.discard(("agent", "drivers_extra"))  # of the matrix
    assert len(own) > 30
    for daemon, name in sorted(own):
        assert f"{daemon}.settings.{name}:" in refusal(
            {daemon: {"settings": {name: "x"}}}, tmp_path
        )


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append(prefix + key)
    return found


@pytest.mark.parametrize("name", MATRIX)
def test_each_row_of_the_matrix_renders(name: str) -> None:
    """Every object has a kind and a name, no name comes twice, all are in the release's reach."""
    documents = render(MATRIX[name])
    identities = [
        (d["kind"], d["metadata"].get("namespace", ""), d["metadata"]["name"]) for d in documents
    ]
    assert len(set(identities)) == len(identities)
    for document in documents:
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == "raddle"


NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"schduler": {"replicas": 3}}, "schduler"),
    ({"scheduler": {"replicas": 0}}, "/scheduler/replicas"),
    ({"scheduler": {"replicas": "three"}}, "/scheduler/replicas"),
    ({"image": {"digest": "sha256:short"}}, "/image/digest"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
    ({"agent": {"hostPath": "relative"}}, "/agent/hostPath"),
    ({"agent": {"settings": {"Etcd": "elsewhere:1"}}}, "/agent/settings"),
    (
        {"scheduler": {"settings": {"policy": "x"}}},
        "scheduler.settings.policy: the chart sets this",
    ),
    (
        {"agent": {"pools": [{"name": "a", "settings": {"ranks": "x"}}]}},
        "agent.settings.ranks: the chart sets this",
    ),
    ({"agent": {"pools": [{"nodeSelector": {}}]}}, "/agent/pools/0"),
    ({"etcd": {"external": {"endpoints": ["https://etcd:2379"]}}}, "/etcd/external/endpoints/0"),
    ({"machine": {"name": "cloudmatrix"}}, "/machine/name"),
    ({"monitoring": {"serviceMonitor": "perhaps"}}, "/monitoring/serviceMonitor"),
    ({"scheduler": {"policy": {"rules": [{"identities": ["a"]}]}}}, "/scheduler/policy"),
    ({"etcd": {"enabled": False}}, "name the addresses of your etcd in etcd.external.endpoints"),
    (
        {"etcd": {"enabled": False, "external": {"endpoints": ["etcd:2379"]}}},
        "etcd.external.tlsSecret is empty",
    ),
    (
        {"etcd": {"external": {"endpoints": ["etcd:2379"]}}},
        "etcd.external is for etcd.enabled=false",
    ),
    ({"certificates": {"renewalSchedule": 7}}, "/certificates/renewalSchedule"),
    ({"operator": {"enabled": False}}, "say in agent.nodes which positions"),
    ({"agent": {"nodes": {"w": ["sn0/n00"]}}}, "agent.nodes is for operator.enabled=false"),
    (
        {"devices": {"podResources": True}, "machine": {"simulated": False}},
        "devices.podResources is for machine.simulated=false",
    ),
    ({"operator": {"supernodes": ["sn1"]}}, 'operator.supernodes has not "sn0"'),
    ({"certificates": {"days": 30}}, "must be below certificates.days=30"),
    ({"agent": {"pools": [{"name": "a"}, {"name": "a"}]}}, 'agent.pools names "a" twice'),
]


@pytest.mark.parametrize(("values", "word"), NONSENSE)
def test_nonsense_is_refused_by_name(values: dict[str, Any], word: str, tmp_path: Path) -> None:
    """A wrong key, type, word or combination ends the installation and names itself."""
    said = refusal(values, tmp_path)
    assert word in said or word.replace("/", ".").strip(".") in said, said
