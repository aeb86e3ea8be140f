"""What a machine must have for images and for a cluster, and what of it is missing here.

Each answer is a list of sentences that say what to do; it is empty if nothing is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tools.build import SERVERS, cache_folder, pins_digest, servers_folder

#: A program, or a file, of each Debian package.
IMAGE_PACKAGES = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "debian-archive-keyring": "/usr/share/keyrings/debian-archive-keyring.gpg",
}
CLUSTER_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "ip",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "prometheus": "promtool",
}
#: By the name that `tools/build.py` knows, the make target that builds them.
TARGETS = {"etcd": "tools", "kubernetes": "kube-tools"}
#: Folders that a box has for itself.
HIDDEN = ("/run", "/tmp", "/var/lib", "/var/log")  # noqa: S108 - named, never written to


def built(name: str) -> Path:
    """The folder of the servers that `tools/build.py` builds from this checkout's pins."""
    return servers_folder(SERVERS[name]) / pins_digest(SERVERS[name].module)


def missing_servers(*names: str) -> list[str]:
    return [
        f"The servers of {name} are not built: run `make {TARGETS[name]}`."
        for name in names
        if not built(name).exists()
    ]


def missing_for_images() -> list[str]:
    if os.geteuid() != 0:
        return ["Building images needs root: the base image is made in a changed root."]
    return _missing_packages(IMAGE_PACKAGES) + missing_servers("etcd")


def missing_for_cluster() -> list[str]:
    if os.geteuid() != 0:
        return ["A cluster needs root: namespaces, mounts and cgroups are made."]
    found = _missing_packages(IMAGE_PACKAGES | CLUSTER_PACKAGES)
    if not _may_make_namespaces():
        found.append("This root may not make namespaces (CAP_SYS_ADMIN, or seccomp, forbids it).")
    folder = cache_folder()
    if any(folder.is_relative_to(hidden) for hidden in HIDDEN):
        found.append(f"{folder} is hidden from nodes: set XDG_CACHE_HOME to another folder.")
    return found + missing_servers("etcd", "kubernetes")


def _missing_packages(packages: dict[str, str]) -> list[str]:
    names = [
        name
        for name, program in packages.items()
        if not shutil.which(program) and not Path(program).is_file()
    ]
    if not names:
        return []
    if not shutil.which("apt-get"):
        return [f"It needs Debian or Ubuntu, for their packages {', '.join(names)}."]
    return [f"Debian packages are missing ({', '.join(names)}): run `make kube-packages`."]


def _may_make_namespaces() -> bool:
    command = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--cgroup", "--fork"]
    try:
        result = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return result.returncode == 0
