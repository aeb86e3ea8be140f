"""Models whose `config.json` comes with the project: names and texts."""

from __future__ import annotations

from importlib import resources


def names() -> tuple[str, ...]:
    """Names of the built-in models."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


def config_text(name: str) -> str:
    """The config.json of a built-in model; KeyError for another name."""
    if name not in names():
        raise KeyError(name)
    return (resources.files(__name__) / f"{name}.json").read_text()
