"""Which nodes an agent serves, from a file that others write and replace.

The file may not be there yet, and may be swapped for another one at any time, itself or a folder
on its way (as volumes of config maps do). It is looked at each second: no notice of the kernel
follows all of that.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import structlog

from raddle.model.errors import PermanentError, Reason

INTERVAL_S = 1.0
_BYTES_MAX = 1 << 20
log = structlog.get_logger()


def check_nodes(nodes: Collection[str], known: Collection[str], machine: str) -> None:
    """Are these nodes of the machine?

    Raises:
        PermanentError: INVALID_ARGUMENT naming the first that is not.
    """
    for node in nodes:
        if node not in known:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"{node[:80]} is no node of machine {machine}."
            )


def parse_nodes(text: str) -> tuple[str, ...]:
    """Positions of nodes, each once, between commas, blanks or line ends."""
    return tuple(dict.fromkeys(re.findall(r"[^\s,]+", text)))


class NodesFile:
    """The nodes that the file names now."""

    def __init__(self, path: Path, known: Collection[str], machine: str) -> None:
        self._path = path
        self._known = known
        self._machine = machine
        self._seen: tuple[int, ...] = ()
        #: None is named while there is no file; those of before while it cannot be used.
        self.nodes: tuple[str, ...] = ()
        #: Why the file cannot be used; empty while it can.
        self.trouble = ""

    def look(self) -> None:
        """Read the file if it is another one than before; troubles are told when they begin."""
        before = self.trouble
        try:
            found = self._path.stat()
            seen = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
            if seen != self._seen:
                self._read()
                self._seen = seen
        except FileNotFoundError:
            self.nodes, self._seen = (), ()
            self.trouble = f"{self._path} is not there: no node is served until it is"
        except OSError as error:
            self._seen = ()
            self.trouble = f"{self._path} cannot be read: {error.strerror}"
        if self.trouble and self.trouble != before:
            log.warning("the nodes file cannot be used", why=self.trouble, nodes=self.nodes)
        elif before and not self.trouble:
            log.info("the nodes file is used", nodes=self.nodes)

    def _read(self) -> None:
        with self._path.open("rb") as file:
            data = file.read(_BYTES_MAX)
        nodes = parse_nodes(data.decode(errors="replace"))
        try:
            check_nodes(nodes, self._known, self._machine)
        except PermanentError as error:
            self.trouble = f"{self._path}: {error}"
            return
        self.nodes, self.trouble = nodes, ""
