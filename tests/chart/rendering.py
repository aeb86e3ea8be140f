"""The chart through `helm template`, as parsed documents."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tools.kubernetes.machine import built

from tests.kubernetes import demand
from tests.support import ROOT

CHART = ROOT / "charts" / "raddle"
RELEASE = "raddle"
NAMESPACE = "space"
#: Kinds that say who may do what.
RIGHTS = ("ServiceAccount", "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
#: APIs of other projects that some parts of the chart wait for.
PROMETHEUS = (
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
)
#: Values of the matrix: what people set, by what it is for.
MATRIX: dict[str, dict[str, Any]] = {
    "default": {},
    "external etcd with TLS": {
        "etcd": {
            "enabled": False,
            "external": {
                "endpoints": ["etcd-0.example:2379", "10.0.0.8:2379"],
                "tlsSecret": "our-etcd",
            },
        }
    },
    "external etcd without TLS": {
        "etcd": {
            "enabled": False,
            "external": {"endpoints": ["10.0.0.8:2379"], "insecure": True},
        }
    },
    "no operator": {
        "operator": {"enabled": False},
        "agent": {"nodes": {"worker-1": ["sn0/n00", "sn0/n01"], "worker-2": ["sn0/n02"]}},
    },
    "two agent pools": {
        "agent": {
            "tolerations": [{"key": "npu", "operator": "Exists"}],
            "pools": [
                {"name": "a", "nodeSelector": {"pool": "a"}, "settings": {"drivers_extra": "x"}},
                {
                    "name": "b",
                    "resources": {"requests": {"cpu": "2"}},
                    "tolerations": [{"key": "other", "operator": "Exists"}],
                },
            ],
        }
    },
    "cert-manager": {"certificates": {"certManager": {"enabled": True}}},
    "cert-manager with an issuer": {
        "certificates": {
            "certManager": {
                "enabled": True,
                "issuerRef": {"name": "ours", "kind": "ClusterIssuer", "group": "cert-manager.io"},
            }
        }
    },
    "digests": {
        "image": {"digest": "sha256:" + "a" * 64},
        "agent": {"image": {"digest": "sha256:" + "b" * 64}},
        "etcd": {"image": {"digest": "sha256:" + "c" * 64}},
    },
    "registry and pull secrets": {
        "global": {"imageRegistry": "registry.example:5000/team", "imagePullSecrets": ["pull"]},
        "image": {"tag": "1.2.3"},
    },
    "ranks in agents": {"ranks": {"inAgent": True}},
    "real machine": {
        "machine": {"simulated": False},
        "devices": {"resourceName": "huawei.com/Ascend910"},
        "agent": {"drivers": ["reference"]},
    },
    "real machine whose kubelets are asked": {
        "machine": {"simulated": False},
        "devices": {"resourceName": "huawei.com/Ascend910", "podResources": True},
    },
    "another name of the machine": {"machine": {"name": "nvl72", "supernode": "ours"}},
    "machine of their own": {
        "machine": {"description": {"machine": "own", "nodes": 4, "npusPerNode": 2}}
    },
    "policy, all namespaces, no claim": {
        "scheduler": {"policy": {"rules": [{"identities": ["client/*"], "verbs": ["read"]}]}},
        "operator": {"namespaces": ["*"]},
        "etcd": {"persistence": {"enabled": False}},
    },
    "two namespaces, one replica": {
        "scheduler": {"replicas": 1},
        "operator": {"namespaces": ["team-a", NAMESPACE], "replicas": 1},
        "networkPolicy": {"enabled": False},
        "crds": {"enabled": False},
        "rbac": {"aggregate": False},
    },
    "monitoring": {"monitoring": {"dashboard": True, "labels": {"release": "prometheus"}}},
}


@cache
def helm() -> str:
    """The one that `make kube-tools` builds, else the machine's."""
    ours = built("kubernetes") / "helm"
    found = str(ours) if ours.exists() else shutil.which("helm") or ""
    demand([] if found else ["helm is neither built (`make kube-tools`) nor on PATH."])
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False)


def refusal(values: dict[str, Any], folder: Path) -> str:
    """What helm says to values that it must refuse."""
    file = folder / "values.yaml"
    file.write_text(json.dumps(values))
    result = run("template", RELEASE, str(CHART), "--namespace", NAMESPACE, "-f", str(file))
    assert result.returncode != 0, "these values were taken"
    return result.stderr


@cache
def _text(values: str, apis: tuple[str, ...], namespace: str) -> str:
    arguments = ["template", RELEASE, str(CHART), "--namespace", namespace]
    for api in apis:
        arguments += ["--api-versions", api]
    result = subprocess.run(
        [helm(), *arguments, "-f", "-"], input=values, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def render(
    values: dict[str, Any], apis: tuple[str, ...] = (), namespace: str = NAMESPACE
) -> list[dict[str, Any]]:
    """All objects of a release with these values, hooks too."""
    documents = yaml.safe_load_all(_text(json.dumps(values), apis, namespace))
    return [document for document in documents if document]


def rights(values: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
    """The accounts of a release in this namespace and what they may do, ready to be applied."""
    found = [d for d in render(values, namespace=namespace) if d["kind"] in RIGHTS]
    for document in found:
        if not document["kind"].startswith("Cluster"):
            document["metadata"].setdefault("namespace", namespace)
    return found


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The one object of this kind and name."""
    found = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind}/{name}"
    return found[0]


def names(documents: list[dict[str, Any]], kind: str) -> list[str]:
    return [d["metadata"]["name"] for d in documents if d["kind"] == kind]


def pods(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(owner's kind/name, spec) of every pod that the objects make."""
    for document in documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] == "Pod":
            yield name, document["spec"]
        elif document["kind"] == "CronJob":
            yield name, document["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        elif document["kind"] in ("Deployment", "DaemonSet", "StatefulSet", "Job"):
            yield name, document["spec"]["template"]["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def environment(document: dict[str, Any]) -> dict[str, Any]:
    """Variables of the one container of a workload."""
    (container,) = document["spec"]["template"]["spec"]["containers"]
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
