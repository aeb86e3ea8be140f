"""Expert maps as files: our own format, and those of engines.

In goes JSON text, out comes a `MapDocument` with all that is wrong with the file, and back. Formats
of engines do not say on which dies the slots are: the caller does. What one of them cannot say is
refused, never guessed.

Our own, version 1: `{"format": "raddle-expert-map", "version": 1, "experts": E, "slots_per_die":
S or [S of each die], "dies": [{"die": 0, "npu": 0, "node": 0, "rack": 0}, ...],
"physical_to_logical": [layers][slots]}`; a die may also have `state` (live, lost, drained),
`shared` and `speed`. Fields that a reader does not know are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import DieState, MapDie, MapDocument
from raddle.wire.engine_expert_maps import (
    DIES_MAX,
    EMPTY,
    EXPERTS_MAX,
    READERS,
    SLOTS_MAX,
    WHOLE_FILE,
    WRITERS,
    Layers,
    invalid,
    layers_of,
)

FORMAT = "raddle-expert-map"
VERSION = 1
# Dies beyond these speeds are not slow or fast, but broken or a mistake; times stay finite.
SPEED_MIN, SPEED_MAX = 0.001, 1_000.0
FORMATS = ("raddle", *WRITERS)
_DIE_FIELDS = {"die", "npu", "node", "rack", "state", "shared", "speed"}
_FIELDS = {"format", "version", "experts", "slots_per_die", "dies", "physical_to_logical"}


@dataclass(frozen=True, slots=True)
class MapReading:
    """A map file with all that is wrong with it; layers that cannot be laid out are left out."""

    document: MapDocument
    #: The number in the file of each layer of the document.
    layers: tuple[int, ...]
    #: One sentence each, in the order of the layers.
    defects: tuple[str, ...]


def read_map(text: str, form: str, dies: Sequence[MapDie] = ()) -> MapDocument:
    """Read a map file in which nothing is wrong.

    Args:
        form: one of `FORMATS`.
        dies: for the formats of engines: the dies that the slots are spread over evenly. Empty:
            vllm-ascend says how many there are and each is alone in its domains; others fail.

    Raises:
        PermanentError: INVALID_ARGUMENT with what is wrong and what to do.
    """
    reading = inspect_map(text, form, dies)
    if reading.defects:
        more = len(reading.defects) - 1
        rest = f"; {more} more: `raddle experts check` names them" if more else ""
        raise invalid(f"{reading.defects[0]}{rest}.")
    return reading.document


def inspect_map(text: str, form: str, dies: Sequence[MapDie] = ()) -> MapReading:
    """Read a map file and name what is wrong with it.

    Args:
        form: as for `read_map`.
        dies: as for `read_map`.

    Raises:
        PermanentError: INVALID_ARGUMENT if nothing can be laid out at all.
    """
    _require_form(form)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the map is no JSON: {error}.") from error
    if not isinstance(document, dict):
        raise invalid("the map must be a JSON object.")
    if form == "raddle":
        found = _layers_of_raddle(document)
        read = _read_raddle(document, found)
        found.defects += _nesting_faults(read.dies)
    else:
        found = READERS[form](document)
        read = _on_dies(found, form, tuple(dies))
    found.defects.sort(key=lambda defect: defect[0])
    defects = (
        text if layer == WHOLE_FILE else f"layer {layer}: {text}" for layer, text in found.defects
    )
    return MapReading(read, found.numbers, tuple(defects))


def write_map(document: MapDocument, form: str) -> str:
    """The text of a map file.

    Raises:
        PermanentError: INVALID_ARGUMENT if the format has no word for what the map holds.
    """
    _require_form(form)
    table = document.physical_to_logical
    if ((table < EMPTY) | (table >= document.experts)).any():
        raise invalid("the map holds experts that do not exist: `raddle experts check` names them.")
    if form == "raddle":
        found = _write_raddle(document)
    else:
        _require_words(document, form)
        found = WRITERS[form](document)
    return json.dumps(found, separators=(",", ":")) + "\n"


def _require_words(document: MapDocument, form: str) -> None:
    """Refuse what the format of an engine cannot say."""
    if form != "vllm":
        _require_full(document, form)
    if len(set(document.slots_per_die)) > 1:
        raise invalid(f"the {form} format wants equally many slots a die.")


def _require_full(document: MapDocument, form: str) -> None:
    """Refuse empty slots, and say what to do."""
    empty = document.physical_to_logical < 0
    if not empty.any():
        return
    idle = np.repeat(np.logical_not(_hosts(document)), document.slots_per_die)
    is_alive = bool(empty[:, ~idle].any())
    layer, slot = np.argwhere(empty & ~idle if is_alive else empty)[0].tolist()
    die = int(np.repeat(np.arange(len(document.dies)), document.slots_per_die)[slot])
    what = f"the {form} format has no empty slots, but layer {layer}, slot {slot} is -1 (die {die})"
    if is_alive:
        raise invalid(f"{what}, which is alive: write the raddle or the vllm format.")
    raise invalid(
        f"{what}: leave out the dies that hold nothing and number the others anew (`raddle experts"
        " repair` and `convert` do with --compact), or write the raddle or the vllm format (--to)."
    )


def _hosts(document: MapDocument) -> list[bool]:
    """[dies] which may hold routed experts."""
    return [die.state is DieState.LIVE and not die.shared for die in document.dies]


def compacted(document: MapDocument) -> MapDocument:
    """The map without the dies that hold no routed experts; the others are numbered anew.

    Raises:
        PermanentError: DOES_NOT_FIT if no die is left.
    """
    keep = _hosts(document)
    if not any(keep):
        raise PermanentError(Reason.DOES_NOT_FIT, "no die is left to hold experts.")
    slots = np.repeat(keep, document.slots_per_die)
    return replace(
        document,
        physical_to_logical=document.physical_to_logical[:, slots],
        slots_per_die=tuple(
            n for n, kept in zip(document.slots_per_die, keep, strict=True) if kept
        ),
        dies=tuple(die for die, kept in zip(document.dies, keep, strict=True) if kept),
    )


def _require_form(form: str) -> None:
    if form not in FORMATS:
        raise invalid(f"map format {form!r} is unknown; use {', '.join(FORMATS)}.")


# --- engines -------------------------------------------------------------------------------------


def _on_dies(found: Layers, form: str, dies: tuple[MapDie, ...]) -> MapDocument:
    """An engine's layers on the dies of the caller."""
    if not dies and found.dies is not None:
        dies = tuple(MapDie(npu=die, node=die, rack=die) for die in range(found.dies))
    if not dies:
        raise invalid(f"a {form} map does not say on which dies its slots are: pass --dies.")
    if found.dies not in (None, len(dies)):
        raise invalid(f"the map has a device_count of {found.dies}, but --dies is {len(dies)}.")
    slots = found.table.shape[1]
    if slots % len(dies):
        raise invalid(f"{slots} slots do not spread evenly over {len(dies)} dies.")
    if form == "vllm" and len(found.table):
        # vLLM has no other word for a die that is lost.
        dead = (found.table == EMPTY).reshape(len(found.table), len(dies), -1).all(axis=(0, 2))
        dies = tuple(
            replace(die, state=DieState.LOST) if gone else die
            for die, gone in zip(dies, dead.tolist(), strict=True)
        )
    guessed = int(found.table.max(initial=0)) + 1
    return MapDocument(
        physical_to_logical=found.table,
        experts=_require_experts(guessed if found.experts is None else found.experts),
        slots_per_die=(slots // len(dies),) * len(dies),
        dies=dies,
        experts_stated=found.experts is not None,
    )


def _require_experts(experts: Any) -> int:
    if type(experts) is not int or not 0 < experts <= EXPERTS_MAX:
        raise invalid(f"experts must be a whole number from 1 to {EXPERTS_MAX}.")
    return experts


# --- our own -------------------------------------------------------------------------------------


def _layers_of_raddle(document: Mapping[str, Any]) -> Layers:
    for field in ("physical_to_logical", "slots_per_die", "dies"):
        if field not in document:
            raise invalid(
                f"the map has no {field}: a map of another format needs --map-format"
                f" ({', '.join(FORMATS[1:])})."
            )
    unknown = sorted(set(document) - _FIELDS)
    if unknown:
        raise PermanentError(Reason.UNKNOWN_FIELD, f"the map has unknown fields: {unknown}.")
    version = document.get("version", VERSION)
    # JSON's true equals 1 in Python.
    if document.get("format", FORMAT) != FORMAT or version is True or version != VERSION:
        raise invalid(
            f"the map is {document.get('format')!r} version {document.get('version')!r};"
            f" this program reads {FORMAT} version {VERSION}."
        )
    return layers_of(document["physical_to_logical"], "physical_to_logical")


def _read_raddle(document: Mapping[str, Any], found: Layers) -> MapDocument:
    dies = _dies(document["dies"])
    slots = _slots(document["slots_per_die"], len(dies))
    if sum(slots) != found.table.shape[1]:
        raise invalid(
            f"physical_to_logical has {found.table.shape[1]} slots a layer, slots_per_die and dies"
            f" make {sum(slots)}."
        )
    guessed = int(found.table.max(initial=0)) + 1
    return MapDocument(
        physical_to_logical=found.table,
        experts=_require_experts(document.get("experts", guessed)),
        slots_per_die=slots,
        dies=dies,
        experts_stated="experts" in document,
    )


def _nesting_faults(dies: Sequence[MapDie]) -> list[tuple[int, str]]:
    """NPUs in two nodes and nodes in two racks: numbers count over the whole machine."""
    found: list[tuple[int, str]] = []
    for inner, outer in (("npu", "node"), ("node", "rack")):
        parents: dict[int, list[int]] = {}
        for die in dies:
            known = parents.setdefault(getattr(die, inner), [])
            if getattr(die, outer) not in known:
                known.append(getattr(die, outer))
        found += [
            (WHOLE_FILE, f"{inner} {number} is in {outer}s {', '.join(map(str, sorted(known)))}")
            for number, known in sorted(parents.items())
            if len(known) > 1
        ]
    return found


def _slots(value: Any, dies: int) -> tuple[int, ...]:
    slots = value if isinstance(value, list) else [value] * dies
    if len(slots) != dies:
        raise invalid(f"slots_per_die has {len(slots)} numbers for {dies} dies.")
    if not all(type(number) is int and 0 <= number <= SLOTS_MAX for number in slots):
        raise invalid("slots_per_die must hold whole numbers that are not negative.")
    return tuple(slots)


def _dies(value: Any) -> tuple[MapDie, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= DIES_MAX:
        raise invalid(f"dies must be a list of 1 to {DIES_MAX} dies with their domains.")
    return tuple(_die(number, item) for number, item in enumerate(value))


def _die(number: int, item: Any) -> MapDie:
    path = f"dies[{number}]"
    if not isinstance(item, dict):
        raise invalid(f"{path}: must be an object with npu, node and rack.")
    unknown = sorted(set(item) - _DIE_FIELDS)
    if unknown:
        raise PermanentError(Reason.UNKNOWN_FIELD, f"{path} has unknown fields: {unknown}.")
    if item.get("die", number) != number:
        raise invalid(
            f"{path}: is die {item['die']!r}; dies must be in the order of their numbers."
        )
    state, shared, speed = (
        item.get("state", "live"),
        item.get("shared", False),
        item.get("speed", 1),
    )
    if state not in set(DieState):
        raise invalid(f"{path}.state: must be one of {', '.join(DieState)}.")
    if type(shared) is not bool:
        raise invalid(f"{path}.shared: must be true or false.")
    if type(speed) not in (int, float) or not SPEED_MIN <= speed <= SPEED_MAX:
        raise invalid(f"{path}.speed: must be a number from {SPEED_MIN:g} to {SPEED_MAX:g}.")
    npu, node, rack = (_domain(item, path, level) for level in ("npu", "node", "rack"))
    return MapDie(
        npu=npu, node=node, rack=rack, state=DieState(state), shared=shared, speed=float(speed)
    )


def _domain(item: Mapping[str, Any], path: str, level: str) -> int:
    number = item.get(level)
    if type(number) is not int or not 0 <= number <= DIES_MAX:
        raise invalid(f"{path}.{level}: must be a whole number from 0 on.")
    return number


def _write_raddle(document: MapDocument) -> dict[str, Any]:
    slots = document.slots_per_die
    return {
        "format": FORMAT,
        "version": VERSION,
        "experts": document.experts,
        "slots_per_die": slots[0] if len(set(slots)) == 1 else list(slots),
        "dies": [_die_fields(number, die) for number, die in enumerate(document.dies)],
        "physical_to_logical": document.physical_to_logical.tolist(),
    }


def _die_fields(number: int, die: MapDie) -> dict[str, Any]:
    found: dict[str, Any] = {"die": number, "npu": die.npu, "node": die.node, "rack": die.rack}
    if die.state is not DieState.LIVE:
        found["state"] = str(die.state)
    if die.shared:
        found["shared"] = True
    if die.speed != 1.0:
        found["speed"] = die.speed
    return found
