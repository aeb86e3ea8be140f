"""The scheduler, which also writes down when it decided on incidents and when it took the lead.

Lines of JSON into the file named by RADDLE_BENCH_TIMES, times of the host's monotonic clock in
seconds: {"incident": id, "decided": s, "encoded": s} once a plan's writes are encoded, and
{"takes": s} as a standby sets out to take the lead.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raddle.core.events import Event
from raddle.core.instructions import Commit, Instruction
from raddle.core.machine import Machine
from raddle.model import keys
from raddle.model.incident import IncidentPhase
from raddle.scheduler import main as scheduler
from raddle.scheduler.leader import Leader, Step
from raddle.store.election import Election, Term

VARIABLE = "RADDLE_BENCH_TIMES"


def tell(**what: Any) -> None:
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(json.dumps(what) + "\n")


class TimedMachine(Machine):
    """Knows when its last decision was made."""

    decided_s = 0.0

    def handle(self, events: Sequence[Event], *, now: float) -> list[Instruction]:
        found = super().handle(events, now=now)
        self.decided_s = time.monotonic()
        return found


class TimedLeader(Leader):
    """Tells of each commit that has a new plan for an incident."""

    def _steps(self, machine: Machine, events: list[Event]) -> list[Step]:
        steps = super()._steps(machine, events)
        encoded_s = time.monotonic()
        assert isinstance(machine, TimedMachine)
        for instruction, _ in steps:
            for write in instruction.writes if isinstance(instruction, Commit) else ():
                is_incident = write.key.startswith(keys.INCIDENTS) and write.value is not None
                if is_incident and write.value.phase is IncidentPhase.DECIDE:
                    tell(incident=write.value.id, decided=machine.decided_s, encoded=encoded_s)
        return steps


class TimedElection(Election):
    """Tells when it sets out to take the lead."""

    async def _take(self, seen_mod_revision: int) -> Term | None:
        tell(takes=time.monotonic())
        return await super()._take(seen_mod_revision)


def main() -> None:
    """Entry point."""
    parts = {"Machine": TimedMachine, "Leader": TimedLeader, "Election": TimedElection}
    vars(scheduler).update(parts)
    scheduler.main()


if __name__ == "__main__":
    main()
