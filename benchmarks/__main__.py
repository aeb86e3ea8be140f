"""All figures: one JSON object on stdout, progress on stderr. `make -s bench`."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import structlog

from benchmarks import (
    control_plane,
    decisions,
    delivery,
    disk,
    failover,
    footprint,
    kv,
    throughput,
    tokens,
)
from benchmarks.cluster import say

PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "disk": disk.measure,
    "decisions": decisions.measure,
    "throughput": throughput.measure,
    "kv": lambda: {"kv": kv.measure()},
    "footprint": lambda: asyncio.run(footprint.measure()),
    "delivery": lambda: asyncio.run(delivery.measure()),
    "control_plane": lambda: asyncio.run(control_plane.measure()),
    "failover": lambda: asyncio.run(failover.measure()),
    "tokens": lambda: asyncio.run(tokens.measure()),
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args().parts or list(PARTS)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        # Nothing but the figures goes to stdout.
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # Ends as Ctrl-C does: what was started is ended, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    result: dict[str, Any] = {}
    for name in chosen:
        began = time.monotonic()
        result |= PARTS[name]()
        say(f"{name}: {time.monotonic() - began:.0f} s")
    result["host"] = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 1),
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
