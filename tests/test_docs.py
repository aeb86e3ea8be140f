"""The reference is complete and up to date."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT


def test_the_reference_is_what_the_generator_writes() -> None:
    """docs/reference is generated from the protos and the command line, and is not stale."""
    command = [sys.executable, "tools/docs/reference.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_command_has_help_with_an_example() -> None:
    """Each command of the reference says what it does and shows how."""
    text = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for part in text.split("\n## ")[1:]:
        name = part.split("`")[1]
        if name in ("raddle", "raddle config"):
            continue
        assert "Example" in part, f"{name} has no example"
