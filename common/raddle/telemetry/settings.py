"""One configuration schema a daemon: a frozen dataclass; file < environment < flag.

Each field of the dataclass is a flag (`--etcd`), an environment variable (`RADDLE_AGENT_ETCD`) and
a key of the YAML file. Lists are comma-separated outside the file. Its `help` metadata is the
flag's help.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from raddle.model.errors import PermanentError, Reason

T = TypeVar("T")
_TRUE = ("1", "true", "yes", "on")


def setting(default: Any, text: str) -> Any:
    """A field of a settings dataclass: its default and its help."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def parser_for(settings_type: Any, program: str, description: str) -> argparse.ArgumentParser:
    """The command line of a daemon."""
    parser = argparse.ArgumentParser(
        program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="*", metavar="config check", help="only check and print")
    parser.add_argument("--config", default="", help="YAML file with any of these settings")
    for field in dataclasses.fields(settings_type):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.type in ("bool", bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(flag, metavar=field.name.upper(), help=text)
    return parser


def load_settings(
    settings_type: type[T], program: str, description: str, argv: Sequence[str] | None = None
) -> tuple[T, bool]:
    """(settings, only check?) from file, environment and flags.

    Raises:
        PermanentError: INVALID_ARGUMENT or UNKNOWN_FIELD, naming the setting.
    """
    arguments = parser_for(settings_type, program, description).parse_args(argv)
    if arguments.command not in ([], ["config", "check"]):
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"unknown command {' '.join(arguments.command)!r}; see --help."
        )
    prefix = program.upper().replace("-", "_") + "_"
    values = _from_file(arguments.config or os.environ.get(f"{prefix}CONFIG", ""))
    hints = typing.get_type_hints(settings_type)
    for field in dataclasses.fields(settings_type):  # type: ignore[arg-type]
        in_environment = os.environ.get(prefix + field.name.upper())
        if in_environment is not None:
            values[field.name] = _from_text(hints[field.name], in_environment)
        given = getattr(arguments, field.name)
        if given is not None:
            values[field.name] = (
                given if isinstance(given, bool) else _from_text(hints[field.name], given)
            )
    known = set(hints)
    for name in values:
        if name not in known:
            raise PermanentError(
                Reason.UNKNOWN_FIELD, f"setting {name!r} is unknown; known are {sorted(known)}."
            )
    try:
        return msgspec.convert(values, settings_type, strict=False), bool(arguments.command)
    except msgspec.ValidationError as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"settings: {error}.") from error


def _from_file(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        found = msgspec.yaml.decode(Path(path).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"settings file {path}: {error}.") from error
    if not isinstance(found, dict):
        raise PermanentError(Reason.INVALID_ARGUMENT, f"settings file {path} holds no mapping.")
    return found


def _from_text(hint: Any, text: str) -> Any:
    if typing.get_origin(hint) is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if hint is bool:
        return text.lower() in _TRUE
    return text


def require(values: Sequence[tuple[str, Any]]) -> None:
    """Settings that have no default.

    Raises:
        PermanentError: INVALID_ARGUMENT naming what is missing.
    """
    missing = [name for name, value in values if not value]
    if missing:
        raise PermanentError(Reason.INVALID_ARGUMENT, f"give {', '.join(missing)}; see --help.")
