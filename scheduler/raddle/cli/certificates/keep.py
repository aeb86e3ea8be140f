"""Bring kept certificates up to date: what is there and good stays, the rest is made.

Where they are kept is a `Keeper`: a folder of PEM files, or Secrets of a Kubernetes namespace.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from raddle.cli.certificates.authority import Authority, Pair, Wanted
from raddle.model.errors import PermanentError, Reason

AUTHORITY = "ca"


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a new certificate is good for, and how long before its end it is renewed."""

    lifetime: dt.timedelta = dt.timedelta(days=365)
    renew_before: dt.timedelta = dt.timedelta(days=120)

    def __post_init__(self) -> None:
        if not dt.timedelta() <= self.renew_before < self.lifetime:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"certificates of {self.lifetime.days} days cannot be renewed"
                f" {self.renew_before.days} days before their end: choose fewer.",
            )


@dataclass(frozen=True, slots=True)
class Done:
    """What became of one certificate, and why, in one sentence."""

    name: str
    action: str
    why: str


class Keeper(Protocol):
    """Where pairs are kept, by name; `AUTHORITY` is the authority's."""

    def read(self, name: str) -> Pair | None:
        """The pair, or None when there is none."""

    def create(self, name: str, pair: Pair, authority: bytes) -> bool:
        """Keep a pair where there is none; False: another one was quicker."""

    def replace(self, name: str, pair: Pair, authority: bytes) -> None:
        """Keep another pair in place of the one that is there."""


def bring_up_to_date(
    keeper: Keeper, wants: Iterable[Wanted], now: dt.datetime, lifetimes: Lifetimes
) -> list[Done]:
    """Make or renew what is missing, unfit or ends soon; the authority first.

    Raises:
        PermanentError: INVALID_ARGUMENT when the kept authority cannot sign.
    """
    authority, done = _authority(keeper, now)
    result = [done]
    for what in wants:
        name = file_name(what.identity)
        pair = keeper.read(name)
        why = "there was none"
        if pair is not None:
            why = authority.why_not(pair, what, now + lifetimes.renew_before)
            if not why:
                result.append(Done(name, "kept", "it is good"))
                continue
        made = authority.issue(what, now, now + lifetimes.lifetime)
        certificate = authority.pair().certificate
        if pair is not None:
            keeper.replace(name, made, certificate)
            result.append(Done(name, "renewed", why))
        elif keeper.create(name, made, certificate):
            result.append(Done(name, "made", why))
        else:
            result.append(Done(name, "kept", "another run made it meanwhile"))
    return result


def _authority(keeper: Keeper, now: dt.datetime) -> tuple[Authority, Done]:
    pair = keeper.read(AUTHORITY)
    if pair is None:
        made = Authority.create(now)
        if keeper.create(AUTHORITY, made.pair(), made.pair().certificate):
            return made, Done(AUTHORITY, "made", "there was none")
        pair = keeper.read(AUTHORITY)
        if pair is None:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, "the authority vanished while it was read: run this again."
            )
    authority = Authority.load(pair, now)
    return authority, Done(AUTHORITY, "kept", f"it ends on {authority.end:%Y-%m-%d}")


def file_name(identity: str) -> str:
    """Name of an identity's files: `agent/sn0/n07` as `agent-sn0-n07`, `agent/*` as `agent-all`."""
    return identity.replace("/", "-").replace("*", "all")


class Folder:
    """PEM files: `ca.crt`, `ca.key`, and a `.crt` and a `.key` for each identity."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path

    def read(self, name: str) -> Pair | None:
        certificate, key = self._files(name)
        if not certificate.exists() or not key.exists():
            return None
        return Pair(certificate.read_bytes(), key.read_bytes())

    def create(self, name: str, pair: Pair, authority: bytes) -> bool:
        self.replace(name, pair, authority)
        return True

    def replace(self, name: str, pair: Pair, authority: bytes) -> None:  # noqa: ARG002 - one `ca.crt` serves all
        certificate, key = self._files(name)
        # The key first: a certificate without its key is taken for missing.
        _write(key, pair.key, 0o600)
        _write(certificate, pair.certificate, 0o644)

    def _files(self, name: str) -> tuple[Path, Path]:
        return self._path / f"{name}.crt", self._path / f"{name}.key"


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others on its way."""
    part = path.with_name(path.name + ".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
    part.replace(path)
