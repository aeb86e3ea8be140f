"""Expert maps in the formats of SGLang, vLLM, vllm-ascend and DeepSeek.

In goes the JSON object of a file, out come its layers with all that is wrong with them; back goes
a `MapDocument`. What an engine's format cannot say (an empty slot, in all but vLLM's) is a defect:
their loaders would take -1 for the last expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import MapDocument

IntArray = npt.NDArray[np.int64]

EMPTY = -1
# A supernode has at most this many dies, a model that many experts and layers.
DIES_MAX = 65_536
SLOTS_MAX = 1_000_000
EXPERTS_MAX = 65_536
#: The layer of a defect that is of the whole file.
WHOLE_FILE = -1
# Characters of a wrong value that are repeated: it may be anything, and long.
SHOWN_MAX = 80


def invalid(message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, message)


@dataclass(slots=True)
class Layers:
    """The layers of a file that can be laid out, and what is wrong with it."""

    #: [layers that can be laid out, slots]
    table: IntArray
    #: Their numbers in the file.
    numbers: tuple[int, ...]
    #: How many layers the file has, those that cannot be laid out included.
    count: int
    #: (layer or `WHOLE_FILE`, what is wrong)
    defects: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    #: How many experts there are, if the file says it.
    experts: int | None = None
    #: How many dies there are, if the file says it.
    dies: int | None = None


def layers_of(value: Any, path: str) -> Layers:
    """A list of equally long lists of whole numbers; layers that are none are named.

    Raises:
        PermanentError: INVALID_ARGUMENT for what has no layers at all.
    """
    if not isinstance(value, list) or not value:
        raise invalid(f"{path}: must be a list of layers, [layers][slots], and not empty.")
    width = _usual(len(row) for row in value if isinstance(row, list))
    if not width:
        raise invalid(f"{path}: must be two-dimensional, a list of layers that are lists.")
    return _laid_out(dict(enumerate(value)), len(value), width, path)


def _usual(numbers: Iterable[int]) -> int:
    """The most frequent of these numbers, 0 if there is none: what differs from it is wrong."""
    found = Counter(numbers).most_common(1)
    return found[0][0] if found else 0


def _laid_out(rows: Mapping[int, Any], count: int, width: int, path: str) -> Layers:
    faults = {number: _row_fault(row, width) for number, row in rows.items()}
    numbers = tuple(number for number, fault in faults.items() if not fault)
    table = np.array([rows[number] for number in numbers], dtype=np.int64).reshape(-1, width)
    defects = [(number, f"{path}: {fault}") for number, fault in faults.items() if fault]
    return Layers(table, numbers, count, defects)


def _row_fault(row: Any, width: int) -> str:
    """Why a layer cannot be laid out; empty if it can."""
    if not isinstance(row, list):
        return "must be two-dimensional, but this layer is no list"
    if len(row) != width:
        return f"ragged, this layer has {len(row)} numbers, others have {width}"
    if not all(type(item) is int for item in row):
        return "holds something that is no whole number"
    if max(row) > EXPERTS_MAX or min(row) < -EXPERTS_MAX:
        return f"holds a number beyond {EXPERTS_MAX}"
    return ""


# --- one table, and arrays that repeat it --------------------------------------------------------


def _read_sglang(document: Mapping[str, Any]) -> Layers:
    return _without_empty(_required(document, "physical_to_logical_map"))


def _read_vllm(document: Mapping[str, Any]) -> Layers:
    found = _required(document, "physical_to_logical_map")
    _compare(found, document, "logical_replica_count", "logical_to_physical_map")
    return found


def _read_deepseek(document: Mapping[str, Any]) -> Layers:
    found = _without_empty(_required(document, "phy2log"))
    _compare(found, document, "logcnt", "log2phy")
    return found


def _required(document: Mapping[str, Any], path: str) -> Layers:
    if path not in document:
        raise invalid(f"the map has no {path}.")
    return layers_of(document[path], path)


def _without_empty(found: Layers) -> Layers:
    """Empty slots are named as defects."""
    for row, slot in np.argwhere(found.table == EMPTY).tolist():
        text = f"slot {slot} holds -1, but only vllm maps may have empty slots"
        found.defects.append((found.numbers[row], text))
    return found


def _compare(found: Layers, document: Mapping[str, Any], counts: str, places: str) -> None:
    """Take the number of experts from the arrays that repeat the table, and name what differs.

    Args:
        counts: the field with the number of copies [layers][experts].
        places: the field with their slots [layers][experts][copies], padded with -1.
    """
    if counts in document:
        said = layers_of(document[counts], counts)
        found.experts = said.table.shape[1]
        found.defects += said.defects
        rows = dict(zip(said.numbers, said.table.tolist(), strict=True))
        _compare_rows(found, rows, said.count, counts, lambda slots, count: len(slots) == count)
    if places in document:
        lists = _lists_of_slots(found, document[places], places)
        _compare_rows(found, lists, len(document[places]), places, _says)


def _lists_of_slots(found: Layers, value: Any, path: str) -> dict[int, list[Any]]:
    """What the file says of the slots of each expert, by layer; else the layer is named."""
    if not isinstance(value, list) or not value or not isinstance(value[0], list) or not value[0]:
        raise invalid(f"{path}: must be a list of layers, [layers][experts][copies].")
    found.experts = found.experts or len(value[0])
    rows: dict[int, list[Any]] = {}
    for number, row in enumerate(value):
        if isinstance(row, list) and len(row) == found.experts:
            rows[number] = row
        else:
            text = f"{path}: must hold a list of slots for each of {found.experts} experts"
            found.defects.append((number, text))
    width = _usual(len(said) for row in rows.values() for said in row if isinstance(said, list))
    for number, row in rows.items():
        for expert, said in enumerate(row):
            if isinstance(said, list) and len(said) != width:
                text = f"{path}: ragged, expert {expert} has {len(said)} places, others {width}"
                found.defects.append((number, text))
    return rows


def _compare_rows(
    found: Layers,
    rows: Mapping[int, list[Any]],
    count: int,
    path: str,
    agrees: Callable[[list[int], Any], bool],
) -> None:
    """Name each expert of which an array says something else than the table.

    Args:
        rows: by layer what the array says of each expert.
        count: how many layers the array has.
        agrees: whether the slots of an expert are what the array says.
    """
    if count != found.count:
        found.defects.append((WHOLE_FILE, f"{path}: {count} layers, the map has {found.count}"))
    for number, held in zip(found.numbers, found.table.tolist(), strict=True):
        slots: dict[int, list[int]] = {}
        for slot, expert in enumerate(held):
            slots.setdefault(expert, []).append(slot)
        for expert, said in enumerate(rows.get(number, ())):
            mine = slots.get(expert, [])
            if not agrees(mine, said):
                shown = f"{said!r:.{SHOWN_MAX}}"
                text = f"{path}: says {shown} of expert {expert}, which is in slots {mine}"
                found.defects.append((number, text))


def _says(slots: list[int], said: Any) -> bool:
    """Are these the slots, in any order, with nothing but -1 behind them?"""
    if not isinstance(said, list) or not all(type(slot) is int for slot in said):
        return False
    return sorted(said[: len(slots)]) == slots and set(said[len(slots) :]) <= {EMPTY}


# --- vllm-ascend ---------------------------------------------------------------------------------


def _read_ascend(document: Mapping[str, Any]) -> Layers:
    """`expert_map.json`: the order in `device_expert` is the order of a device's slots."""
    value = document.get("layer_list")
    if not isinstance(value, list) or not value:
        raise invalid("layer_list must be a list of moe_layer_count layers, and not empty.")
    faults: list[tuple[int, str]] = []
    if document.get("moe_layer_count") != len(value):
        text = f"moe_layer_count is {document.get('moe_layer_count')!r}, not {len(value)}"
        faults.append((WHOLE_FILE, text))
    layers: list[list[list[Any]]] = []
    for number, layer in enumerate(value):
        devices, wrong = _devices_of(layer, number)
        layers.append(devices)
        faults += [(number, text) for text in wrong]
    count = _usual(len(devices) for devices in layers if devices)
    width = _usual(len(experts) for devices in layers for experts in devices)
    if not width:
        raise invalid("layer_list holds no device_list with devices that have a device_expert.")
    rows: dict[int, list[Any]] = {}
    for number, devices in enumerate(layers):
        wrong = _shape_faults(devices, count, width)
        faults += [(number, text) for text in wrong]
        if devices and not wrong:
            rows[number] = [expert for experts in devices for expert in experts]
    found = _without_empty(_laid_out(rows, len(value), count * width, "device_expert"))
    found.defects = faults + found.defects
    found.dies = count
    return found


