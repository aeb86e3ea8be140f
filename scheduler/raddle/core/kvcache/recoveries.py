"""What became of restored sequences: when they made tokens again, against what was predicted.

In go restore plans and the front doors' reports, out come records of recoveries, newest last, and
how far off the predictions were on average, by which later ones are corrected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median_low

from raddle.core.kvcache.restore import RestorePlan
from raddle.model.reasons import Decision
from raddle.model.routes import SequenceReport

RECOVERIES_MAX = 256
# Weight of the newest recovery in the correction, and its bounds.
_NEWEST = 0.3
_CORRECTION_MIN, _CORRECTION_MAX = 0.1, 100.0


@dataclass(slots=True)
class Recovery:
    """The sequences of one job in one incident at one epoch. Times are seconds since the plan."""

    job_uid: str
    incident_id: str
    epoch: int
    plan: RestorePlan
    begin_s: float
    #: Tokens that each sequence had sent when its rank was lost; those that are back are gone.
    waiting: dict[str, int] = field(default_factory=dict[str, int])
    backs_s: list[float] = field(default_factory=list[float])

    @property
    def median_s(self) -> float:
        """When half of the sequences made tokens again; 0 while more than half wait."""
        whole = len(self.backs_s) + len(self.waiting)
        ordered = sorted(self.backs_s)
        return median_low(ordered) if 2 * len(ordered) >= whole and ordered else 0.0

    @property
    def last_s(self) -> float:
        """When all made tokens again; 0 while any waits."""
        return 0.0 if self.waiting else max(self.backs_s, default=0.0)


class Recoveries:
    """All that this leader saw."""

    def __init__(self) -> None:
        self.records: list[Recovery] = []
        self._corrections: dict[str, float] = {}

    def began(self, recovery: Recovery) -> None:
        """A plan was made; its sequences are waited for."""
        given_up = [r for r in recovery.plan.restores if r.why.says(Decision.GIVE_UP)]
        for restore in given_up:
            recovery.waiting.pop(restore.sequence_id, None)
        # A sequence that is lost once more before it was back waits in the newer recovery.
        for older in self.records:
            if older.job_uid == recovery.job_uid:
                for name in recovery.waiting:
                    older.waiting.pop(name, None)
        self.records = [*self.records, recovery][-RECOVERIES_MAX:]

    def reported(
        self, job_uid: str, updated: Iterable[SequenceReport], removed: Iterable[str], now: float
    ) -> list[Recovery]:
        """A sequence is back when it sent more than it had, or ended.

        Gives the recoveries whose last sequence is back now.
        """
        open_ones = [r for r in self.records if r.waiting and r.job_uid == job_uid]
        if not open_ones:
            return []
        back = dict.fromkeys(removed, 1 << 31)
        back |= {sequence.sequence_id: sequence.sent_tokens for sequence in updated}
        for recovery in open_ones:
            for name in [n for n, had in recovery.waiting.items() if back.get(n, -1) > had]:
                del recovery.waiting[name]
                recovery.backs_s.append(max(0.0, now - recovery.begin_s))
            if not recovery.waiting:
                self._learn(recovery)
        return [recovery for recovery in open_ones if not recovery.waiting]

    def _learn(self, recovery: Recovery) -> None:
        if recovery.plan.last_s <= 0 or not recovery.backs_s:
            return
        old = self.correction(recovery.job_uid)
        seen = old * recovery.last_s / recovery.plan.last_s
        new = (1 - _NEWEST) * old + _NEWEST * seen
        self._corrections[recovery.job_uid] = min(_CORRECTION_MAX, max(_CORRECTION_MIN, new))

    def correction(self, job_uid: str) -> float:
        """Factor between what the job's recoveries took and what the figures say."""
        return self._corrections.get(job_uid, 1.0)

    def forget(self, job_uid: str) -> None:
        self._corrections.pop(job_uid, None)
        self.records = [r for r in self.records if r.job_uid != job_uid]

    def of(self, job_uid: str) -> list[Recovery]:
        return [recovery for recovery in self.records if recovery.job_uid == job_uid]
