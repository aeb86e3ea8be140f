"""Files that somebody else may renew at any time, as those who use them see them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

T = TypeVar("T")
log = structlog.get_logger()


class Renewed(Generic[T]):
    """What is made of certificate files, made again when they changed. For all threads."""

    def __init__(self, paths: Sequence[Path], make: Callable[..., T]) -> None:
        """`make` gets what each file holds; its OSError says that this does not belong together."""
        self._paths = paths
        self._make = make
        self._lock = threading.Lock()
        self._made: tuple[list[bytes], T] | None = None
        #: Why the files are no good now; told once.
        self._trouble = ""

    def newest(self) -> T:
        """What the files give; while they are half written, what they gave before.

        Raises:
            OSError: they have never been good.
        """
        with self._lock:
            try:
                self._made = self._renewed()
                self._trouble = ""
            except OSError as error:
                if self._made is None:
                    raise
                if str(error) != self._trouble:
                    self._trouble = str(error)
                    log.warning("the old certificates stay", files=str(self), why=self._trouble)
            return self._made[1]

    def _renewed(self) -> tuple[list[bytes], T]:
        found = self._read()
        if self._made is not None and found == self._made[0]:
            return self._made
        made = self._make(*found)
        if self._read() != found:
            raise OSError("they are being written")
        if self._made is not None:
            log.info("certificates were renewed", files=str(self))
        return found, made

    def _read(self) -> list[bytes]:
        return [path.read_bytes() for path in self._paths]

    def __str__(self) -> str:
        return ", ".join(str(path) for path in self._paths)
