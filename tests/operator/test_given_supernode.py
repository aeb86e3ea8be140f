"""The file with the machine of a release, as the operator reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raddle.model.errors import PermanentError
from raddle.operator.main import read_supernode


def test_a_supernode_is_read_as_it_is(tmp_path: Path) -> None:
    """What the chart writes is what is applied."""
    file = tmp_path / "supernode.yaml"
    file.write_text("kind: SuperNode\nmetadata: {name: sn0}\nspec: {machine: nvl72}\n")
    assert read_supernode(str(file)) == {
        "kind": "SuperNode",
        "metadata": {"name": "sn0"},
        "spec": {"machine": "nvl72"},
    }


@pytest.mark.parametrize(
    "text", ["[]", "kind: Pod\nmetadata: {name: a}", "kind: SuperNode", "a: b: c"]
)
def test_other_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    """No mapping, another kind, no name and no YAML end with the file's name."""
    file = tmp_path / "supernode.yaml"
    file.write_text(text)
    with pytest.raises(PermanentError, match=r"supernode\.yaml"):
        read_supernode(str(file))
    with pytest.raises(PermanentError, match="nowhere"):
        read_supernode(str(tmp_path / "nowhere"))
