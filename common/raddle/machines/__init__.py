"""Machines that are described with the project, and reading a description from a file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from raddle.model.errors import PermanentError, Reason
from raddle.model.topology import SuperNode
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
        text = (resources.files(__name__) / f"{name_or_path}.yaml").read_text()
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
    return parse.supernode(parse.supernode_message(text))
