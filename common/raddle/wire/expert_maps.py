"""Expert maps as files: our own format, and those of SGLang, vLLM, vllm-ascend and DeepSeek.

In goes JSON text, out comes a `MapDocument`, and back. Formats of others do not say on which dies
the slots are: the caller does. What an engine's format cannot say (an empty slot, in all but
vLLM's) is refused, never guessed: their loaders would take -1 for the last expert.

Our own, version 1: `{"format": "raddle-expert-map", "version": 1, "experts": E, "slots_per_die":
S or [S of each die], "dies": [{"die": 0, "npu": 0, "node": 0, "rack": 0}, ...],
"physical_to_logical": [layers][slots]}`; a die may also have `state` (live, lost, drained),
`shared` and `speed`. Fields that a reader does not know are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import DieState, MapDie, MapDocument

IntArray = npt.NDArray[np.int64]

FORMAT = "raddle-expert-map"
VERSION = 1
EMPTY = -1
# A supernode has at most this many dies, a model that many experts and layers.
DIES_MAX = 65_536
SLOTS_MAX = 1_000_000
EXPERTS_MAX = 65_536
_DIE_FIELDS = {"die", "npu", "node", "rack", "state", "shared", "speed"}
_FIELDS = {"format", "version", "experts", "slots_per_die", "dies", "physical_to_logical"}


def invalid(message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, message)


def whole_numbers(value: Any, path: str) -> IntArray:
    """A list of equally long lists of whole numbers as an array.

    Raises:
        PermanentError: INVALID_ARGUMENT for anything else, naming the row.
    """
    if not isinstance(value, list) or not value:
        raise invalid(f"{path}: must be a list of layers, [layers][slots], and not empty.")
    for number, row in enumerate(value):
        if not isinstance(row, list):
            raise invalid(f"{path}: must be two-dimensional, but layer {number} is no list.")
        if len(row) != len(value[0]) or not row:
            raise invalid(
                f"{path}: ragged, layer {number} has {len(row)} slots, layer 0 has {len(value[0])}."
            )
        if not all(type(item) is int for item in row):
            raise invalid(f"{path}: layer {number} holds something that is no whole number.")
        if max(row) > EXPERTS_MAX or min(row) < -EXPERTS_MAX:
            raise invalid(f"{path}: layer {number} holds a number beyond {EXPERTS_MAX}.")
    return np.array(value, dtype=np.int64)


def read_map(text: str, form: str, dies: Sequence[MapDie] = ()) -> MapDocument:
    """Read a map file.

    Args:
        form: one of `FORMATS`.
        dies: for the formats of others: the dies that the slots are spread over evenly. Empty:
            vllm-ascend says how many there are and each is alone in its domains; others fail.

    Raises:
        PermanentError: INVALID_ARGUMENT with what is wrong and what to do.
    """
    _require_form(form)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the map is no JSON: {error}.") from error
    if not isinstance(document, dict):
        raise invalid("the map must be a JSON object.")
    if form == "raddle":
        return _read_raddle(document)
    table = _TABLES[form](document)
    if not dies:
        raise invalid(f"a {form} map does not say on which dies its slots are: pass --dies.")
    if table.shape[1] % len(dies):
        raise invalid(f"{table.shape[1]} slots do not spread evenly over {len(dies)} dies.")
    return MapDocument(
        physical_to_logical=table,
        experts=int(table.max(initial=-1)) + 1,
        slots_per_die=(table.shape[1] // len(dies),) * len(dies),
        dies=tuple(dies),
    )


def write_map(document: MapDocument, form: str) -> str:
    """The text of a map file.

    Raises:
        PermanentError: INVALID_ARGUMENT if the format has no word for what the map holds.
    """
    _require_form(form)
    table = document.physical_to_logical
    if ((table < EMPTY) | (table >= document.experts)).any():
        raise invalid("the map holds experts that do not exist: `raddle experts check` names them.")
    if form not in ("raddle", "vllm"):
        empty = np.argwhere(table < 0)
        if len(empty):
            layer, slot = empty[0].tolist()
            raise invalid(
                f"the {form} format has no empty slots, but layer {layer}, slot {slot} is -1:"
                " write the vllm format, or place the map anew on the dies that are left."
            )
    if form != "raddle" and len(set(document.slots_per_die)) > 1:
        raise invalid(f"the {form} format wants equally many slots a die.")
    return json.dumps(_WRITERS[form](document), separators=(",", ":")) + "\n"


def _require_form(form: str) -> None:
    if form not in FORMATS:
        raise invalid(f"map format {form!r} is unknown; use {', '.join(FORMATS)}.")


# --- our own -------------------------------------------------------------------------------------


def _read_raddle(document: Mapping[str, Any]) -> MapDocument:
    for field in ("physical_to_logical", "slots_per_die", "dies"):
        if field not in document:
            raise invalid(
                f"the map has no {field}: a map of another format needs --map-format"
                f" ({', '.join(FORMATS[1:])})."
            )
    unknown = sorted(set(document) - _FIELDS)
    if unknown:
        raise PermanentError(Reason.UNKNOWN_FIELD, f"the map has unknown fields: {unknown}.")
    if document.get("format", FORMAT) != FORMAT or document.get("version", VERSION) != VERSION:
        raise invalid(
            f"the map is {document.get('format')!r} version {document.get('version')!r};"
            f" this program reads {FORMAT} version {VERSION}."
        )
    table = whole_numbers(document["physical_to_logical"], "physical_to_logical")
    dies = _dies(document["dies"])
    slots = _slots(document["slots_per_die"], len(dies))
    if sum(slots) != table.shape[1]:
        raise invalid(
            f"physical_to_logical has {table.shape[1]} slots a layer, slots_per_die and dies"
            f" make {sum(slots)}."
        )
    experts = document.get("experts", int(table.max(initial=-1)) + 1)
    if type(experts) is not int or not 0 < experts <= EXPERTS_MAX:
        raise invalid(f"experts must be a whole number from 1 to {EXPERTS_MAX}.")
    return MapDocument(physical_to_logical=table, experts=experts, slots_per_die=slots, dies=dies)


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
    if type(speed) not in (int, float) or not 0 < speed <= 1_000:  # noqa: PLR2004 - a sane factor
        raise invalid(f"{path}.speed: must be a number above 0.")
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


# --- others --------------------------------------------------------------------------------------


def _table(field: str, *, empty: bool = False) -> Callable[[Mapping[str, Any]], IntArray]:
    """A reader of the format whose table is in this field."""

    def read(document: Mapping[str, Any]) -> IntArray:
        if field not in document:
            raise invalid(f"the map has no {field}.")
        table = whole_numbers(document[field], field)
        if (table < (EMPTY if empty else 0)).any():
            layer, slot = np.argwhere(table < (EMPTY if empty else 0))[0].tolist()
            raise invalid(f"{field}: layer {layer}, slot {slot} holds {table[layer, slot]}.")
        return table

    return read


def _read_ascend(document: Mapping[str, Any]) -> IntArray:
    """`expert_map.json`: the order in `device_expert` is the order of a device's slots."""
    layers = document.get("layer_list")
    if not isinstance(layers, list) or document.get("moe_layer_count") != len(layers):
        raise invalid("layer_list must be a list of moe_layer_count layers.")
    rows: list[list[int]] = []
    for number, layer in enumerate(layers):
        path = f"layer_list[{number}]"
        devices = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(devices, list) or layer.get("device_count") != len(devices):
            raise invalid(f"{path}.device_list must be a list of device_count devices.")
        if layer.get("layer_id") != number:
            raise invalid(f"{path}.layer_id is {layer.get('layer_id')!r}, not {number}.")
        row: list[int] = []
        for place, device in enumerate(devices):
            if not isinstance(device, dict) or device.get("device_id") != place:
                raise invalid(f"{path}.device_list[{place}] is not device_id {place}.")
            experts = device.get("device_expert")
            if not isinstance(experts, list) or len(experts) * len(devices) > SLOTS_MAX:
                raise invalid(f"{path}.device_list[{place}].device_expert must be a list.")
            if len(experts) * place != len(row):
                raise invalid(
                    f"{path}: device {place} has {len(experts)} slots, others have more or fewer."
                )
            row += experts
        rows.append(row)
    return whole_numbers(rows, "layer_list")


