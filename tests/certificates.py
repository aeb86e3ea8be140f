"""A certificate authority for tests: one CA, a certificate for each identity."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from raddle.cli.certificates import authority
from raddle.cli.certificates.keep import AUTHORITY, Folder, file_name
from raddle.telemetry.tls import SCHEDULER_NAME, TlsFiles

_DAY = dt.timedelta(days=1)


class Authority:
    """Writes `ca.crt`, and `<identity>.crt` and `.key` with `/` as `-` and `*` as `all`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._authority = authority.Authority.create(dt.datetime.now(dt.UTC) - 2 * _DAY)
        self._keep(AUTHORITY, self._authority.pair())

    def issue(self, identity: str, *, expired: bool = False, name: str = "") -> TlsFiles:
        """A certificate for an identity; `name` is the file's name if it is to be another."""
        now = dt.datetime.now(dt.UTC)
        # All servers of a test listen on loopback; one that has no kind passes for a scheduler.
        kinds = authority.wanted(identity).names or (SCHEDULER_NAME,)
        names = tuple(dict.fromkeys((*kinds, "localhost", "127.0.0.1")))
        what = authority.Wanted(identity, names)
        pair = self._authority.issue(what, now - 2 * _DAY, now - _DAY if expired else now + _DAY)
        file = name or file_name(identity)
        self._keep(file, pair)
        return self.files(file)

    def files(self, file: str) -> TlsFiles:
        folder = self.folder
        return TlsFiles(folder / "ca.crt", folder / f"{file}.crt", folder / f"{file}.key")

    def _keep(self, file: str, pair: authority.Pair) -> None:
        Folder(self.folder).replace(file, pair, self._authority.pair().certificate)
