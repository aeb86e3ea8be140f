"""The jobs that wait to be placed: by priority, then age, with equal shapes told as equal."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

from raddle.model.job import Job

_Place = tuple[int, float, str]


class WaitingJobs:
    """Kept in order as jobs come and go, so that a decision need not sort thousands of them."""

    def __init__(self) -> None:
        self._order: list[_Place] = []
        self._places: dict[str, _Place] = {}
        #: Shape and told reason of each.
        self._known: dict[str, tuple[int, str]] = {}
        #: Jobs of one shape ask for the same: what does not fit for one fits for none.
        self._shapes: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[str, int, str]]:
        """(job uid, shape, reason that it was told), the next to be placed first."""
        return iter([(uid, *self._known[uid]) for _, _, uid in self._order])

    def put(self, job: Job) -> None:
        """A job waits, perhaps at another place than before."""
        place = (-job.spec.priority, job.create_time, job.uid)
        if self._places.get(job.uid) != place:
            self.drop(job.uid)
            insort(self._order, place)
            self._places[job.uid] = place
        model = job.spec.model
        asked = (job.spec.roles, model.config_digest, model.weight_dtype, model.kv_dtype)
        shape = self._shapes.setdefault(asked, len(self._shapes))
        self._known[job.uid] = (shape, job.why.reason)

    def drop(self, job_uid: str) -> None:
        place = self._places.pop(job_uid, None)
        if place is None:
            return
        del self._order[bisect_left(self._order, place)]
        del self._known[job_uid]
        if not self._order:
            self._shapes.clear()
