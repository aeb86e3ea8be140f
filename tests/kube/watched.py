"""What `kubectl ... --watch` prints of a job's incidents, and when it does."""

from __future__ import annotations

import re
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from tools.kubernetes.cluster import Cluster

_INCIDENT = re.compile(r"\bi-\d+\b")


def now() -> datetime:
    return datetime.now(UTC)


class Lines:
    """A command that goes on printing, for the time of a block."""

    def __init__(self, cluster: Cluster, *arguments: str) -> None:
        self._process = cluster.follow(*arguments)
        self._reader = threading.Thread(target=self._read, name="lines")
        #: Incident -> when it was printed first.
        self.seen: dict[str, datetime] = {}

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._reader.join()
        self._process.communicate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            for incident in _INCIDENT.findall(line):
                self.seen.setdefault(incident, now())
