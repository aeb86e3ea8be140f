"""The custom resource definitions of a release, from installation to after its end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import CommandError, run_command

from tests.chart.rendering import CHART, NAMESPACE, RELEASE, helm
from tests.kubernetes import ApiServer, demand_api_server

NEW_FIELD = "fanNoise"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    """One that has no definitions of ours yet."""
    demand_api_server()
    found = ApiServer(tmp_path)
    try:
        found.start()
        found.make_namespace(NAMESPACE)
        yield found
    finally:
        found.stop()


def run_helm(server: ApiServer, *arguments: str) -> str:
    """Without hooks, for nothing runs here."""
    options = [f"--kubeconfig={server.kubeconfig}", f"--namespace={NAMESPACE}", "--no-hooks"]
    return run_command([helm(), *arguments, *options])


def next_chart(folder: Path) -> Path:
    """A copy of the chart whose Maintenance has one more field."""
    copy = Path(shutil.copytree(CHART, folder / "next"))
    file = copy / "files" / "crds" / "maintenances.yaml"
    definition = yaml.safe_load(file.read_text())
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    field = {"type": "string", "description": "How loud it is there."}
    schema["properties"]["spec"]["properties"][NEW_FIELD] = field
    file.write_text(yaml.safe_dump(definition))
    return copy


def explained(server: ApiServer) -> str:
    """What `kubectl explain` says of the new field; empty if there is none."""
    try:
        return server.kubectl("explain", f"maintenances.raddle.dev.spec.{NEW_FIELD}")
    except CommandError:
        return ""


def apply_maintenance(server: ApiServer, name: str, **spec: str) -> dict[str, Any]:
    """Make one and give it as the server has it."""
    item = {
        "apiVersion": "raddle.dev/v1alpha1",
        "kind": "Maintenance",
        "metadata": {"name": name},
        "spec": {"subject": "sn0/n03", **spec},
    }
    server.kubectl("apply", "--validate=strict", "-f", "-", stdin=json.dumps(item))
    found: dict[str, Any] = json.loads(server.kubectl("get", "mt", name, "-o", "json"))
    return found


def test_an_upgrade_upgrades_the_definitions_and_an_end_keeps_them(
    server: ApiServer, tmp_path: Path
) -> None:
    """What the next chart adds is there after it, and no resource is lost, even by `uninstall`."""
    run_helm(server, "install", RELEASE, str(CHART))
    names = [f"crd/{path.stem}.raddle.dev" for path in (CHART / "files" / "crds").glob("*.yaml")]
    server.kubectl("wait", "--for=condition=Established", *names)
    old = apply_maintenance(server, "old")
    assert not explained(server)
    with pytest.raises(CommandError, match=NEW_FIELD):
        apply_maintenance(server, "early", fanNoise="40 dB")
    run_helm(server, "upgrade", RELEASE, str(next_chart(tmp_path)))
    wait_until(lambda: "How loud it is there." in explained(server), "the new field is explained")
    assert apply_maintenance(server, "new", fanNoise="40 dB")["spec"][NEW_FIELD] == "40 dB"
    assert apply_maintenance(server, "old")["metadata"]["uid"] == old["metadata"]["uid"]
    run_helm(server, "uninstall", RELEASE)
    server.kubectl("wait", "--for=condition=Established", *names)
    kept = server.kubectl("get", "mt", "-o", "name").split()
    assert kept == ["maintenance.raddle.dev/new", "maintenance.raddle.dev/old"]
    left = server.kubectl("get", "deployments,daemonsets,statefulsets", "-A", "-o", "name")
    assert left == ""
    run_helm(server, "install", RELEASE, str(CHART))
    assert server.kubectl("get", "mt", "-o", "name").split() == kept
