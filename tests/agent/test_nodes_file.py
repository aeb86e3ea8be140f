"""The file that says which nodes an agent serves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raddle.agent.nodes_file import NodesFile, parse_nodes

KNOWN = {"sn0/n00", "sn0/n01", "sn0/n02"}


def nodes_file(path: Path) -> NodesFile:
    return NodesFile(path, KNOWN, "small")


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", ()),
        ("\n", ()),
        ("sn0/n00", ("sn0/n00",)),
        ("sn0/n01, sn0/n00\n", ("sn0/n01", "sn0/n00")),
        ("sn0/n00\nsn0/n01\n,\nsn0/n00", ("sn0/n00", "sn0/n01")),
    ],
)
def test_nodes_are_separated_by_commas_blanks_and_lines(text: str, nodes: tuple[str, ...]) -> None:
    """Each node counts once, in the order of the file."""
    assert parse_nodes(text) == nodes


def test_a_file_that_is_not_there_names_no_node(tmp_path: Path) -> None:
    """No node is served until the file is there, and none when it is gone again."""
    file = nodes_file(tmp_path / "nodes")
    file.look()
    assert not file.nodes
    assert "is not there" in file.trouble
    (tmp_path / "nodes").write_text("sn0/n01")
    file.look()
    assert (file.nodes, file.trouble) == (("sn0/n01",), "")
    (tmp_path / "nodes").unlink()
    file.look()
    assert not file.nodes
    assert "is not there" in file.trouble


def test_an_empty_file_is_no_trouble(tmp_path: Path) -> None:
    """A machine that shall serve no node is told so by an empty file."""
    (tmp_path / "nodes").touch()
    file = nodes_file(tmp_path / "nodes")
    file.look()
    assert (file.nodes, file.trouble) == ((), "")


@pytest.mark.parametrize("bad", ["sn0/n00,sn0/n77", "\xff\xfe", "sn0/n00;sn0/n01"])
def test_a_wrong_file_changes_nothing(tmp_path: Path, bad: str) -> None:
    """A node that the machine does not have is named, and the nodes of before stay."""
    path = tmp_path / "nodes"
    path.write_text("sn0/n00")
    file = nodes_file(path)
    file.look()
    _swap(path, bad)
    file.look()
    assert file.nodes == ("sn0/n00",)
    assert "is no node of machine small" in file.trouble
    _swap(path, "sn0/n02")
    file.look()
    assert (file.nodes, file.trouble) == (("sn0/n02",), "")


def _swap(path: Path, text: str) -> None:
    """Another file in its place, as careful writers do it."""
    new = path.with_suffix(".new")
    new.write_bytes(text.encode("latin-1"))
    new.replace(path)


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    """What cannot be read is told, and looked at again."""
    path = tmp_path / "nodes"
    path.mkdir()
    file = nodes_file(path)
    file.look()
    assert "cannot be read" in file.trouble
    path.rmdir()
    path.write_text("sn0/n00")
    file.look()
    assert (file.nodes, file.trouble) == (("sn0/n00",), "")


def test_a_swapped_volume_is_followed(tmp_path: Path) -> None:
    """The file is a link into a folder behind a link that is renamed over, all of one size."""
    for number, text in enumerate(("sn0/n00", "sn0/n01")):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "k8s-a").write_text(text)
        os.utime(tmp_path / f"..{number}" / "k8s-a", (0, 0))
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "k8s-a").symlink_to("..data/k8s-a")
    file = nodes_file(tmp_path / "k8s-a")
    file.look()
    assert file.nodes == ("sn0/n00",)
    (tmp_path / "..new").symlink_to("..1")
    (tmp_path / "..new").replace(tmp_path / "..data")
    file.look()
    assert file.nodes == ("sn0/n01",)
