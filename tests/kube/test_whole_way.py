"""The whole way, from an empty cluster and back: the guide, word for word, and harder faults."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from tools.kubernetes.box import wait_until
from tools.kubernetes.cluster import Cluster, CommandError
from tools.kubernetes.images import TARGETS, version

from raddle import traces
from tests.kube.guide import Guide
from tests.kube.known_tokens import known_tokens
from tests.kube.load import Load
from tests.kube.release import (
    FRONT_DOOR,
    JOB,
    NAMESPACE,
    PATIENCE_S,
    SCHEDULERS,
    Object,
    Release,
    is_ready,
)
from tests.kube.watched import now
from tests.support import ROOT

#: What the guide and the NOTES promise of an incident.
SHOWN_AFTER_OPENING = timedelta(seconds=2)
SHOWN_AFTER_KILL = timedelta(seconds=10)
MACHINE_NODES = 48


@pytest.mark.timeout(2400)
def test_the_whole_way(cluster: Cluster, tmp_path: Path) -> None:
    """Install, serve, lose ranks and nodes, upgrade, go back, uninstall: no token is another."""
    guide, release = Guide(cluster), Release(cluster)
    wait_until(release.is_alone, "namespaces of other tests are gone", PATIENCE_S)
    before = release.objects()
    _install(guide)
    _submit(guide, release)
    _ask(guide)
    requests = [replace(r, output_tokens=48) for r in traces.load_requests(8, blocks_max=4)]
    known = known_tokens(requests, tmp_path)

    def loaded() -> Load:
        return Load(cluster, release.service(), requests, known)

    with loaded() as load:
        _a_killed_rank(release)
        load.settle()
        _a_deleted_pod(guide, release)
        load.settle()
        _evicted_schedulers(release)
    _a_lost_node(release, loaded, leads=False)
    _place_anew(release)
    _a_lost_node(release, loaded, leads=True)
    with loaded() as load:
        _all_of_raddle_restarts(release)
        load.settle()
        _an_upgrade_and_back(guide, release)
        load.settle()
    _uninstall(guide, release, before)
    assert guide.left == []


def _install(guide: Guide) -> None:
    """One command brings Raddle up by itself; its test says that the machine reports."""
    guide.follow("Install")
    said = guide.follow("Install")
    assert "Succeeded" in said
    assert said.count("READY") == MACHINE_NODES


def _submit(guide: Guide, release: Release) -> None:
    """One command submits a job, and each of its ranks is a pod that is ready.

    It serves without ranks whose pods are slow to come up, and has them all in the end.
    """
    said = guide.follow("Submit a job")
    assert f"inferencejob.raddle.dev/{JOB} condition met" in said
    wait_until(
        lambda: [is_ready(pod) for pod in release.rank_pods("decode")] == [True] * 6,
        "all ranks serve",
        PATIENCE_S,
    )
    nodes = {pod["spec"]["nodeName"] for pod in release.rank_pods("decode")}
    assert len(nodes) > 1, "the loss of one Kubernetes node must not be the loss of the job"


def _ask(guide: Guide) -> None:
    """The API server leads a request to the job's Service."""
    assert '"choices"' in guide.follow("Send requests")


def _is_shown(release: Release, kill: Callable[[], None]) -> None:
    """Kill something; what kubectl shows of it comes in time, and the job recovers."""
    epoch = release.status()["epoch"]
    with release.watched() as watched:
        killed = now()
        kill()
        shown = release.next_incident(watched, killed)
    _in_time(shown.opened, shown.listed, shown.told, killed)
    release.until_ready(epoch + 1)
    wait_until(lambda: release.is_closed(shown.incident), "the incident closes", PATIENCE_S)


def _in_time(opened: datetime, listed: datetime, told: datetime, killed: datetime) -> None:
    assert listed - opened <= SHOWN_AFTER_OPENING
    assert told - opened <= SHOWN_AFTER_OPENING
    assert listed - killed <= SHOWN_AFTER_KILL
    assert told - killed <= SHOWN_AFTER_KILL


def _a_killed_rank(release: Release) -> None:
    """The process of a decode rank ends in its pod, without a word."""
    _is_shown(release, lambda: release.signal_rank("decode", signal.SIGKILL))


def _a_deleted_pod(guide: Guide, release: Release) -> None:
    """As the guide rehearses a failure."""
    epoch = release.status()["epoch"]
    guide.follow("Kill a rank")
    release.until_ready(epoch + 1)


def _evicted_schedulers(release: Release) -> None:
    """The budget lets one of the schedulers go, the next one when there are three again."""
    first, second, _ = (pod["metadata"]["name"] for pod in release.pods(SCHEDULERS))
    release.evict(first)
    with pytest.raises(CommandError, match="disruption budget"):
        release.evict(second)
    wait_until(lambda: release.schedulers_are_ready(3), "three schedulers are ready", PATIENCE_S)
    release.evict(second)
    wait_until(lambda: release.schedulers_are_ready(3), "three schedulers are ready", PATIENCE_S)


