"""Contexts of the command line: which server, with which certificates, in which namespace.

A context comes from the file `~/.config/raddle/config.yaml` (or `RADDLE_CONFIG`); `--server` and
`RADDLE_SERVER` win over it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from raddle.model.errors import PermanentError, Reason
from raddle.model.names import check_name
from raddle.telemetry.tls import TlsFiles, tls_files

DEFAULT_SERVER = "127.0.0.1:7400"
_ADDRESS = re.compile(r"(dns:///)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})\Z")
_PORT_MAX = 65_535


@dataclass(frozen=True, slots=True)
class CliContext:
    """One cluster as the command line reaches it."""

    server: str = DEFAULT_SERVER
    namespace: str = "default"
    ca: str = ""
    certificate: str = ""
    key: str = ""

    def tls(self) -> TlsFiles | None:
        return tls_files(self.ca, self.certificate, self.key, prefix="")

    def check(self) -> None:
        """Refuse what no command could use.

        Raises:
            PermanentError: INVALID_ARGUMENT or INVALID_NAME naming the field.
        """
        match = _ADDRESS.match(self.server)
        if match is None or not 0 < int(match["port"]) <= _PORT_MAX:
            raise PermanentError(
                Reason.INVALID_ARGUMENT,
                f"server {self.server[:80]!r} is no address: write host:port, as in"
                f" {DEFAULT_SERVER}, or dns:///host:port for a name of several schedulers.",
                field="server",
            )
        check_name("namespace", self.namespace)
        self.tls()


@dataclass(frozen=True, slots=True)
class CliConfig:
    """The whole file."""

    current: str = ""
    contexts: dict[str, CliContext] = field(default_factory=dict)


def config_path() -> Path:
    named = os.environ.get("RADDLE_CONFIG")
    return Path(named) if named else Path.home() / ".config" / "raddle" / "config.yaml"


_FIELDS = {"server", "namespace", "ca", "certificate", "key"}


def _unknown_fields(data: bytes) -> list[str]:
    document = msgspec.yaml.decode(data)
    found = sorted(set(document) - {"current", "contexts"})
    for name, context in (document.get("contexts") or {}).items():
        found += [f"contexts.{name}.{field}" for field in sorted(set(context) - _FIELDS)]
    return found


def load_config(*, strict: bool = False) -> CliConfig:
    """The configuration, empty when there is no file; `strict` refuses fields it does not know.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the file and the path in it.
    """
    path = config_path()
    try:
        data = path.read_bytes()
        config = msgspec.yaml.decode(data, type=CliConfig)
        unknown = _unknown_fields(data) if strict else []
    except FileNotFoundError:
        return CliConfig()
    except (OSError, msgspec.DecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"{path}: {error}.") from error
    if unknown:
        raise PermanentError(Reason.UNKNOWN_FIELD, f"{path}: unknown fields: {', '.join(unknown)}.")
    return config


def save_config(config: CliConfig) -> None:
    """Write the whole file.

    Raises:
        PermanentError: INVALID_ARGUMENT naming the file.
    """
    path = config_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.yaml.encode(msgspec.to_builtins(config)))
    except OSError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"{path} cannot be written: {error.strerror}."
        ) from error


def choose_context(name: str, server: str, namespace: str) -> CliContext:
    """The context to use, with what the flags say on top.

    Raises:
        PermanentError: NOT_FOUND for an unknown context; as `CliContext.check`.
    """
    config = load_config()
    name = name or config.current
    context = CliContext()
    if name:
        if name not in config.contexts:
            known = ", ".join(sorted(config.contexts)) or "none"
            raise PermanentError(
                Reason.NOT_FOUND,
                f"there is no context {name!r} in {config_path()} (known: {known})",
            )
        context = config.contexts[name]
    chosen = replace(
        context,
        server=server or context.server,
        namespace=namespace or context.namespace,
    )
    chosen.check()
    return chosen
