"""A node's health report from its devices' faults: numbered occurrences, a bounded window."""

from __future__ import annotations

from collections.abc import Sequence

from raddle.model.health import ActiveFault, AgentHealth, DieHolder, FaultOccurrence

OCCURRENCES_KEPT = 64


class FaultLog:
    """Faults of one node in one boot."""

    def __init__(self, node: str, boot_id: str) -> None:
        self.node = node
        self.boot_id = boot_id
        #: Dies that kubelet gave to pods.
        self.holders: tuple[DieHolder, ...] = ()
        self._active: tuple[ActiveFault, ...] = ()
        self._occurrences: list[FaultOccurrence] = []
        self._sequence = 0

    def update(self, faults: Sequence[ActiveFault], *, now: float) -> bool:
        """Take the devices' present faults; True if the report changed."""
        new = tuple(sorted(set(faults), key=lambda f: (f.subject, f.code, f.level)))
        if new == self._active:
            return False
        # Of a fault that changed its level the last word is the one that holds.
        for fault in self._active:
            if fault not in new:
                self._add(fault, "RECOVER", now)
        for fault in new:
            if fault not in self._active:
                self._add(fault, "OCCUR", now)
        self._active = new
        return True

    def _add(self, fault: ActiveFault, action: str, now: float) -> None:
        self._sequence += 1
        occurrence = FaultOccurrence(
            sequence=self._sequence,
            code=fault.code,
            subject_kind=fault.subject_kind,
            subject=fault.subject,
            action=action,
            level=fault.level,
            device_time=now,
            agent_time=now,
        )
        self._occurrences = [*self._occurrences, occurrence][-OCCURRENCES_KEPT:]

    def report(self) -> AgentHealth:
        return AgentHealth(
            node=self.node,
            boot_id=self.boot_id,
            sequence=self._sequence,
            active_faults=self._active,
            occurrences=tuple(self._occurrences),
            holders=self.holders,
        )
