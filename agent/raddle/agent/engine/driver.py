"""One interface to every engine: start a rank, bring it to a stage, watch it, end it.

A driver runs the verbs of design section 9 that its engine has and says which these are; the
agent's machine decides when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from raddle.agent.core.events import Drive, Event, StartRank, StopRank
from raddle.model.job import JobExpertMaps
from raddle.model.routes import Routes

Tell = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class JobContext:
    """What all ranks of a job on this node need at one epoch."""

    routes: Routes
    maps: JobExpertMaps


class EngineDriver(Protocol):
    """Everything is told through `tell`; nothing raises."""

    name: str
    #: Does `drive` need members and maps at stage PREPARE?
    needs_context: bool
    verbs: tuple[str, ...]

    async def adopt(self) -> None:
        """Tell the ranks that still run from before the agent's start."""
        ...

    async def start(self, instruction: StartRank) -> None: ...

    async def stop(self, instruction: StopRank) -> None: ...

    async def drive(self, instruction: Drive, context: JobContext | None) -> None: ...

    async def close(self) -> None:
        """Let go of everything; real ranks run on."""
        ...
