"""Maps, loads and dies as files and options give them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from raddle.core.experts.layout import BoolArray, FloatArray, require_loads
from raddle.core.experts.sources import Bandwidths
from raddle.machines import load_machine
from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import DieState, MapDie, MapDocument
from raddle.wire import expert_loads, expert_maps

MAP_BYTES_MAX = 1_000_000_000
LEVELS = ("die", "npu", "node", "rack")


def _invalid(message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, message)


def machine_dies(machine: str, count: int) -> tuple[MapDie, ...]:
    """The first dies of a machine.

    Raises:
        PermanentError: as `load_machine`, or DOES_NOT_FIT if it has fewer.
    """
    described = load_machine(machine)
    if count > described.dies:
        raise PermanentError(
            Reason.DOES_NOT_FIT,
            f"{described.machine} has {described.dies} dies, not {count}: name another --machine.",
        )
    nodes = [die // described.dies_per_node for die in range(count)]
    return tuple(
        MapDie(npu=die // described.dies_per_npu, node=node, rack=node // described.nodes_per_rack)
        for die, node in enumerate(nodes)
    )


def slots_of(text: str, dies: int) -> tuple[int, ...]:
    """`9`, or one number a die: `9,9,8`."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise _invalid(f"--slots-per-die {text!r}: must be a number, or one a die: 9,9,8.")
    slots = [min(int(part), expert_maps.SLOTS_MAX) for part in parts]
    if len(slots) == 1:
        slots *= dies
    if len(slots) != dies:
        raise _invalid(f"--slots-per-die has {len(slots)} numbers for {dies} dies.")
    if sum(slots) > expert_maps.SLOTS_MAX:
        raise _invalid(f"--slots-per-die makes more than {expert_maps.SLOTS_MAX} slots.")
    return tuple(slots)


def new_document(
    machine: str, dies: int, slots: tuple[int, ...], shared: int, slow: str
) -> MapDocument:
    """An empty map on the first dies of a machine."""
    found = list(machine_dies(machine, dies))
    if shared >= dies:
        raise _invalid(f"--shared-expert-dies {shared} leaves no die of {dies} for experts.")
    for die in range(dies - shared, dies):
        found[die] = replace(found[die], shared=True)
    document = MapDocument(
        physical_to_logical=np.full((1, sum(slots)), -1, dtype=np.int64),
        experts=0,
        slots_per_die=slots,
        dies=tuple(found),
    )
    return _slowed(document, slow)


def read(path: Path, form: str, dies: int, machine: str) -> MapDocument:
    """A map from a file."""
    try:
        if path.stat().st_size > MAP_BYTES_MAX:
            raise _invalid(f"{path} is over {MAP_BYTES_MAX} bytes.")
        text = path.read_text()
    except OSError as error:
        raise PermanentError(Reason.NOT_FOUND, f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _invalid(f"{path} is no text.") from error
    return expert_maps.read_map(text, form, machine_dies(machine, dies) if dies else ())


def write(path: Path, document: MapDocument, form: str) -> None:
    text = expert_maps.write_map(document, form)
    try:
        path.write_text(text)
    except OSError as error:
        raise _invalid(f"{path}: {error.strerror}.") from error


def read_loads(path: Path) -> FloatArray:
    return require_loads(expert_loads.read_loads(path), str(path))


def bandwidths(machine: str, expert_bytes: int) -> Bandwidths:
    """What the machine says of its links; weights on disk come from the object store."""
    described = load_machine(machine)
    return Bandwidths(
        expert_bytes=expert_bytes,
        peer_bytes_per_s=described.die_to_die_bytes_per_s,
        pool_bytes_per_s=described.die_to_host_bytes_per_s,
        disk_bytes_per_s=described.bucket_bytes_per_s,
    )


def changed(
    document: MapDocument, *, lost: str, drained: str, joined: str, slow: str
) -> tuple[MapDocument, BoolArray]:
    """The dies after a fault, and which are new. The table is left as it is."""
    dies = list(document.dies)
    for option, text, state in (
        ("--lost", lost, DieState.LOST),
        ("--drained", drained, DieState.DRAINED),
        ("--joined", joined, DieState.LIVE),
    ):
        for die in (die for _, found in _subjects(document, text, option) for die in found):
            dies[die] = replace(dies[die], state=state)
    fresh = np.zeros(len(dies), dtype=bool)
    for die, old in enumerate(document.dies):
        fresh[die] = dies[die].state is DieState.LIVE and old.state is not DieState.LIVE
    return _slowed(replace(document, dies=tuple(dies)), slow), fresh


def _slowed(document: MapDocument, slow: str) -> MapDocument:
    dies = list(document.dies)
    for part in filter(None, slow.split(",")):
        subject, _, text = part.partition("=")
        try:
            speed = float(text)
        except ValueError:
            speed = 0.0
        if not 0 < speed <= 1:
            raise _invalid(f"--slow {part!r}: write die:3=0.5, a speed above 0 and at most 1.")
        for _, found in _subjects(document, subject, "--slow"):
            for die in found:
                dies[die] = replace(dies[die], speed=speed)
    return replace(document, dies=tuple(dies))


def _subjects(document: MapDocument, text: str, option: str) -> Iterator[tuple[str, list[int]]]:
    """The dies of each part of `die:17,npu:3,node:2`."""
    for part in filter(None, (item.strip() for item in text.split(","))):
        level, _, number = part.partition(":")
        if level not in LEVELS or not (number.isascii() and number.isdigit()):
            raise _invalid(f"{option} {part!r}: write {', '.join(f'{x}:N' for x in LEVELS)}.")
        wanted = int(number)
        found = [
            die
            for die, at in enumerate(document.dies)
            if wanted == {"die": die, "npu": at.npu, "node": at.node, "rack": at.rack}[level]
        ]
        if not found:
            raise PermanentError(
                Reason.NOT_FOUND,
                f"{option} {part}: the map has no such {level}; its {len(document.dies)} dies are"
                f" numbered from 0.",
            )
        yield part, found
