"""The shell scripts beside the project's programs."""

from __future__ import annotations

import shutil
import subprocess

from tests.kubernetes import demand
from tests.support import ROOT


def test_scripts_hold_what_shellcheck_asks() -> None:
    """shellcheck finds nothing in any script of the project."""
    if not shutil.which("shellcheck"):
        demand(["shellcheck is missing: run `make kube-packages`."])
    scripts = sorted(str(path) for path in (ROOT / "tools").rglob("*.sh"))
    assert scripts
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