def _devices_of(layer: Any, number: int) -> tuple[list[list[Any]], list[str]]:
    """The experts of each device of a layer, none if they cannot be read, and what is wrong."""
    devices = layer.get("device_list") if isinstance(layer, dict) else None
    if not isinstance(devices, list) or not devices:
        return [], ["device_list must be a list of device_count devices"]
    wrong: list[str] = []
    for key, value in (("layer_id", number), ("device_count", len(devices))):
        if layer.get(key) != value:
            wrong.append(f"{key} is {layer.get(key)!r}, not {value}")
    found: list[list[Any]] = []
    for place, device in enumerate(devices):
        said = device if isinstance(device, dict) else {}
        if said.get("device_id") != place:
            wrong.append(f"device_list[{place}] is not device_id {place}")
        if isinstance(said.get("device_expert"), list):
            found.append(said["device_expert"])
        else:
            wrong.append(f"device_list[{place}].device_expert must be a list")
    return found if len(found) == len(devices) else [], wrong


def _shape_faults(devices: Sequence[Sequence[Any]], count: int, width: int) -> list[str]:
    """What is wrong with a layer's shape; nothing is said of one that could not be read."""
    wrong = [
        f"device {place} has {len(experts)} slots, others have {width}"
        for place, experts in enumerate(devices)
        if len(experts) != width
    ]
    if devices and len(devices) != count:
        wrong.append(f"{len(devices)} devices, other layers have {count}")
    return wrong


# --- writing -------------------------------------------------------------------------------------


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


READERS: dict[str, Callable[[Mapping[str, Any]], Layers]] = {
    "sglang": _read_sglang,
    "vllm": _read_vllm,
    "vllm-ascend": _read_ascend,
    "deepseek": _read_deepseek,
}
WRITERS: dict[str, Callable[[MapDocument], dict[str, Any]]] = {
    "sglang": _write_sglang,
    "vllm": _write_vllm,
    "vllm-ascend": _write_ascend,
    "deepseek": _write_deepseek,
}
