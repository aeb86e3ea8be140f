"""What `kubectl ... --watch` prints of a job's incidents, and when it does."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from tools.kubernetes.cluster import Cluster

_INCIDENT = re.compile(r"\bi-\d+\b")


def now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def printed(cluster: Cluster, *arguments: str) -> Iterator[dict[str, datetime]]:
    """Incident -> when a command that goes on printing named it first, for the time of a block."""
    seen: dict[str, datetime] = {}

    def read(lines: Iterable[str]) -> None:
        for line in lines:
            for incident in _INCIDENT.findall(line):
                seen.setdefault(incident, now())

    with cluster.follow(*arguments) as process:
        reader = threading.Thread(target=read, args=(process.stdout,), name="printed")
        reader.start()
        try:
            yield seen
        finally:
            process.terminate()
            reader.join()
