"""The cluster itself: it runs pods, loses and regains nodes, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tools.build import cache_folder
from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster, CommandError
from tools.kubernetes.images import version

from tests.support import eventually

IMAGE = f"localhost/raddle:{version()}"
#: What containerd, kubelet and kube-proxy would make or change on a machine that is theirs.
FOLDERS = ("/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/etc/cni", "/opt/containerd")
SETTINGS = ("vm", "net/ipv4", "net/netfilter", "net/bridge", "kernel/keys", "kernel/panic")


def pod(name: str, node: str = "", limits: Mapping[str, int] | None = None) -> str:
    """A web server that shows its own files, under the rules of restricted namespaces."""
    container: dict[str, Any] = {
        "name": "web",
        "image": IMAGE,
        "command": ["python3", "-m", "http.server", "8000"],
        "workingDir": "/opt/raddle",
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if limits:
        container["resources"] = {"limits": limits}
    labels = {"app": name}
    spec: dict[str, Any] = {"containers": [container], "terminationGracePeriodSeconds": 0}
    if node:
        spec["nodeName"] = node
    server = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [server, service]})


def wait_for_pod(cluster: Cluster, namespace: str, name: str) -> None:
    wait = ("wait", "--for=condition=Ready", "--timeout=60s", f"pod/{name}")
    cluster.kubectl(*wait, "--namespace", namespace)


def fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def machine_state(cluster: Cluster) -> dict[str, object]:
    """Everything of the machine in which a cluster could leave a trace."""
    return {
        "processes": sorted(_processes_of(cluster)),
        "mounts": sorted(_mounts()),
        "cgroups": sorted(_cgroups_of(cluster)),
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "routes": Path("/proc/net/route").read_text(),
        "firewall": [_firewall("iptables-save"), _firewall("iptables-legacy-save")],
        "settings": dict(_settings()),
        "folders": [name for name in FOLDERS if Path(name).exists()],
        "files": cluster.folder.exists(),
    }


def _processes_of(cluster: Cluster) -> Iterator[str]:
    """Processes in a group of the cluster's, or started with a file of its."""
    group = re.compile(rf"/raddle-{re.escape(cluster.name)}-")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            groups = (process / "cgroup").read_text()
        except OSError:
            continue  # it has just ended
        if group.search(groups) or f"{cluster.folder}/" in command:
            yield f"{process.name} {command}"


def _mounts() -> Iterator[str]:
    """Mount points of this machine, without those of buildah, which another checkout may use."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4]
        if not Path(place).is_relative_to(cache_folder() / "images"):
            yield place


def _cgroups_of(cluster: Cluster) -> Iterator[str]:
    for folder, _, _ in os.walk("/sys/fs/cgroup"):
        if f"raddle-{cluster.name}-" in folder or "kubepods" in folder.split("raddle-", 1)[0]:
            yield folder


def _firewall(program: str) -> str:
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    rules = re.sub(r"\[\d+:\d+\]", "", result.stdout)
    return "\n".join(line for line in rules.splitlines() if not line.startswith("#"))


def _settings() -> Iterator[tuple[str, str]]:
    for folder in SETTINGS:
        for path in sorted(Path("/proc/sys").glob(f"{folder}*/**/*")):
            if path.is_file() and path.name != "nf_conntrack_count":
                try:
                    yield str(path), path.read_text()
                except OSError:
                    continue  # some may only be written


def test_a_cluster_leaves_nothing_behind(archives: list[Path]) -> None:
    """Up, a pod Ready, down: processes, mounts, cgroups, network and settings are as before."""
    other = Cluster(f"trace-{os.getpid()}", bound=True)
    before = machine_state(other)
    try:
        other.up(1, archives)
        other.apply(pod("web"))
        wait_for_pod(other, "default", "web")
        during = machine_state(other)
    finally:
        other.down()
    assert during["processes"] != before["processes"]
    assert during["cgroups"] != before["cgroups"]
    assert machine_state(other) == before


def test_two_clusters_stand_side_by_side(cluster: Cluster, archives: list[Path]) -> None:
    """Another cluster with the same addresses comes and goes; the first does not notice."""
    other = Cluster(f"beside-{os.getpid()}", bound=True)
    try:
        other.up(1, archives)
        other.kubectl("create", "namespace", "only-here")
        assert other.ready_nodes() == ["n1"]
        with pytest.raises(CommandError, match="not found"):
            cluster.kubectl("get", "namespace", "only-here")
    finally:
        other.down()
    assert cluster.ready_nodes() == ["n1", "n2", "n3"]


async def test_a_service_is_reached_from_the_machine(
    cluster: Cluster, namespace: str, forward: Callable[[str], Awaitable[str]]
) -> None:
    """Through a port on loopback, a request reaches a pod on any node by its Service's address."""
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=pod("web", "n3"))
    wait_for_pod(cluster, namespace, "web")
    service = cluster.get("service", "web", "--namespace", namespace)["spec"]["clusterIP"]
    local = await forward(f"{service}:80")

    async def answers() -> bool:
        # A Service refuses until the nodes' proxies have heard of its pod.
        try:
            return "pyvenv.cfg" in await asyncio.to_thread(fetch, local)
        except OSError:
            return False

    await eventually(answers, "the Service leads to its pod")


