"""The jobs that wait to be placed: by priority, then age, with equal shapes told as equal."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

from raddle.model.job import Job
from raddle.model.types import Why

#: (negated priority, time of creation, uid): the smallest is placed first.
Place = tuple[int, float, str]
_TOLD = "WAITS_FOR_"


class WaitingJobs:
    """Kept in order as jobs come and go, so that a decision looks at shapes, not at jobs."""

    def __init__(self) -> None:
        #: Places of each shape in order. Jobs of one shape ask for the same: what does not fit
        #: for one fits for none.
        self._by_shape: dict[int, list[Place]] = {}
        self._known: dict[str, tuple[int, Place]] = {}
        self._shapes: dict[Any, int] = {}
        #: What jobs of each shape wait for now.
        self._now: dict[int, Why] = {}
        #: Jobs that were not told yet what they wait for.
        self.untold: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._known)

    def heads(self) -> list[tuple[Place, int]]:
        """The first job of each shape."""
        return [(places[0], shape) for shape, places in self._by_shape.items()]

    def head(self, shape: int) -> Place | None:
        places = self._by_shape.get(shape)
        return places[0] if places else None

    def shape_of(self, job_uid: str) -> int:
        return self._known[job_uid][0]

    def waits_for(self, shape: int, why: Why, *, tell_head: bool) -> None:
        """Jobs of this shape wait for this; those that were told another reason are told anew.

        Numbers in the sentence change often, and thousands of jobs may wait for the same: of a
        new sentence with the old reason only the first job is told, and only if `tell_head`.
        """
        old = self._now.get(shape)
        self._now[shape] = why
        if old is not None and old.reason != why.reason:
            self.untold |= {place[2]: None for place in self._by_shape[shape]}
        elif old != why and tell_head:
            self.untold[self._by_shape[shape][0][2]] = None

    def why(self, job_uid: str) -> Why | None:
        """What the job waits for by the newest decision, which its record may not say yet."""
        known = self._known.get(job_uid)
        return self._now.get(known[0]) if known is not None else None

    def put(self, job: Job) -> None:
        """A job waits, perhaps at another place than before."""
        model = job.spec.model
        asked = (job.spec.roles, model.config_digest, model.weight_dtype, model.kv_dtype)
        place = (-job.spec.priority, job.create_time, job.uid)
        if self._known.get(job.uid) != (self._shapes.get(asked), place):
            self.drop(job.uid)
            shape = self._shapes.setdefault(asked, len(self._shapes))
            insort(self._by_shape.setdefault(shape, []), place)
            self._known[job.uid] = (shape, place)
        if job.why.reason.startswith(_TOLD):
            self.untold.pop(job.uid, None)
        else:
            self.untold[job.uid] = None

    def drop(self, job_uid: str) -> None:
        self.untold.pop(job_uid, None)
        known = self._known.pop(job_uid, None)
        if known is None:
            return
        shape, place = known
        places = self._by_shape[shape]
        del places[bisect_left(places, place)]
        if not places:
            del self._by_shape[shape]
        if not self._by_shape:
            self._shapes.clear()
            self._now.clear()
