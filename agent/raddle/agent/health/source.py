"""Where a node's faults come from. Each source gives all present faults, then again on change."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from raddle.model.health import ActiveFault, PartIdentity


class HealthSource(Protocol):
    """The devices of one node."""

    def parts(self) -> tuple[PartIdentity, ...]:
        """The silicon that sits at the node's positions."""
        ...

    def follow(self) -> AsyncGenerator[tuple[ActiveFault, ...], None]:
        """All present faults at once, then all again after each change."""
        ...
