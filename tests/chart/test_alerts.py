"""Alerts and dashboard: metrics exist, rules are well formed, alerts fire when they should."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml

from raddle.agent.metrics import Metrics as AgentMetrics
from raddle.model.job import JobState
from raddle.operator import main as operator
from raddle.operator.work import Counts
from raddle.scheduler.metrics import Metrics
from raddle.store.embedded import EmbeddedEtcd
from raddle.store.ports import free_port
from tests.chart.rendering import CHART, NAMESPACE, PROMETHEUS, one, render
from tests.kubernetes import demand
from tests.support import built_etcd

_METRIC = re.compile(r"\b(?:raddle|etcd)_[a-z0-9_]+")


def rules() -> list[dict[str, Any]]:
    (group,) = one(render({}, PROMETHEUS), "PrometheusRule", "raddle")["spec"]["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def promtool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool") or ""
    demand([] if program else ["promtool is not on PATH: run `make kube-packages`."])
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def daemon_metrics() -> set[str]:
    """Names of all series of schedulers and agents, histograms with their parts."""
    found = set()
    for metric in [*Metrics().registry.collect(), *AgentMetrics().registry.collect()]:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        found |= {metric.name + suffix for suffix in suffixes.get(metric.type, ("",))}
    return found


def queries() -> list[str]:
    """Every expression of the dashboard and the alerts."""
    board = json.loads((CHART / "files" / "dashboards" / "raddle.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    variables = [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return [*panels, *variables, *(rule["expr"] for rule in rules())]


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


async def _operator_metrics() -> str:
    address = f"127.0.0.1:{free_port()}"
    told = SimpleNamespace(metrics_listen=address, held=True, counts=Counts())
    stop = operator._serve_metrics(cast("Any", told), cast("Any", told), cast("Any", told))
    try:
        return await asyncio.to_thread(_get, f"http://{address}/metrics")
    finally:
        stop()


async def test_every_metric_that_is_asked_for_exists(tmp_path: Path) -> None:
    """Names in alerts and dashboard are names of the scheduler's and of etcd's own metrics."""
    asked = {name for query in queries() for name in _METRIC.findall(query)}
    etcd = EmbeddedEtcd(tmp_path, binary=built_etcd())
    etcd.launch()
    await etcd.wait_ready()
    try:
        text = await asyncio.to_thread(_get, f"http://{etcd.endpoint}/metrics")
    finally:
        await etcd.stop()
    text += await _operator_metrics()
    known = daemon_metrics() | set(re.findall(r"^(?:etcd|raddle)_\w+", text, flags=re.MULTILINE))
    assert asked <= known, asked - known
    assert daemon_metrics() & asked


def test_states_of_jobs_in_alerts_exist() -> None:
    """An alert about a state that no job has would never fire."""
    states = {s for rule in rules() for s in re.findall(r'state="(\w+)"', rule["expr"])}
    assert states
    assert states <= set(JobState)


def test_promtool_finds_the_rules_good(tmp_path: Path) -> None:
    """`promtool check rules`, with lint for twins."""
    _write_rules(tmp_path)
    result = promtool(tmp_path, "check", "rules", "--lint-fatal", "rules.yaml")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_says_how_bad_what_and_what_to_do() -> None:
    """A severity, a summary and a description each; no name twice."""
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description"} == set(rule["annotations"])


def _write_rules(folder: Path) -> None:
    groups = {"groups": [{"name": "raddle", "rules": rules()}]}
    (folder / "rules.yaml").write_text(yaml.safe_dump(groups, width=1000))


@dataclass(frozen=True)
class Case:
    """Series of minutes, and the alert that fires at a minute (or does not)."""

    alert: str
    #: metric with more labels -> values, one a minute
    series: dict[str, str]
    minute: int
    fires: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    value: str = ""


CASES = [
    Case(
        "RaddleNoLeader", {'raddle_leader{pod="a"}': "1 0x9", 'raddle_leader{pod="b"}': "0x10"}, 5
    ),
    Case(
        "RaddleNoLeader",
        {'raddle_leader{pod="a"}': "0x10", 'raddle_leader{pod="b"}': "1x10"},
        5,
        fires=False,
    ),
    Case("RaddleNoLeader", {"up": "0x10"}, 5),
    Case("RaddleJobFailed", {'raddle_jobs{state="FAILED"}': "0 2x9"}, 5, value="2"),
    Case("RaddleJobFailed", {'raddle_jobs{state="READY"}': "2x10"}, 5, fires=False),
    Case(
        "RaddleCoverageGone",
        {'raddle_job_coverage_margin_dies{job_uid="j-1"}': "2 0x9"},
        5,
        labels={"job_uid": "j-1"},
    ),
    Case(
        "RaddleCoverageGone",
        {'raddle_job_coverage_margin_dies{job_uid="j-1"}': "0 1x9"},
        5,
        fires=False,
    ),
    Case(
        "RaddleCoverageLow",
        {'raddle_job_coverage_margin_dies{job_uid="j-1"}': "1x60"},
        45,
        labels={"job_uid": "j-1"},
    ),
    Case(
        "RaddleCoverageLow",
        {'raddle_job_coverage_margin_dies{job_uid="j-1"}': "1x20 2x40"},
        45,
        fires=False,
    ),
    Case("RaddleReplicasMissing", {'up{pod="a"}': "1x30", 'up{pod="b"}': "1x30"}, 20, value="2"),
    Case(
        "RaddleReplicasMissing",
        {'up{pod="a"}': "1x30", 'up{pod="b"}': "1x30", 'up{pod="c"}': "1x30"},
        20,
        fires=False,
    ),
    Case(
        "RaddleNodesSilent",
        {'raddle_agent_nodes_silent{pod="a"}': "0 3x20"},
        10,
        labels={"pod": "a"},
        value="3",
    ),
    Case("RaddleNodesSilent", {'raddle_agent_nodes_silent{pod="a"}': "3x3 0x17"}, 10, fires=False),
    Case(
        "RaddleAgentHasNoNodes",
        {'raddle_agent_nodes_file_usable{pod="a"}': "0x20"},
        10,
        labels={"pod": "a"},
    ),
    Case(
        "RaddleAgentHasNoNodes", {'raddle_agent_nodes_file_usable{pod="a"}': "1x9"}, 8, fires=False
    ),
    Case("RaddleOperatorAway", {'raddle_operator_leads{pod="a"}': "0x9"}, 5),
    Case(
        "RaddleOperatorAway",
        {'raddle_operator_leads{pod="a"}': "0x9", 'raddle_operator_leads{pod="b"}': "1x9"},
        5,
        fires=False,
    ),
    Case("RaddleLeaderChangesOften", {"raddle_leader": "0 1 0 1 0 1 0 1 0 1x20"}, 15),
    Case("RaddleLeaderChangesOften", {"raddle_leader": "0 1x30"}, 15, fires=False),
    Case("RaddleJobsWait", {'raddle_jobs{state="PENDING"}': "3x60"}, 45, value="3"),
    Case("RaddleJobsWait", {'raddle_jobs{state="PENDING"}': "3x20 0x40"}, 45, fires=False),
    Case(
        "RaddleRecoveriesSlow",
        {
            'raddle_incident_phase_seconds_bucket{phase="repair",le="5.0"}': "0x30",
            'raddle_incident_phase_seconds_bucket{phase="repair",le="10.0"}': "0+1x30",
            'raddle_incident_phase_seconds_bucket{phase="repair",le="+Inf"}': "0+1x30",
        },
        25,
        labels={"phase": "repair"},
    ),
    Case(
        "RaddleRecoveriesSlow",
        {
            'raddle_incident_phase_seconds_bucket{phase="repair",le="0.1"}': "0+1x30",
            'raddle_incident_phase_seconds_bucket{phase="repair",le="+Inf"}': "0+1x30",
        },
        25,
        fires=False,
    ),
    Case(
        "RaddleStoreSlow",
        {
            'raddle_commit_seconds_bucket{le="0.5"}': "0+9x40",
            'raddle_commit_seconds_bucket{le="1.0"}': "0+10x40",
            'raddle_commit_seconds_bucket{le="+Inf"}': "0+10x40",
        },
        30,
    ),
    Case(
        "RaddleStoreSlow",
        {
            'raddle_commit_seconds_bucket{le="0.5"}': "0+10x40",
            'raddle_commit_seconds_bucket{le="+Inf"}': "0+10x40",
        },
        30,
        fires=False,
    ),
    Case("RaddleRecordsSetAside", {"raddle_records_set_aside": "0 1x9"}, 5, value="1"),
    Case("RaddleRecordsSetAside", {"raddle_records_set_aside": "0x10"}, 5, fires=False),
    Case("RaddleUnforeseenErrors", {"raddle_unforeseen_errors_total": "0 1x9"}, 5),
    Case("RaddleUnforeseenErrors", {"raddle_unforeseen_errors_total": "7x10"}, 5, fires=False),
    Case(
        "RaddleKvUnprotected",
        {'raddle_kv_protection_ratio{job_uid="j-1"}': "0.5x30"},
        20,
        labels={"job_uid": "j-1"},
    ),
    Case(
        "RaddleKvUnprotected",
        {'raddle_kv_protection_ratio{job_uid="j-1"}': "0.95x30"},
        20,
        fires=False,
    ),
    Case(
        "RaddleEtcdFillsUp",
        {"etcd_mvcc_db_total_size_in_bytes": "90x30", "etcd_server_quota_backend_bytes": "100x30"},
        20,
    ),
    Case(
        "RaddleEtcdFillsUp",
        {"etcd_mvcc_db_total_size_in_bytes": "70x30", "etcd_server_quota_backend_bytes": "100x30"},
        20,
        fires=False,
    ),
]


def _series(selector: str, values: str) -> dict[str, str]:
    name, _, more = selector.rstrip("}").partition("{")
    kinds = ("raddle_agent", "raddle_operator", "etcd")
    job = next((k.removeprefix("raddle_") for k in kinds if name.startswith(k)), "scheduler")
    labels = [f'job="{job}"', f'namespace="{NAMESPACE}"', *([more] if more else [])]
    return {"series": f"{name}{{{','.join(labels)}}}", "values": values}


def _expected(case: Case) -> list[dict[str, Any]]:
    if not case.fires:
        return []
    rule = next(rule for rule in rules() if rule["alert"] == case.alert)
    said = {}
    for key, text in rule["annotations"].items():
        text = text.replace("{{ $value }}", case.value)  # noqa: PLW2901
        for label, value in case.labels.items():
            text = text.replace(f"{{{{ $labels.{label} }}}}", value)  # noqa: PLW2901
        assert "{{" not in text, text
        said[key] = text
    labels = {"namespace": NAMESPACE} | rule["labels"] | case.labels
    return [{"exp_labels": labels, "exp_annotations": said}]


def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    """Each alert has a case in which it fires, with its words, and one in which it does not."""
    _write_rules(tmp_path)
    tests = [
        {
            "interval": "1m",
            "input_series": [_series(*item) for item in case.series.items()],
            "alert_rule_test": [
                {
                    "eval_time": f"{case.minute}m",
                    "alertname": case.alert,
                    "exp_alerts": _expected(case),
                }
            ],
        }
        for case in CASES
    ]
    document = {"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": tests}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document, width=1000))
    result = promtool(tmp_path, "test", "rules", "tests.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    for fires in (True, False):
        assert {c.alert for c in CASES if c.fires is fires} == {r["alert"] for r in rules()}
