"""A real Kubernetes cluster on one machine: `python -m tools.kubernetes.cluster up|down`.

One box (see `box.py`) holds etcd, the API server, the controller manager, the scheduler and
CoreDNS; each node is a box with containerd, a kubelet and kube-proxy. The boxes hang on a bridge
that lies in the control plane's box. A cluster is known by its folder below
`~/.cache/raddle/clusters`, which holds its configuration, certificates, logs and commands (`bin/`),
and goes with it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tools.build import cache_folder
from tools.kubernetes import servers
from tools.kubernetes.authority import Authority
from tools.kubernetes.box import Box, bound_to_us, wait_until
from tools.kubernetes.images import cluster_archives
from tools.kubernetes.machine import built, missing_for_cluster

CONTROL_PLANE = "control-plane"
BRIDGE_MAC = "02:00:00:00:00:01"
NODES_MAX = 9
VOLUMES_PER_NODE = 8
#: Users of the control plane: file, name, group.
CLIENTS = (
    ("admin", "admin", "system:masters"),
    ("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy", "system:kube-proxy", ""),
    ("dns", "coredns", "system:masters"),
)
_CLONE_NEWNET = 0x4000_0000


class CommandError(RuntimeError):
    """A command failed; the message holds what it said."""


def run_command(command: Sequence[str], stdin: str = "") -> str:
    """Run a command and return its output.

    Raises:
        CommandError: with what it said.
    """
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if result.returncode:
        said = result.stderr.strip() or result.stdout.strip()
        raise CommandError(f"{Path(command[0]).name} {' '.join(command[1:])}: {said}")
    return result.stdout


class Cluster:
    """A cluster by its name. `up` starts it, `down` ends it; both say on stderr what they do."""

    def __init__(self, name: str = "default", *, bound: bool = False) -> None:
        """With `bound`, all its processes are killed when the calling process ends."""
        self.name = name
        self.folder = cache_folder() / "clusters" / name
        self.pki = self.folder / "pki"
        self.tools = built("kubernetes")
        self._bound = bound
        self._boxes: dict[str, Box] = {}
        self._archives: Sequence[Path] = ()
        self._started = time.monotonic()

    def box(self, name: str) -> Box:
        if name not in self._boxes:
            self._boxes[name] = Box(self.folder / name, self.name, bound=self._bound)
        return self._boxes[name]

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes, lost ones too."""
        return sorted(path.parent.name for path in self.folder.glob("n*/cgroups"))

    # --- up and down

    def up(self, nodes: int, archives: Sequence[Path] = ()) -> None:
        """Start it with the images of these archives on each node, and wait until it is ready.

        Raises:
            CommandError: it is up already.
            OSError, RuntimeError, subprocess.SubprocessError: something did not start; what was
                started has been ended, and the logs are kept in the folder.
        """
        if (self.folder / CONTROL_PLANE / "pid").exists():
            raise CommandError(f"cluster {self.name} is up already; end it with `make kube-down`.")
        self._started = time.monotonic()
        self._archives = archives
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o700)
        try:
            self._up(range(1, nodes + 1))
        except BaseException:
            self._stop()
            self._say(f"not up; logs are in {self.folder}")
            raise

    def _up(self, numbers: range) -> None:
        self._write_certificates(numbers)
        self._start_control_plane()
        for number in numbers:
            self._start_box(number)
        with ThreadPoolExecutor() as pool:
            imported = pool.map(self._import_images, numbers)
            self._wait_for_api_server()
            self._start_controllers()
            list(imported)
        self._say(f"{len(self._archives)} image archives are on each node")
        for number in numbers:
            self._start_kubelet(number)
        self.apply(json.dumps(_volumes([f"n{number}" for number in numbers])))
        wait_until(lambda: self.ready_nodes() == self.nodes, "all nodes are ready")
        wait_until(self._has_service_account, "there is a default ServiceAccount")
        self._say(f"{len(numbers)} nodes are ready")

    def down(self) -> None:
        """End all its processes at once, and remove its cgroups and its folder."""
        self._started = time.monotonic()
        self._stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._say("down")

    def _stop(self) -> None:
        names = sorted(path.parent.name for path in self.folder.glob("*/cgroups"))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: self.box(name).stop(), names))

    # --- what people and tests do with it

    def kubectl(self, *arguments: str, stdin: str = "") -> str:
        """Run kubectl as administrator and return its output.

        Raises:
            CommandError: with what it said.
        """
        return self._run("kubectl", arguments, stdin)

    def follow(self, *arguments: str) -> subprocess.Popen[str]:
        """Start kubectl as administrator with its output as a pipe; the caller ends it."""
        command = bound_to_us([str(self.folder / "bin" / "kubectl"), *arguments])
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def helm(self, *arguments: str, stdin: str = "") -> str:
        """Run helm as administrator; otherwise like `kubectl`."""
        return self._run("helm", arguments, stdin)

    def run(self, *command: str, stdin: str = "") -> str:
        """Run any command of the machine in the cluster's network; otherwise like `kubectl`."""
        return self._run("in-cluster", command, stdin)

    def apply(self, text: str) -> str:
        """`kubectl apply` of a manifest, YAML or JSON."""
        return self.kubectl("apply", "-f", "-", stdin=text)

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, decoded."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def ready_nodes(self) -> list[str]:
        found = []
        for node in self.get("nodes")["items"]:
            conditions = {row["type"]: row["status"] for row in node["status"]["conditions"]}
            if conditions.get("Ready") == "True":
                found.append(node["metadata"]["name"])
        return sorted(found)

    def kill_node(self, name: str) -> None:
        """Lose a node: its kubelet and all its containers are killed at once."""
        self.box(name).stop()
        bridge = self.box(CONTROL_PLANE)
        wait_until(lambda: f"{_link(name)}@" not in bridge.run("ip", "link"), f"{name} is cut off")

    def start_node(self, name: str) -> None:
        """Bring a lost node back, as a machine with empty disks, and wait until it is ready."""
        number = int(name.removeprefix("n"))
        lease = ("lease", name, "--namespace", "kube-node-lease")
        lost_at = self.get(*lease)["spec"]["renewTime"]
        self._start_box(number)
        self._import_images(number)
        self._start_kubelet(number)
        wait_until(
            lambda: self.get(*lease)["spec"]["renewTime"] != lost_at and name in self.ready_nodes(),
            f"{name} is ready",
        )

    def container_pids(self, namespace: str, pod: str, container: str = "") -> list[int]:
        """Pids of a container's processes as the machine has them: what `kill -9` takes.

        Without a container's name, of the pod's first one.
        """
        found = self.get("pod", pod, "--namespace", namespace)
        status = next(
            row for row in found["status"]["containerStatuses"] if container in ("", row["name"])
        )
        identity = status["containerID"].removeprefix("containerd://")
        groups = self.box(found["spec"]["nodeName"]).groups
        pattern = f"kubepods/**/{identity}/cgroup.procs"
        procs = next(path for group in groups for path in group.glob(pattern))
        return sorted(int(pid) for pid in procs.read_text().split())

    def tag_image(self, reference: str, other: str) -> None:
        """Give an image that the nodes have another name besides."""
        tag = ["ctr", "--namespace", "k8s.io", "images", "tag", "--force", reference, other]
        for node in self.nodes:
            self.box(node).run(*tag)

    def connect(self, host: str, port: int, timeout_s: float = 10.0) -> socket.socket:
        """A TCP connection from the cluster's network: to a pod's, Service's or node's address.

        Raises:
            OSError: nobody answers there.
        """
        made: list[socket.socket | OSError] = []

        def enter_and_connect() -> None:
            # The thread ends in the other network namespace; its socket stays in there for ever.
            try:
                _enter_network(self.box(CONTROL_PLANE).pid)
                made.append(socket.create_connection((host, port), timeout_s))
            except OSError as error:
                made.append(error)

        thread = threading.Thread(target=enter_and_connect)
        thread.start()
        thread.join()
        (result,) = made
        if isinstance(result, OSError):
            raise result
        result.settimeout(None)
        return result

    # --- parts of `up`

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", file=sys.stderr)

    def _run(self, program: str, arguments: Sequence[str], stdin: str) -> str:
        return run_command([str(self.folder / "bin" / program), *arguments], stdin)

    def _write_certificates(self, numbers: range) -> None:
        authority = Authority(self.pki)
        authority.key_pair("service-accounts")
        authority.issue("apiserver", "kube-apiserver", names=servers.API_SERVER_NAMES)
        for file, user, group in CLIENTS:
            authority.issue(file, user, group)
        for number in numbers:
            name, address = f"n{number}", servers.node_address(number)
            authority.issue(name, f"system:node:{name}", "system:nodes", (name, address))
        server = f"https://{servers.CONTROL_PLANE_ADDRESS}:6443"
        for file in [file for file, _, _ in CLIENTS] + [f"n{number}" for number in numbers]:
            authority.kubeconfig(file, server)

    def _start_control_plane(self) -> None:
        box = self.box(CONTROL_PLANE)
        box.start(servers.CONTROL_PLANE_ADDRESS)
        # Without one of its own a bridge has the lowest address of its ports, another one each time
        # that such a port goes; all nodes would look for this one at the old one for ten seconds.
        box.run("ip", "link", "add", "nodes", "address", BRIDGE_MAC, "type", "bridge")
        box.run("ip", "address", "add", f"{servers.CONTROL_PLANE_ADDRESS}/24", "dev", "nodes")
        box.run("ip", "link", "set", "nodes", "up")
        # Any route will do: kube-proxy rewrites the address, but a packet without a route never
        # gets that far.
        box.run("ip", "route", "add", servers.SERVICES, "dev", "nodes")
        self._write_commands(box.pid)
        box.spawn("etcd", *servers.etcd(built("etcd") / "etcd", box.folder / "etcd"))
        box.spawn("apiserver", *servers.api_server_for_nodes(self.tools, self.pki))
        self._say("control plane started")

    def _write_commands(self, pid: int) -> None:
        """Commands that act inside the cluster's network and keep nothing in the user's home."""
        folder, cache = self.folder / "bin", self.folder / "cache"
        folder.mkdir()
        variables = {"KUBECONFIG": self.pki / "admin.kubeconfig", "KUBECACHEDIR": cache}
        variables |= {f"HELM_{part}_HOME": cache for part in ("CACHE", "CONFIG", "DATA")}
        exports = "".join(f'export {name}="{value}"\n' for name, value in variables.items())
        enter = f"exec nsenter --net=/proc/{pid}/ns/net"
        for name, program in (
            ("kubectl", f'"{self.tools}/kubectl"'),
            ("helm", f'"{self.tools}/helm"'),
            ("in-cluster", ""),
        ):
            path = folder / name
            path.write_text(f'#!/bin/sh\n{exports}{enter} {program} "$@"\n')
            path.chmod(0o755)

    def _start_box(self, number: int) -> None:
        """A node's box, its link to the bridge, routes to the other nodes' pods, containerd."""
        name, address = f"n{number}", servers.node_address(number)
        box, bridge = self.box(name), self.box(CONTROL_PLANE)
        box.start(servers.CONTROL_PLANE_ADDRESS)
        link = _link(name)
        veth = ["type", "veth", "peer", "name", "eth0", "netns", str(box.pid)]
        # Entered by network namespace alone: the pid of the other end is the machine's.
        self.run("ip", "link", "add", link, *veth)
        bridge.run("ip", "link", "set", link, "master", "nodes", "up")
        bridge.run("ip", "route", "replace", servers.node_pods(number), "via", address)
        box.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        box.run("ip", "link", "set", "eth0", "up")
        box.run("ip", "route", "add", "default", "via", servers.CONTROL_PLANE_ADDRESS)
        for other in range(1, NODES_MAX + 1):
            if other != number:
                route = [servers.node_pods(other), "via", servers.node_address(other)]
                box.run("ip", "route", "add", *route)
        cni = box.folder / "cni"
        cni.mkdir(exist_ok=True)
        (cni / "pods.conflist").write_text(servers.cni_config(number))
        config = box.folder / "containerd.toml"
        config.write_text(servers.containerd_config(cni))
        box.run("mkdir", "-p", *(f"/var/lib/volumes/{i}" for i in range(VOLUMES_PER_NODE)))
        box.spawn("containerd", "containerd", "--config", str(config))

    def _import_images(self, number: int) -> None:
        box = self.box(f"n{number}")
        control = ["ctr", "--namespace", "k8s.io"]

        def answers() -> bool:
            try:
                box.run(*control, "version")
            except subprocess.CalledProcessError:
                return False
            return True

        wait_until(answers, f"containerd of n{number} answers")
        for archive in self._archives:
            try:
                box.run(*control, "images", "import", str(archive))
            except subprocess.CalledProcessError as error:
                raise CommandError(f"import of {archive}: {error.stderr.strip()}") from error

    def _wait_for_api_server(self) -> None:
        def ready() -> bool:
            try:
                return self.kubectl("get", "--raw", "/readyz") == "ok"
            except CommandError:
                return False

        wait_until(ready, "the API server is ready", 120.0)
        self._say("API server ready")

    def _start_controllers(self) -> None:
        box = self.box(CONTROL_PLANE)
        box.spawn("controller-manager", *servers.controller_manager(self.tools, self.pki))
        box.spawn("scheduler", *servers.scheduler(self.tools, self.pki))
        corefile = box.folder / "Corefile"
        corefile.write_text(servers.corefile(self.pki))
        box.spawn("coredns", str(self.tools / "coredns"), "-conf", str(corefile))
        # Addresses of Services answer here too: for people, tests and webhooks.
        self._start_proxy(box, servers.CONTROL_PLANE_ADDRESS)

    def _start_kubelet(self, number: int) -> None:
        box, address = self.box(f"n{number}"), servers.node_address(number)
        config = box.folder / "kubelet.json"
        config.write_text(servers.kubelet_config(self.pki, box.name))
        box.spawn("kubelet", *servers.kubelet(self.tools, self.pki, config, box.name, address))
        self._start_proxy(box, address)

    def _start_proxy(self, box: Box, address: str) -> None:
        config = box.folder / "proxy.json"
        config.write_text(servers.proxy_config(self.pki, box.name, address))
        box.spawn("proxy", str(self.tools / "kube-proxy"), f"--config={config}")

    def _has_service_account(self) -> bool:
        return bool(self.get("serviceaccounts", "--field-selector=metadata.name=default")["items"])


