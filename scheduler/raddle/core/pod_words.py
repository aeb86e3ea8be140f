"""What Kubernetes says of ranks' pods: why a rank ended or does not come up.

In go the operator's words; out come what detection looks at and better stories. Agents see a rank's
end first and without doubt; they do not see why, and of a pod that never came up they see nothing.
A word counts for one start of one rank, and no word speaks against an agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raddle.core import recover
from raddle.core.context import Context, PodWord, active_seats, note
from raddle.model import keys
from raddle.model.incident import IncidentFault
from raddle.model.job import Job
from raddle.model.kinds import FaultKind
from raddle.model.types import RankKey


def take(context: Context, job: Job, words: Sequence[PodWord], identity: str) -> None:
    """Keep the words of pods that the job's placement has; the others explain what is past."""
    placement = context.state.placement(job.uid)
    seats = active_seats(context, job, placement) if placement is not None else []
    starts = {seat.key: seat.placement.start_count for seat in seats}
    old = context.pod_words.get(job.uid, {})
    kept = {key: word for key, word in old.items() if starts.get(key) == word.start_count}
    told = {word.reason for word in kept.values()}
    for word in words:
        if starts.get(word.rank) == word.start_count:
            kept[word.rank] = word
        elif word.has_ended:
            _explain(context, job.uid, word)
    if kept == old:
        return
    context.pod_words[job.uid] = kept
    context.touched[job.uid] = None
    # A story does not name each of a job's pods that wait for the same.
    for reason in sorted({word.reason for word in kept.values()} - told):
        same = [word for word in kept.values() if word.reason == reason]
        text = f"the pod of {_name(same[0].rank)}: {same[0].sentence}"
        more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
        note(context, "POD_PROBLEM", job.uid, f"{text}{more}", identity=identity)


def _name(key: RankKey) -> str:
    return f"{key.role}/{key.instance}/{key.rank}"


def _explain(context: Context, job_uid: str, word: PodWord) -> None:
    """The incident of a rank's end, which is decided already, says why the rank ended."""
    for incident in reversed(context.state.incidents()):
        faults = tuple(_explained(fault, job_uid, word) for fault in incident.faults)
        if faults != incident.faults:
            told = replace(incident, faults=faults)
            context.state.put(keys.incident(told.id), replace(told, why=recover.summary(told)))
            return


def _explained(fault: IncidentFault, job_uid: str, word: PodWord) -> IncidentFault:
    is_its_end = (
        fault.kind is FaultKind.RANK_EXITED
        and (fault.job_uid, fault.rank, fault.start_count) == (job_uid, word.rank, word.start_count)
        and fault.code != word.reason
    )
    if not is_its_end:
        return fault
    return replace(fault, code=word.reason, message=f"{fault.message}; its pod: {word.sentence}")