def _a_lost_node(release: Release, loaded: Callable[[], Load], *, leads: bool) -> None:
    """All of a Kubernetes node ends at once, agent and ranks, and with it Raddle's leader or not.

    Not on it: etcd, which is one pod in a trial, the front door, which holds the clients'
    connections, and the operator that acts, whose Lease the other one waits for.
    """
    node = _node_to_lose(release)
    release.move_leader(node, here=leads)
    release.move_operator_from(node)
    with loaded():
        _is_shown(release, lambda: release.lose_node(node))
    release.regain_node(node)


def _node_to_lose(release: Release) -> str:
    kept = release.nodes_of("app.kubernetes.io/component in (etcd,frontdoor)")
    ranks = {pod["spec"]["nodeName"] for pod in release.rank_pods()}
    return str(min(ranks - kept))


def _place_anew(release: Release) -> None:
    """The job's ranks have left the lost node; a new job has some on every node."""
    manifest = str(ROOT / "examples" / "job.yaml")
    release.kubectl("delete", "-f", manifest, "--timeout=2m")
    release.kubectl("apply", "-f", manifest)
    release.until_ready(1)


def _all_of_raddle_restarts(release: Release) -> None:
    """Schedulers, agents, operators, etcd and front door get other images; ranks do not notice."""
    before = _what_serves(release)
    own, (door,) = release.own_pods(), release.pods(FRONT_DOOR)
    for name in TARGETS.values():
        release.cluster.tag_image(f"localhost/{name}:{version()}", f"localhost/{name}:next")
    settings = ["--set=image.tag=next"] + [
        f"--set-string={part}.podAnnotations.round=two"
        for part in ("scheduler", "agent", "operator", "etcd")
    ]
    upgrade = ("upgrade", "raddle", str(ROOT / "charts" / "raddle"), "--namespace", NAMESPACE)
    release.cluster.helm(*upgrade, "--reuse-values", *settings, "--wait", "--timeout=10m")
    assert release.own_pods().keys().isdisjoint(own)
    wait_until(lambda: _is_replaced(release, door), "another front door serves", PATIENCE_S)
    assert _what_serves(release) == before


def _is_replaced(release: Release, door: Object) -> bool:
    """Does another front door serve, of the new image, though the old one's streams may go on?"""
    pods = release.pods(FRONT_DOOR)
    images = [container["image"] for pod in pods for container in pod["spec"]["containers"]]
    is_new = all(pod["metadata"]["uid"] != door["metadata"]["uid"] for pod in pods)
    return is_new and images == ["localhost/raddle:next"] and is_ready(pods[0])


def _an_upgrade_and_back(guide: Guide, release: Release) -> None:
    """As the guide does it."""
    before = _what_serves(release)
    guide.follow("Upgrade")
    assert _what_serves(release) == before


def _what_serves(release: Release) -> tuple[int, list[str]]:
    """The job's epoch, and the pods of its ranks."""
    uids = sorted(pod["metadata"]["uid"] for pod in release.rank_pods())
    return int(release.status()["epoch"]), uids


def _uninstall(guide: Guide, release: Release, before: set[str]) -> None:
    """The job ends by itself, though one of its ranks hangs; what is left then the NOTES name."""
    release.signal_rank("decode", signal.SIGSTOP)
    notes = release.cluster.helm("get", "notes", "raddle", "--namespace", NAMESPACE)
    # Jobs, maintenances, and the release.
    guide.next_lines("Uninstall", 3)
    _until_none(
        lambda: _unnamed(guide, release.objects() - before, notes), "is left and not in the NOTES"
    )
    guide.follow("Uninstall")
    _until_none(lambda: sorted(release.objects() ^ before), "is left, or went with it")


def _until_none(find: Callable[[], list[str]], what: str) -> None:
    try:
        wait_until(lambda: not find(), what)
    except TimeoutError:
        raise AssertionError(f"{', '.join(find())} {what}") from None


def _unnamed(guide: Guide, left: set[str], notes: str) -> list[str]:
    """What is left that neither a command of the NOTES would delete nor their text names."""
    commands = [line.strip() for line in notes.splitlines() if " delete " in line]
    named = {f"namespace/{NAMESPACE}"}
    for command in commands:
        if command.startswith("kubectl "):
            named |= set(guide.run(f"{command} --dry-run=server --output=name").split())
    return [
        name
        for name in sorted(left - named)
        # A custom resource goes with its definition.
        if ".raddle.dev/" not in name and not re.search(rf"\b{_short(name)}\b", notes)
    ]


def _short(name: str) -> str:
    return re.escape(name.rpartition("/")[2])
