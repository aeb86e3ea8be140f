"""Texts that a generator of this folder keeps in the checkout; `--check` only compares."""

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_or_check(folder: Path, texts: Mapping[str, str]) -> None:
    """Bring the folder's files up to date, or exit with the names of those that are not."""
    old = [
        name
        for name, text in texts.items()
        if not (folder / name).exists() or (folder / name).read_text() != text
    ]
    if "--check" not in sys.argv:
        for name in old:
            (folder / name).write_text(texts[name])
    elif old:
        where = folder.relative_to(ROOT)
        sys.exit(f"{where} is out of date: {', '.join(old)}; run `make docs`")
