"""What ranks say of their experts' loads, kept per instance with older tokens fading away.

In go reports of running ranks; out come loads [layers, experts] once enough tokens were seen to
tell a hot expert from chance. Nothing of it is stored: after a leader change it is gathered anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raddle.core.experts.layout import FloatArray
from raddle.model.stats import ExpertLoad
from raddle.model.types import RankKey

# Tokens count half after this time: the loads of DeepSeek-V3 keep their hot experts for minutes.
HALF_LIFE_S = 120.0
# Fewer tokens an expert on average, and chance alone moves a load by more than 10 %.
TOKENS_AN_EXPERT_MIN = 100
# After a new epoch, and after a look, a job is left alone for so long.
LOOK_EVERY_S = 120.0


@dataclass(slots=True)
class _Seen:
    tokens: FloatArray
    at_s: float


@dataclass(slots=True)
class ExpertLoads:
    """Loads by job, role and instance, and when each job is to be looked at."""

    #: 0: nobody is looked at, recoveries use the loads all the same.
    look_every_s: float = LOOK_EVERY_S
    seen: dict[tuple[str, str, int], _Seen] = field(
        default_factory=dict[tuple[str, str, int], _Seen]
    )
    #: (epoch, time) from which on a rebalance may be considered, by job.
    due: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])

    def take(
        self,
        job_uid: str,
        rank: RankKey,
        loads: tuple[ExpertLoad, ...],
        shape: tuple[int, int],
        now: float,
    ) -> None:
        """Add one rank's report; rows of another shape than [layers, experts] are passed over."""
        key = (job_uid, rank.role, rank.instance)
        seen = self.seen.get(key)
        if seen is None or seen.tokens.shape != shape:
            seen = self.seen[key] = _Seen(np.zeros(shape), now)
        seen.tokens *= 0.5 ** (max(now - seen.at_s, 0.0) / HALF_LIFE_S)
        seen.at_s = now
        for row in loads:
            if 0 <= row.layer < shape[0] and len(row.tokens) == shape[1]:
                seen.tokens[row.layer] += np.maximum(row.tokens, 0)

    def of(self, job_uid: str, role: str, instance: int) -> FloatArray | None:
        """Loads [layers, experts], if enough tokens of every layer were seen."""
        seen = self.seen.get((job_uid, role, instance))
        if seen is None or seen.tokens.mean(axis=1).min() < TOKENS_AN_EXPERT_MIN:
            return None
        # Whole numbers: a rebalance takes them for counts, and a few of them for chance.
        return np.rint(seen.tokens)

    def take_due(self, job_uid: str, epoch: int, now: float) -> bool:
        """Is it time to look at the job at this epoch? Then the next time is later."""
        if not self.look_every_s:
            return False
        known, at_s = self.due.get(job_uid, (0, 0.0))
        if known != epoch:
            self.due[job_uid] = (epoch, now + self.look_every_s)
            return False
        if now < at_s:
            return False
        self.due[job_uid] = (epoch, now + self.look_every_s)
        return True

    def forget(self, job_uid: str) -> None:
        self.due.pop(job_uid, None)
        for key in [key for key in self.seen if key[0] == job_uid]:
            del self.seen[key]
