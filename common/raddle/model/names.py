"""Names that become parts of keys and of host names."""

from __future__ import annotations

import re

from raddle.model.errors import PermanentError, Reason

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
