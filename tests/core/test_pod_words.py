"""What Kubernetes says of ranks' pods, behind what their agents say."""

from __future__ import annotations

from raddle.core.context import PodWord
from raddle.core.events import Woken
from raddle.core.requests import ReportPods, SubmitJob
from raddle.model import keys
from raddle.model.incident import Incident
from raddle.model.job import Job, JobState
from raddle.model.kinds import SeatState
from raddle.model.types import RankKey
from tests.core.test_restarts import end_all
from tests.core.world import World, spec, submit

KILLED = ("OOMKilled", "the container used more memory than its limit")


def word(rank: int, start_count: int, *said: str, has_ended: bool = True) -> PodWord:
    reason, message = said or KILLED
    key = RankKey(role="decode", instance=0, rank=rank)
    return PodWord(key, start_count, has_ended=has_ended, reason=reason, message=message)


def report(world: World, uid: str, *words: PodWord) -> None:
    world.ask(ReportPods(job_uid=uid, words=words))
    world.now += 0.02
    world.handle(Woken())


def job_of(world: World, uid: str) -> Job:
    found: Job = world.store[keys.job(uid)]
    return found


def incidents(world: World) -> list[Incident]:
    return [v for k, v in sorted(world.store.items()) if k.startswith(keys.INCIDENTS)]


def story(world: World, uid: str) -> list[str]:
    events = [v for k, v in sorted(world.store.items()) if k.startswith(keys.AUDIT)]
    return [e.message for e in events if e.subject == uid and e.kind == "POD_PROBLEM"]


def exits(world: World, uid: str, rank: int) -> int:
    """A process ends and its agent says so; gives the start that it was of."""
    seat = world.store[keys.placement(uid)].instances[0].ranks[rank]
    world.exited.add((uid, "decode", 0, rank, seat.start_count))
    world.agents()
    world.now += 0.02
    world.handle(Woken())
    return int(seat.start_count)


def starting(world: World) -> str:
    """A job whose first rank does not come up."""
    world.starting.add(("j-small", "decode", 0, 0, 1))
    request = SubmitJob(spec=spec("small"), job_uid="j-small", spec_digest="d")
    job, _ = world.ask(request)
    world.settle()
    assert job_of(world, "j-small").state is JobState.STARTING
    return str(job.uid)


def test_an_agent_sees_the_end_first_and_its_pod_says_why(world: World) -> None:
    """The recovery waits for no pod; its incident is explained when the pod is told, once."""
    uid = submit(world)
    start = exits(world, uid, 2)
    (incident,) = incidents(world)
    assert "OOMKilled" not in incident.why.message
    for _ in range(2):
        report(world, uid, word(2, start))
        (incident,) = incidents(world)
        assert incident.why.message.count("its pod: OOMKilled: the container used more") == 1
        assert incident.faults[0].code == "OOMKilled"
    world.settle()
    assert job_of(world, uid).state is JobState.READY
    assert len(incidents(world)) == 1


def test_an_incident_that_is_over_is_explained_too(world: World) -> None:
    """Kubelet may be slower than the whole recovery."""
    uid = submit(world)
    start = exits(world, uid, 2)
    world.settle()
    report(world, uid, word(2, start))
    (incident,) = incidents(world)
    assert incident.end_time > 0
    assert "OOMKilled" in incident.why.message


def test_a_pod_that_is_told_before_the_agent_speaks_is_in_the_decision(world: World) -> None:
    """Both say the same: the sentence has both."""
    uid = submit(world)
    report(world, uid, word(2, 1))
    assert incidents(world) == []
    exits(world, uid, 2)
    (incident,) = incidents(world)
    assert "rank process ended with exit code 0" in incident.why.message
    assert "its pod: OOMKilled" in incident.why.message


def test_no_word_of_a_pod_speaks_against_an_agent(world: World) -> None:
    """The agent says that the rank serves: nothing moves."""
    uid = submit(world)
    report(world, uid, word(2, 1), word(3, 1, "ErrImagePull", "not found", has_ended=False))
    world.settle()
    assert (job_of(world, uid).state, job_of(world, uid).epoch) == (JobState.READY, 1)
    assert incidents(world) == []


def test_a_pod_that_ended_before_its_rank_came_up_is_not_waited_for(world: World) -> None:
    """Its agent would wait for a minute; the others go on at once."""
    uid = starting(world)
    report(world, uid, word(0, 1, "UnexpectedAdmissionError", "no device is left"))
    world.settle()
    assert job_of(world, uid).state is JobState.READY
    (incident,) = incidents(world)
    assert "the rank's pod ended: UnexpectedAdmissionError: no device" in incident.why.message
    assert world.store[keys.placement(uid)].instances[0].ranks[0].state is SeatState.LOST


def test_a_pod_that_waits_is_a_story_and_no_loss(world: World) -> None:
    """An image may still come; each reason is told once, however many pods wait for it."""
    uid = starting(world)
    waits = ("ErrImagePull", "demo:1: not found")
    for _ in range(2):
        report(world, uid, word(0, 1, *waits, has_ended=False))
    report(world, uid, *(word(n, 1, *waits, has_ended=False) for n in range(3)))
    assert job_of(world, uid).state is JobState.STARTING
    assert incidents(world) == []
    assert story(world, uid) == ["the pod of decode/0/0: ErrImagePull: demo:1: not found"]
    world.starting.clear()
    world.settle()
    assert job_of(world, uid).state is JobState.READY
    exits(world, uid, 0)
    # What it waited for then is not why it ended now.
    assert "ErrImagePull" not in incidents(world)[0].why.message


def test_a_start_that_its_agent_gives_up_names_what_its_pod_waited_for(world: World) -> None:
    """Who reads the incident need not look for the pod."""
    uid = starting(world)
    report(world, uid, word(0, 1, "ErrImagePull", "demo:1: not found", has_ended=False))
    world.gave_up.add((uid, "decode", 0, 0, 1))
    world.settle()
    (incident,) = incidents(world)
    assert "its pod: ErrImagePull: demo:1: not found" in incident.why.message
    assert incident.faults[0].code == "ErrImagePull"


def test_a_word_about_another_start_does_not_count(world: World) -> None:
    """The pod of before may end late; the rank's new process has nothing to do with it."""
    uid = submit(world)
    report(world, uid, word(2, 7))
    exits(world, uid, 2)
    (incident,) = incidents(world)
    assert "OOMKilled" not in incident.why.message


def test_the_end_of_a_pod_counts_while_its_agent_is_silent(world: World) -> None:
    """Nobody else could tell that the rank is gone while others on the node may serve."""
    uid = submit(world)
    node = world.store[keys.placement(uid)].instances[0].ranks[0].node
    world.answering.add(node)
    world.node_down(node)
    world.settle()
    assert incidents(world) == []
    report(world, uid, word(0, 1))
    (incident,) = incidents(world)
    assert "the rank's pod ended: OOMKilled" in incident.why.message


def test_a_budget_that_is_spent_names_why_pods_ended(world: World) -> None:
    """The last end is judged before its pod is told; those before it were told."""
    uid = submit(world)
    for _ in range(20_000):
        ranks = world.store[keys.placement(uid)].instances[0].ranks
        starts = {seat.rank: seat.start_count for seat in ranks}
        end_all(world, uid)
        if job_of(world, uid).state is not JobState.RECOVERING:
            break
        report(world, uid, *(word(rank, start) for rank, start in starts.items()))
    job = job_of(world, uid)
    assert job.why.reason == "RESTART_BUDGET"
    assert "a pod of it: OOMKilled: the container used more" in job.why.message
