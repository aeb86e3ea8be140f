"""The coverage margin of each job as a metric."""

from __future__ import annotations

from prometheus_client import generate_latest

from raddle.model import keys
from raddle.model.job import InstanceExpertMap, JobExpertMaps
from raddle.model.types import ExpertMap, ExpertMapLayer
from raddle.scheduler.metrics import Metrics


def maps(epoch: int, *rows: tuple[int, ...]) -> JobExpertMaps:
    layers = tuple(ExpertMapLayer(physical_to_logical=row) for row in rows)
    expert_map = ExpertMap(slots_per_rank=1, experts=2, layers=layers)
    instance = InstanceExpertMap(role="decode", instance=0, expert_map=expert_map)
    return JobExpertMaps(job_uid="j", epoch=epoch, instances=(instance,))


def margin(metrics: Metrics) -> str:
    text = generate_latest(metrics.registry).decode()
    name = 'raddle_job_coverage_margin_dies{job_uid="j"} '
    return next((line.removeprefix(name) for line in text.splitlines() if name in line), "")


def test_the_margin_follows_the_newest_map() -> None:
    """The worst layer decides; older maps that are deleted or listed late say nothing."""
    metrics = Metrics()
    assert margin(metrics) == ""
    metrics.record_changed(keys.expert_maps("j", 1), maps(1, (0, 1, 0, 1), (0, 1, 1, 0)), 1)
    assert margin(metrics) == "1.0"
    metrics.record_changed(keys.expert_maps("j", 2), maps(2, (0, 1, 0, 1), (0, 1, 1, -1)), 2)
    metrics.record_changed(keys.expert_maps("j", 1), None, 3)
    metrics.record_changed(keys.expert_maps("j", 1), maps(1, (0, 1, 0, 1)), 4)
    assert margin(metrics) == "0.0"
    metrics.record_changed(keys.expert_maps("j", 2), None, 5)
    assert margin(metrics) == ""