def test_names_are_resolved_in_pods(cluster: Cluster, namespace: str) -> None:
    """A pod reaches a Service by its name."""
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=pod("web", "n1"))
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=pod("asks", "n2"))
    for name in ("web", "asks"):
        wait_for_pod(cluster, namespace, name)
    program = "import urllib.request as u; print(u.urlopen('http://web/', timeout=20).status)"
    ask = ("exec", "--namespace", namespace, "asks", "--", "python3", "-c", program)

    def answers() -> bool:
        # A Service refuses until the nodes' proxies have heard of its pod.
        try:
            return cluster.kubectl(*ask) == "200\n"
        except CommandError as error:
            if "exit code 1" not in str(error):
                raise
            return False

    wait_until(answers, "a name leads to a Service")


def test_a_process_of_a_container_is_killed(cluster: Cluster, namespace: str) -> None:
    """The pids of a container are the machine's: SIGKILL ends it and the kubelet starts another."""
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=pod("web"))
    wait_for_pod(cluster, namespace, "web")
    (pid,) = cluster.container_pids(namespace, "web")
    assert b"http.server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    os.kill(pid, signal.SIGKILL)

    def restarted() -> bool:
        found = cluster.get("pod", "web", "--namespace", namespace)
        (status,) = found["status"]["containerStatuses"]
        return bool(status["restartCount"] == 1 and status["ready"])

    wait_until(restarted, "the container runs again")


def test_a_node_is_lost_and_comes_back(cluster: Cluster, namespace: str) -> None:
    """All processes of a killed node end at once; started again, it runs pods as before."""
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=pod("web", "n2"))
    wait_for_pod(cluster, namespace, "web")
    (pid,) = cluster.container_pids(namespace, "web")
    cluster.kill_node("n2")
    assert not Path(f"/proc/{pid}").exists()
    cluster.start_node("n2")
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=pod("again", "n2"))
    wait_for_pod(cluster, namespace, "again")


def test_volumes_are_claimed(cluster: Cluster, namespace: str) -> None:
    """A claim without a class gets a volume of the node on which its pod lands."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "8Gi"}},
        },
    }
    manifest = json.loads(pod("web"))
    spec = manifest["items"][0]["spec"]
    spec["volumes"] = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    spec["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    manifest["items"].append(claim)
    text = json.dumps(manifest)
    cluster.kubectl("apply", "--namespace", namespace, "-f", "-", stdin=text)
    wait_for_pod(cluster, namespace, "web")
    found = cluster.get("persistentvolumeclaim", "data", "--namespace", namespace)
    assert found["status"]["phase"] == "Bound"
