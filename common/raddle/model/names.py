"""Names that become parts of keys, of host names and of paths."""

from __future__ import annotations

import re

from raddle.model.errors import PermanentError, Reason
from raddle.model.types import RankKey

# As device plugins name what they give: `Ascend910-3`, and more after it for a part of a device.
_DEVICE = re.compile(r"[A-Za-z0-9.]+-(\d+)(?:-.*)?\Z")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


def check_name(path: str, value: str) -> None:
    """A DNS label, nothing else.

    Raises:
        PermanentError: INVALID_NAME naming the path.
    """
    if not _LABEL.match(value):
        raise PermanentError(
            Reason.INVALID_NAME,
            f"{path} {value[:80]!r} must be 1 to 63 lower-case letters, digits and dashes,"
            " beginning and ending with a letter or digit.",
            field=path,
        )


def device_number(name: str) -> int | None:
    """Number on its node of the die that a device plugin's name means."""
    match = _DEVICE.match(name)
    return int(match[1]) if match else None


def ranks_folder(node: str) -> str:
    """Where a node's ranks have their folders, from the agent's state folder on."""
    return f"ranks/{node.replace('/', '-')}"


def rank_folder(node: str, job_uid: str, key: RankKey, start_count: int) -> str:
    """The folder of one start of a rank, from the agent's state folder on."""
    name = f"{key.role}-{key.instance}-{key.rank}-{start_count}"
    return f"{ranks_folder(node)}/{job_uid}/{name}"
