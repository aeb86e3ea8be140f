"""Machines that are described with the project, and reading a description from a file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from raddle.model.errors import PermanentError, Reason
from raddle.model.topology import SuperNode
from raddle.v1 import topology_pb2
from raddle.wire import parse


def names() -> tuple[str, ...]:
    """Names of the built-in machines."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def load_machine(name_or_path: str) -> SuperNode:
    """A built-in machine, or one from a YAML file.

    Raises:
        PermanentError: NOT_FOUND, UNKNOWN_FIELD or INVALID_ARGUMENT with the field's path.
    """
    if name_or_path in names():
        text = _text(name_or_path)
    else:
        try:
            text = Path(name_or_path).read_text()
        except UnicodeDecodeError as error:
            raise PermanentError(
                Reason.INVALID_ARGUMENT, f"{name_or_path} is no text in UTF-8: {error}."
            ) from error
        except OSError as error:
            known = ", ".join(names())
            raise PermanentError(
                Reason.NOT_FOUND,
                f"{name_or_path!r} is neither a readable file nor a built-in machine ({known}).",
            ) from error
    return parse.supernode(machine_message(parse.read_document(text), "supernode"))


def machine_message(document: Mapping[str, Any], what: str) -> topology_pb2.SuperNode:
    """A described machine: its own fields over those of the built-in machine that it names.

    Raises:
        PermanentError: UNKNOWN_FIELD or INVALID_ARGUMENT with the field's path in `what`.
    """
    message = topology_pb2.SuperNode()
    if document.get("machine") in names():
        parse.set_fields(parse.read_document(_text(document["machine"])), message, what)
    parse.set_fields(document, message, what)
    return message


def _text(built_in: str) -> str:
    return (resources.files(__name__) / f"{built_in}.yaml").read_text()
