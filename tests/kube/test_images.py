"""The images: what is in them, and under which rules they run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster
from tools.kubernetes.images import TARGETS, version

from tests.support import ROOT

RESTRICTED = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def output(cluster: Cluster, namespace: str, image: str, *command: str) -> tuple[str, str]:
    """How a container of this image with this command ended (`Succeeded`, `Failed`), and its log.

    The image's own user must be a number that is not 0, or the kubelet refuses it.
    """
    container: dict[str, Any] = {"name": "only", "image": f"localhost/{image}:{version()}"}
    container |= {"command": list(command), "securityContext": RESTRICTED}
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": image},
        "spec": {"restartPolicy": "Never", "containers": [container]},
    }
    where = ("--namespace", namespace)
    cluster.kubectl("apply", *where, "-f", "-", stdin=json.dumps(manifest))

    def phase() -> str:
        return str(cluster.get("pod", image, *where)["status"]["phase"])

    wait_until(lambda: phase() in ("Succeeded", "Failed"), f"{image} has ended")
    ended = phase()
    log = cluster.kubectl("logs", *where, image)
    cluster.kubectl("delete", "pod", image, *where)
    return ended, log


@pytest.mark.parametrize(
    ("image", "command"),
    [
        ("raddle", ("raddle", "--version")),
        ("raddle", ("raddle-scheduler", "--help")),
        ("raddle", ("python3", "-c", "import kopf, kubernetes, raddle.agent.main")),
        ("raddle-agent", ("raddle-agent", "--help")),
        ("raddle-etcd", ("etcd", "--version")),
        ("raddle-etcd", ("etcdctl", "version")),
    ],
)
def test_programs_run_under_the_strictest_rules(
    cluster: Cluster, namespace: str, image: str, command: tuple[str, ...]
) -> None:
    """Without root, capabilities and a writable disk, as restricted namespaces demand."""
    ended, log = output(cluster, namespace, image, *command)
    assert ended == "Succeeded", log


def test_the_agents_image_is_small(cluster: Cluster, namespace: str) -> None:
    """It has what an agent needs, and neither the operator's libraries nor a package manager."""
    program = "import importlib.util as u; print([n for n in {!r} if u.find_spec(n)])"
    names = ["kopf", "kubernetes", "pip", "raddle", "grpc", "zmq"]
    _, log = output(cluster, namespace, "raddle-agent", "python3", "-c", program.format(names))
    assert log == "['raddle', 'grpc', 'zmq']\n"


def test_one_archive_holds_all_images_for_sites_without_a_registry(cluster: Cluster) -> None:
    """The list has each image's name, digest and size; a node that imports it has these."""
    # Nodes see the cluster's folder, and not this machine's /tmp.
    folder, tag = cluster.folder / "archive", "for-a-site"
    said = subprocess.run(
        [sys.executable, "-m", "tools.kubernetes.images", str(folder), "--tag", tag],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (archive,), (listing,) = folder.glob("*.tar"), folder.glob("*.txt")
    assert said == f"{listing.read_text()}{archive}: {archive.stat().st_size / 1e6:.0f} MB\n"
    line = re.compile(r"^(\S+) (sha256:[0-9a-f]{64}) [1-9]\d* MB$", re.MULTILINE)
    found = set(line.findall(listing.read_text()))
    names = {f"localhost/{name}:{tag}" for name in TARGETS.values()}
    assert {name for name, _ in found} == names
    assert _imported(cluster, archive) >= found


def _imported(cluster: Cluster, archive: Path) -> set[tuple[str, str]]:
    """Name and digest of the images that a node has after an import of its own."""
    node = cluster.box("n1")
    images = ("ctr", "--namespace", "site", "images")
    node.run(*images, "import", str(archive))
    rows = [line.split() for line in node.run(*images, "ls").splitlines()[1:]]
    node.run(*images, "rm", *(row[0] for row in rows))
    return {(row[0], row[2]) for row in rows}
