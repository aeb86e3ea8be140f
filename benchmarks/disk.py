"""How long this machine's disk takes to make a small write durable: it bounds every commit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import figure

WRITES = 300
# About what etcd appends to its log for a small transaction.
WRITE_BYTES = 4_096


def measure(writes: int = WRITES) -> dict[str, Any]:
    """`fsync_ms`: append and fdatasync, as etcd does, where the benchmarks' etcd has its data."""
    samples: list[float] = []
    data = os.urandom(WRITE_BYTES)
    with (
        TemporaryDirectory(prefix="raddle-bench-") as folder,
        (Path(folder) / "log").open("wb", buffering=0) as file,
    ):
        for _ in range(writes):
            began = time.monotonic()
            file.write(data)
            os.fdatasync(file.fileno())
            samples.append((time.monotonic() - began) * 1e3)
    phases = [{"append_and_sync": sample} for sample in samples]
    return {"fsync_ms": figure(samples, phases, bytes=WRITE_BYTES)}
