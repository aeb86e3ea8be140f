"""Tests that a machine cannot run are skipped by name, or fail where they must run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.parametrize("required", [False, True])
def test_without_servers_the_tests_on_kubernetes_are_named(tmp_path: Path, required: bool) -> None:
    """Without the built servers each test is told as skipped with what to do, never as passed."""
    names = ("test_volumes_are_claimed", "test_two_clusters_stand_side_by_side")
    files = [f"tests/kube/test_cluster.py::{name}" for name in names]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "RADDLE_TOOLS": str(tmp_path)}
    environment["RADDLE_KUBE"] = "required" if required else ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = "ERROR" if required else "SKIPPED"
    for file in files:
        assert f"{told} {file} - " in result.stdout
    assert "passed" not in result.stdout
    assert (result.returncode != 0) == required