def _link(node: str) -> str:
    """The control plane's end of a node's link."""
    return f"to-{node}"


def _enter_network(pid: int) -> None:
    """Move the calling thread, and no other, into the network namespace of a process."""
    with Path(f"/proc/{pid}/ns/net").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _volumes(nodes: list[str]) -> dict[str, Any]:
    """The default StorageClass, and volumes on each node's disk: nobody makes them on demand."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "local",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }
    volumes = [_volume(node, number) for node in nodes for number in range(VOLUMES_PER_NODE)]
    return {"apiVersion": "v1", "kind": "List", "items": [storage_class, *volumes]}


def _volume(node: str, number: int) -> dict[str, Any]:
    host = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{node}-{number}"},
        "spec": {
            "capacity": {"storage": "10Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "local",
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": f"/var/lib/volumes/{number}"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [host]}]}},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("--nodes", type=int, default=1, choices=range(1, NODES_MAX + 1))
    parser.add_argument("--name", default="default")
    options = parser.parse_args()
    lacks = missing_for_cluster()
    if lacks:
        sys.exit("No cluster on this machine:\n" + "\n".join(f"- {line}" for line in lacks))
    cluster = Cluster(options.name)
    if options.action == "down":
        cluster.down()
        return
    cluster.up(options.nodes, cluster_archives())
    print(cluster.kubectl("get", "nodes", "--output=wide"), file=sys.stderr)
    print(f"export PATH={cluster.folder}/bin:$PATH   # kubectl, helm, in-cluster COMMAND")


if __name__ == "__main__":
    main()
