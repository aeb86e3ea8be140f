"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.program import Program


@pytest.fixture
def alone(tmp_path: Path) -> Program:
    """The program without any server."""
    return Program(tmp_path)
