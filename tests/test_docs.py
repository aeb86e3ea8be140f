"""The reference is complete and up to date, and pages are found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.test_tidy import tracked

LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PAGES = tracked(".md")


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


def targets(page: Path) -> set[Path]:
    """Files that a page links to."""
    links = LINK.findall(page.read_text())
    return {(page.parent / link).resolve() for link in links if "://" not in link}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_leads_nowhere(page: Path) -> None:
    """What a page points to in the checkout is there."""
    assert [str(path) for path in sorted(targets(page)) if not path.exists()] == []


def test_the_index_has_every_page() -> None:
    """Whoever looks for a page of docs finds it in docs/README.md."""
    index = ROOT / "docs" / "README.md"
    pages = set((ROOT / "docs").rglob("*.md")) - {index}
    assert pages - targets(index) == set()
