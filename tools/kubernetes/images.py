"""Build the images of the Dockerfile with buildah, without an image registry.

`python -m tools.kubernetes.images FOLDER [--tag TAG]` writes one archive with all images and a list
of them, for sites without a registry. The base image that the Dockerfile asks for is made from
Debian's packages (`base-image.sh`) and kept below `~/.cache/raddle/images`, with buildah's layers.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.build import cache_folder
from tools.kubernetes import servers
from tools.kubernetes.machine import built, missing_for_images

ROOT = Path(__file__).resolve().parents[2]
BASE_SCRIPT = Path(__file__).resolve().parent / "base-image.sh"
#: Image by target of the Dockerfile.
TARGETS = {"raddle": "raddle", "agent": "raddle-agent", "etcd": "raddle-etcd"}
#: So many images, layers among them, and so many archives for clusters stay in the cache.
CACHED_IMAGES_MAX = 100
CACHED_ARCHIVES_MAX = 3
#: What the machine's own programs use to reach a package index is lent to a build, never copied.
LENT_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")


@dataclass(frozen=True)
class Image:
    """A built image: its reference and buildah's id of it."""

    reference: str
    identity: str


class Builder:
    """buildah with a storage of its own, in which builds need no container runtime."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\n'
        (folder / "storage.conf").write_text(f'{storage}runroot = "{folder}/storage-run"\n')
        network = f'[network]\nnetwork_config_dir = "{folder}/net"\n'
        (folder / "containers.conf").write_text(network)
        self._environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }

    def run(self, *arguments: str) -> str:
        """Run buildah; what it says goes to stderr.

        Raises:
            subprocess.CalledProcessError: it failed, after saying why on stderr.
        """
        command = ["buildah", *arguments]
        result = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=self._environment
        )
        return result.stdout.strip()

    def has(self, reference: str) -> bool:
        return bool(self.run("images", "--quiet", "--filter", f"reference={reference}"))

    def from_files(self, reference: str, source: Path, target: str, *config: str) -> Image:
        """An image without a Dockerfile: some files on nothing. The same files give the same id."""
        container = self.run("from", "scratch")
        try:
            self.run("add", "--quiet", container, str(source), target)
            self.run("config", *config, container)
            commit = ("commit", "--quiet", "--timestamp", "0")
            return Image(reference, self.run(*commit, container, reference))
        finally:
            self.run("rm", container)

    def prune(self) -> None:
        """Forget the layers of old builds once there are many."""
        if len(self.run("images", "--all", "--quiet").splitlines()) > CACHED_IMAGES_MAX:
            self.run("rmi", "--prune")


@contextmanager
def only_builder() -> Iterator[Builder]:
    """The cache's builder: for the time of a block nobody else works there.

    Nothing of interrupted builds is left: their containers would keep old images for ever.
    """
    builder = Builder(cache_folder() / "images")
    with (builder.folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder.run("rm", "--all")
        yield builder


def base_image(builder: Builder) -> None:
    """Have the base image in the storage, from the archive that its inputs name."""
    key = hashlib.sha256(BASE_SCRIPT.read_bytes() + platform.machine().encode()).hexdigest()[:16]
    pinned = f"localhost/raddle-base:{key}"
    archive = builder.folder / f"base-{key}.tar"
    if not archive.exists():
        started = time.monotonic()
        say("making the base image from Debian's packages (about a minute)")
        with tempfile.TemporaryDirectory(dir=builder.folder) as temporary:
            root = Path(temporary) / "root"
            subprocess.run(["bash", str(BASE_SCRIPT), str(root)], check=True, stdout=sys.stderr)
            builder.from_files(pinned, root, "/", "--cmd", "python3", "--env", "LANG=C.UTF-8")
            partial = Path(temporary) / "base.tar"
            builder.run("push", "--quiet", pinned, f"oci-archive:{partial}:{pinned}")
            partial.replace(archive)
        say(f"base image: {time.monotonic() - started:.0f} s")
    if not builder.has(pinned):
        builder.run("pull", "--quiet", f"oci-archive:{archive}")
    builder.run("tag", pinned, f"localhost/{base_name()}")


def base_name() -> str:
    """The image that the Dockerfile builds on, unless a build argument names another one."""
    (line,) = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return str(line)


def build_images(builder: Builder, tag: str) -> list[Image]:
    """All targets of the Dockerfile, from this checkout. What did not change is not built anew."""
    base_image(builder)
    lent = [f"--volume={file}:{file}:ro" for file in LENT_FILES if Path(file).exists()]
    options = ["--quiet", "--layers", "--pull=never", f"--build-context=servers={built('etcd')}"]

    def build(target: str) -> Image:
        started = time.monotonic()
        reference = f"localhost/{TARGETS[target]}:{tag}"
        named = [f"--target={target}", f"--tag={reference}", str(ROOT)]
        identity = builder.run("build", *options, *lent, *named).splitlines()[-1]
        say(f"{reference}: {time.monotonic() - started:.1f} s")
        return Image(reference, identity)

    # pip works on one core alone.
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(build, TARGETS))
    builder.prune()
    return images


def write_archive(builder: Builder, images: Sequence[Image], archive: Path) -> list[str]:
    """One OCI archive; a layer that images share is in it once.

    Returns:
        A line for each image: reference, digest and what a node fetches of it.
    """
    with tempfile.TemporaryDirectory(dir=builder.folder) as temporary:
        layout, partial = Path(temporary) / "layout", Path(temporary) / "archive.tar"
        for image in images:
            place = f"oci:{layout}:{image.reference}"
            builder.run("push", "--quiet", image.identity, place)
        lines = list(_contents(layout))
        with tarfile.open(partial, "w") as tar:
            tar.add(layout, arcname=".")
        shutil.move(partial, archive)
    return lines


def _contents(layout: Path) -> Iterator[str]:
    for entry in json.loads((layout / "index.json").read_text())["manifests"]:
        manifest = json.loads((layout / "blobs" / entry["digest"].replace(":", "/")).read_text())
        megabytes = sum(layer["size"] for layer in manifest["layers"]) / 1e6
        name = entry["annotations"]["org.opencontainers.image.ref.name"]
        yield f"{name} {entry['digest']} {megabytes:.0f} MB"


def cluster_archives() -> list[Path]:
    """The archive that nodes of a cluster import: this checkout's images, and the pause image."""
    with only_builder() as builder:
        images = build_images(builder, version())
        pause = built("kubernetes") / "pause"
        entry = ("--entrypoint", '["/pause"]')
        images.append(builder.from_files(servers.PAUSE_IMAGE, pause, "/pause", *entry))
        named = " ".join(f"{image.reference}@{image.identity}" for image in images)
        key = hashlib.sha256(named.encode()).hexdigest()[:16]
        archive = builder.folder / f"cluster-{key}.tar"
        if not archive.exists():
            write_archive(builder, images, archive)
        archive.touch()
        old = sorted(builder.folder.glob("cluster-*.tar"), key=lambda path: path.stat().st_mtime)
        for path in old[:-CACHED_ARCHIVES_MAX]:
            path.unlink(missing_ok=True)
    return [archive]


def version() -> str:
    """This checkout's version, which is also the tag that the chart asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", default=version())
    options = parser.parse_args()
    lacks = missing_for_images()
    if lacks:
        sys.exit("No images on this machine:\n" + "\n".join(f"- {line}" for line in lacks))
    options.folder.mkdir(parents=True, exist_ok=True)
    stem = f"raddle-images-{options.tag}-{platform.machine()}"
    archive, listing = options.folder / f"{stem}.tar", options.folder / f"{stem}.txt"
    with only_builder() as builder:
        images = build_images(builder, options.tag)
        lines = write_archive(builder, images, archive)
    listing.write_text("".join(f"{line}\n" for line in lines))
    print("\n".join(lines))
    print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
