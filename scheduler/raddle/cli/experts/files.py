"""Maps, loads and dies as files and options give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from raddle.core.experts.layout import BoolArray, FloatArray, require_loads
from raddle.core.experts.sources import Bandwidths
from raddle.machines import load_machine
from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import DieState, MapDie, MapDocument
from raddle.wire import expert_loads, expert_maps
from raddle.wire.engine_expert_maps import SLOTS_MAX

MAP_BYTES_MAX = 1_000_000_000
LEVELS = ("die", "npu", "node", "rack")
_DIGITS_MAX = 9


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
    # Python refuses to turn endless digits into a number.
    if not all(part.isascii() and part.isdigit() and len(part) <= _DIGITS_MAX for part in parts):
        raise _invalid(f"--slots-per-die {text!r}: must be a number, or one a die: 9,9,8.")
    slots = [min(int(part), SLOTS_MAX) for part in parts]
    if len(slots) == 1:
        slots *= dies
    if len(slots) != dies:
        raise _invalid(f"--slots-per-die has {len(slots)} numbers for {dies} dies.")
    if sum(slots) > SLOTS_MAX:
        raise _invalid(f"--slots-per-die makes more than {SLOTS_MAX} slots.")
    return tuple(slots)


def new_document(
    machine: str, dies: int, slots: tuple[int, ...], shared: int, slow: Sequence[str]
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
    """A map from a file in which nothing is wrong."""
    document = expert_maps.read_map(_text(path), form, machine_dies(machine, dies) if dies else ())
    return _on_machine(document, form, dies, machine)


def inspect(path: Path, form: str, dies: int, machine: str) -> expert_maps.MapReading:
    """A map from a file, with what is wrong with it."""
    given = machine_dies(machine, dies) if dies else ()
    reading = expert_maps.inspect_map(_text(path), form, given)
    return replace(reading, document=_on_machine(reading.document, form, dies, machine))


def _on_machine(document: MapDocument, form: str, dies: int, machine: str) -> MapDocument:
    """A vllm-ascend map says itself how many dies it has: they are the machine's first."""
    if dies or form == "raddle":
        return document
    return replace(document, dies=machine_dies(machine, len(document.dies)))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAP_BYTES_MAX:
            raise _invalid(f"{path} is over {MAP_BYTES_MAX} bytes.")
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise PermanentError(Reason.NOT_FOUND, f"{path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise _invalid(f"{path} is no text.") from error


def write(path: Path, document: MapDocument, form: str, *, compact: bool = False) -> None:
    """Write a map; `compact` leaves out the dies that hold no routed experts."""
    if compact:
        document = expert_maps.compacted(document)
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
    document: MapDocument,
    *,
    lost: Sequence[str],
    drained: Sequence[str],
    joined: Sequence[str],
    slow: Sequence[str],
) -> tuple[MapDocument, BoolArray]:
    """The dies after a fault, and which have nothing in memory. The table is left as it is."""
    dies = list(document.dies)
    fresh = np.zeros(len(dies), dtype=bool)
    named: dict[int, str] = {}
    for option, texts, state in (
        ("--lost", lost, DieState.LOST),
        ("--drained", drained, DieState.DRAINED),
        ("--joined", joined, DieState.LIVE),
    ):
        for die in _named_dies(document, texts, option):
            if named.setdefault(die, option) != option:
                raise _invalid(f"die {die} is in {named[die]} and in {option}: name it in one.")
            dies[die] = replace(dies[die], state=state)
            fresh[die] = state is DieState.LIVE
    return _slowed(replace(document, dies=tuple(dies)), slow), fresh


def _slowed(document: MapDocument, slow: Sequence[str]) -> MapDocument:
    speeds: dict[int, float] = {}
    for part in _parts(slow, "--slow"):
        subject, _, text = part.partition("=")
        try:
            speed = float(text)
        except ValueError:
            speed = 0.0
        if not expert_maps.SPEED_MIN <= speed <= 1:
            least = expert_maps.SPEED_MIN
            raise _invalid(f"--slow {part!r}: write die:3=0.5, a speed from {least:g} to 1.")
        for die in _subject(document, subject, "--slow"):
            if speeds.setdefault(die, speed) != speed:
                raise _invalid(f"--slow: die {die} has two speeds, {speeds[die]:g} and {speed:g}.")
    dies = [
        replace(die, speed=speeds.get(number, die.speed))
        for number, die in enumerate(document.dies)
    ]
    return replace(document, dies=tuple(dies))


def _named_dies(document: MapDocument, texts: Sequence[str], option: str) -> set[int]:
    """The dies of all of `die:17,npu:3`, `node:2`."""
    parts = _parts(texts, option)
    return {die for part in parts for die in _subject(document, part, option)}


def _parts(texts: Sequence[str], option: str) -> list[str]:
    """What stands between the commas; an option that names nothing is a mistake of a script."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if "" in parts:
        raise _invalid(f"{option}: a name is empty; leave the option out if nothing is meant.")
    return parts


def _subject(document: MapDocument, part: str, option: str) -> list[int]:
    """The dies of `die:17` or `node:2`."""
    level, _, number = part.partition(":")
    if level not in LEVELS or not (number.isascii() and number.isdigit()):
        raise _invalid(f"{option} {part!r}: write {', '.join(f'{x}:N' for x in LEVELS)}.")
    # Compared as text: nothing is too long for that.
    wanted = number.lstrip("0") or "0"
    found = [
        die
        for die, at in enumerate(document.dies)
        if wanted == str({"die": die, "npu": at.npu, "node": at.node, "rack": at.rack}[level])
    ]
    if not found:
        raise PermanentError(
            Reason.NOT_FOUND,
            f"{option} {part}: the map has no such {level}; its {len(document.dies)} dies are"
            f" numbered from 0.",
        )
    return found
