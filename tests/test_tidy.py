"""House rules as tests."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

from tests.support import ROOT

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 800


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository, generated stubs left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.splitlines()]
    return [
        path
        for path in paths
        if path.suffix in suffixes and "_pb2" not in path.name and path.exists()
    ]


def test_no_root_hides_the_namespace_package() -> None:
    """A raddle/__init__.py in any source root would hide the other roots."""
    for root in ("common", "proto", "scheduler", "agent"):
        assert not (ROOT / root / "raddle" / "__init__.py").exists(), root


def test_files_and_functions_fit() -> None:
    """Files stay under 800 lines and functions under 70."""
    for path in tracked(".py"):
        text = path.read_text()
        assert text.count("\n") <= FILE_LINES_MAX, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                assert lines <= FUNCTION_LINES_MAX, f"{path}: {node.name} has {lines} lines"


def test_modules_and_tests_say_what_they_are() -> None:
    """Every module with code opens with a docstring, and every test has a sentence."""
    for path in tracked(".py"):
        tree = ast.parse(path.read_text())
        if tree.body:
            assert ast.get_docstring(tree), f"{path} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(
                "test_"
            ):
                assert ast.get_docstring(node), f"{path}: {node.name} has no sentence"


def test_reasons_are_members_of_their_lists() -> None:
    """No reason is spelt where it is given: the reference would not know it."""
    for path in tracked(".py"):
        if path.relative_to(ROOT).parts[0] not in ("common", "scheduler", "agent"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_why = isinstance(node, ast.Call) and ast.unparse(node.func) == "Why"
            for given in node.keywords if isinstance(node, ast.Call) and is_why else ():
                spelt = given.arg == "reason" and isinstance(given.value, ast.Constant)
                assert not spelt, f"{path}:{given.lineno} spells a reason"


def test_the_repository_speaks_of_the_project_alone() -> None:
    """No machine paths, no unfinished marks, no addresses in lock files."""
    forbidden = re.compile(r"(?<![\w.])/(?:work|root|home)/\w|\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    for path in tracked(".py", ".md", ".toml", ".yaml", ".proto", ".txt", ".sh"):
        assert forbidden.findall(path.read_text()) == [], path
    for path in (ROOT / "requirements-dev.txt", *(ROOT / "requirements").iterdir()):
        assert "://" not in path.read_text(), path


def test_images_have_the_versions_that_are_tested() -> None:
    """What images pin is what the development environment pins, hashes included."""

    def pins(path: Path) -> set[str]:
        whole = path.read_text().replace("\\\n", "")
        return set(re.sub(r" ; [^\n]*?(?= +--hash)", "", whole).splitlines())

    for path in (ROOT / "requirements").iterdir():
        assert pins(path) <= pins(ROOT / "requirements-dev.txt"), path
