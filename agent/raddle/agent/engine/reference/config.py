"""What a rank is told by its agent, in a file; and the file by which it says where it listens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from raddle.model.kinds import RoleKind
from raddle.telemetry.tls import TlsFiles, tls_files

ADDRESS_FILE = "rank.json"
CONFIG_FILE = "config.json"
# Peers of a rank that hangs wait so long in a step; some hundred times what a step takes here.
STEP_DEADLINE_S = 1.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long a step takes at least, as it does on a device, and how long it waits for a peer."""

    min_s: float = 0.0
    deadline_s: float = STEP_DEADLINE_S


@dataclass(frozen=True, slots=True)
class RankConfig:
    """Everything that one rank process needs to begin."""

    job_uid: str
    epoch: int
    role: str
    kind: RoleKind
    instance: int
    rank: int
    incarnation: str
    node: str
    die: str
    model_config: str
    checkpoint: str
    kv_block_tokens: int
    dram_bytes: int = 0
    max_sequences: int = 0
    step_deadline_s: float = STEP_DEADLINE_S
    step_min_s: float = 0.0
    #: Where the rank listens and is reached.
    host: str = "127.0.0.1"
    # PEM files that the rank shows, the agent's own where it starts the rank; empty on a plain
    # loopback.
    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""

    def tls(self) -> TlsFiles | None:
        return tls_files(self.tls_ca, self.tls_certificate, self.tls_key)

    def placed_in(self, environment: Mapping[str, str]) -> RankConfig:
        """The config where the rank runs: a pod knows its own address and mounts."""
        there: dict[str, Any] = {
            field: environment[name] for name, field in _OF_THE_PLACE.items() if name in environment
        }
        return replace(self, **there)


#: What a rank's environment says better than its agent can, by variable.
_OF_THE_PLACE = {
    "RADDLE_RANK_HOST": "host",
    "RADDLE_TLS_CA": "tls_ca",
    "RADDLE_TLS_CERTIFICATE": "tls_certificate",
    "RADDLE_TLS_KEY": "tls_key",
}


@dataclass(frozen=True, slots=True)
class RankAddress:
    """How to reach a running rank, and how to tell its process from another with its number."""

    pid: int
    start_time_ticks: int
    incarnation: str
    engine_address: str
    data_address: str
    job_uid: str
    epoch: int
    role: str
    instance: int
    rank: int
    start_count: int = 0


def process_start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold anything, so count from its end.
    fields = text.rpartition(")")[2].split()
    state, start = fields[0], fields[19]
    return None if state == "Z" else int(start)


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def read_config(path: Path) -> RankConfig:
    return msgspec.json.decode(path.read_bytes(), type=RankConfig)


def write_config(path: Path, config: RankConfig) -> None:
    write_atomically(path, msgspec.json.encode(asdict(config)))


def write_address(folder: Path, config: RankConfig, engine_address: str, data_address: str) -> None:
    """Say where we listen; whoever reads it finds it whole."""
    ticks = process_start_ticks(os.getpid())
    assert ticks is not None
    address = RankAddress(
        pid=os.getpid(),
        start_time_ticks=ticks,
        incarnation=config.incarnation,
        engine_address=engine_address,
        data_address=data_address,
        job_uid=config.job_uid,
        epoch=config.epoch,
        role=config.role,
        instance=config.instance,
        rank=config.rank,
        start_count=config.epoch,
    )
    write_atomically(folder / ADDRESS_FILE, msgspec.json.encode(asdict(address)))


def read_address(folder: Path) -> RankAddress | None:
    """The address file of a rank, None while it is not there or cannot be read."""
    try:
        return msgspec.json.decode((folder / ADDRESS_FILE).read_bytes(), type=RankAddress)
    except (OSError, msgspec.DecodeError):
        return None