def _write_ascend(document: MapDocument) -> dict[str, Any]:
    width, dies = document.slots_per_die[0], len(document.dies)
    return {
        "moe_layer_count": len(document.physical_to_logical),
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": dies,
                "device_list": [
                    {"device_id": die, "device_expert": row[die * width : (die + 1) * width]}
                    for die in range(dies)
                ],
            }
            for layer, row in enumerate(document.physical_to_logical.tolist())
        ],
    }


def _write_sglang(document: MapDocument) -> dict[str, Any]:
    # The loader takes every key as an argument: one more would stop it.
    return {"physical_to_logical_map": document.physical_to_logical.tolist()}


def _write_vllm(document: MapDocument) -> dict[str, Any]:
    logical, counts = inverted(document.physical_to_logical, document.experts)
    return {
        "physical_to_logical_map": document.physical_to_logical.tolist(),
        "logical_to_physical_map": logical.tolist(),
        "logical_replica_count": counts.tolist(),
    }


def _write_deepseek(document: MapDocument) -> dict[str, Any]:
    logical, counts = inverted(document.physical_to_logical, document.experts)
    return {
        "phy2log": document.physical_to_logical.tolist(),
        "log2phy": logical.tolist(),
        "logcnt": counts.tolist(),
    }


def inverted(table: IntArray, experts: int) -> tuple[IntArray, IntArray]:
    """Slots of each expert [layers, experts, most copies] padded with -1, and how many."""
    layer, slot = np.nonzero(table >= 0)
    pair = layer * experts + table[layer, slot]
    order = np.argsort(pair, kind="stable")
    pair, slot = pair[order], slot[order]
    counts = np.bincount(pair, minlength=len(table) * experts)
    number = np.arange(len(pair)) - (np.cumsum(counts) - counts)[pair]
    found = np.full((len(counts), int(counts.max(initial=0))), EMPTY, dtype=np.int64)
    found[pair, number] = slot
    shape = (len(table), experts)
    return found.reshape(*shape, -1), counts.reshape(shape)


_TABLES: dict[str, Callable[[Mapping[str, Any]], IntArray]] = {
    "sglang": _table("physical_to_logical_map"),
    "vllm": _table("physical_to_logical_map", empty=True),
    "vllm-ascend": _read_ascend,
    "deepseek": _table("phy2log"),
}
_WRITERS: dict[str, Callable[[MapDocument], dict[str, Any]]] = {
    "raddle": _write_raddle,
    "sglang": _write_sglang,
    "vllm": _write_vllm,
    "vllm-ascend": _write_ascend,
    "deepseek": _write_deepseek,
}
FORMATS = tuple(_WRITERS)
