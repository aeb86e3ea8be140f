"""What `raddle sim` prints."""

from __future__ import annotations

import json
from typing import Any

import pytest
import structlog
import yaml

from raddle.sim.main import EXIT_FAILED, main


def printed(capsys: pytest.CaptureFixture[str], output: str) -> str:
    """Stdout of one short seed."""
    kept = structlog.get_config()
    try:
        with pytest.raises(SystemExit) as ended:
            main(["--seed", "3", "--faults", "6", "--jobs", "1", "--output", output])
    finally:
        structlog.configure(**kept)
    assert ended.value.code != EXIT_FAILED
    return capsys.readouterr().out


def test_the_summary_is_the_same_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and YAML hold the same document and nothing else; the table counts the seeds."""
    as_json: dict[str, Any] = json.loads(printed(capsys, "json"))
    as_yaml: dict[str, Any] = yaml.safe_load(printed(capsys, "yaml"))
    for timed in (as_json, as_yaml):
        del timed["incidents_per_cpu_s"]
    assert as_json == as_yaml
    assert as_json["options"], "no incident had a plan: the seed shows nothing"
    assert printed(capsys, "table").splitlines()[-1].startswith("1 seeds, 0 failed")
