"""Expert maps and loads as files: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raddle.model.errors import PermanentError, Reason
from raddle.model.expert_map import DieState, MapDie, MapDocument
from raddle.wire.engine_expert_maps import inverted
from raddle.wire.expert_loads import read_loads
from raddle.wire.expert_maps import FORMATS, compacted, inspect_map, read_map, write_map

DIES = tuple(MapDie(npu=die // 2, node=die // 4, rack=0) for die in range(8))
# The published map of the README of deepseek-ai/EPLB (MIT licence): 8 dies of 2 slots.
EPLB_MAP = np.array(
    [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
)
DOCUMENT = MapDocument(physical_to_logical=EPLB_MAP, experts=12, slots_per_die=(2,) * 8, dies=DIES)


def same(one: MapDocument, other: MapDocument) -> bool:
    fields = (one.experts, one.slots_per_die, one.dies)
    others = (other.experts, other.slots_per_die, other.dies)
    return fields == others and np.array_equal(one.physical_to_logical, other.physical_to_logical)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_it_was_written(form: str) -> None:
    """A full map survives each format; only ours says on which dies the slots are."""
    text = write_map(DOCUMENT, form)
    assert same(read_map(text, form, () if form == "raddle" else DIES), DOCUMENT)
    assert write_map(read_map(text, form, DIES), form) == text


def test_our_format_keeps_states_speeds_and_uneven_slots() -> None:
    """Lost and drained dies, a shared-expert die, a slow one, uneven slots and empty ones."""
    table = np.array([[0, 1, 2, -1, -1, 3, -1]])
    dies = (
        replace(DIES[0], speed=0.5),
        replace(DIES[1], state=DieState.LOST),
        replace(DIES[2], state=DieState.DRAINED),
        replace(DIES[3], shared=True),
    )
    document = MapDocument(
        physical_to_logical=table, experts=5, slots_per_die=(3, 1, 2, 1), dies=dies
    )
    assert same(read_map(write_map(document, "raddle"), "raddle"), document)


def test_sglang_and_deepseek_and_vllm_have_their_fields() -> None:
    """The names of the fields are the ones that their loaders take."""
    sglang = json.loads(write_map(DOCUMENT, "sglang"))
    assert sglang == {"physical_to_logical_map": EPLB_MAP.tolist()}
    vllm = json.loads(write_map(DOCUMENT, "vllm"))
    assert vllm["logical_replica_count"][0] == np.bincount(EPLB_MAP[0]).tolist()
    assert vllm["logical_to_physical_map"][0][5] == [0, 2]
    assert vllm["logical_to_physical_map"][0][6] == [1, -1]
    deepseek = json.loads(write_map(DOCUMENT, "deepseek"))
    assert (deepseek["phy2log"], deepseek["log2phy"], deepseek["logcnt"]) == (
        vllm["physical_to_logical_map"],
        vllm["logical_to_physical_map"],
        vllm["logical_replica_count"],
    )


def test_ascend_lists_experts_device_by_device() -> None:
    """The order of `device_expert` is the order of a device's slots."""
    written = json.loads(write_map(DOCUMENT, "vllm-ascend"))
    assert (written["moe_layer_count"], len(written["layer_list"])) == (2, 2)
    layer = written["layer_list"][1]
    assert (layer["layer_id"], layer["device_count"]) == (1, 8)
    assert layer["device_list"][3] == {"device_id": 3, "device_expert": [8, 9]}


def test_empty_slots_travel_in_vllm_maps_alone() -> None:
    """A dead die's -1 survives vLLM's format; the others would take it for an expert."""
    table = EPLB_MAP.copy()
    table[:, 14:] = [[-1, -1], [-1, -1]]
    holed = replace(DOCUMENT, physical_to_logical=table)
    vllm = write_map(holed, "vllm")
    assert np.array_equal(read_map(vllm, "vllm", DIES).physical_to_logical, table)
    for form in ("sglang", "vllm-ascend", "deepseek"):
        with pytest.raises(PermanentError, match="layer 0, slot 14 is -1"):
            write_map(holed, form)


def test_experts_that_do_not_exist_are_not_written() -> None:
    """A map that `check` would refuse is not handed to an engine."""
    with pytest.raises(PermanentError, match="experts check"):
        write_map(replace(DOCUMENT, experts=11), "vllm")


def test_inversion_lists_all_slots_of_an_expert() -> None:
    """Slots of each expert in order, padded with -1, and their number."""
    slots, counts = inverted(np.array([[1, 0, 1, -1, 2, 1]]), 4)
    assert slots.tolist() == [[[1, -1, -1], [0, 2, 5], [4, -1, -1], [-1, -1, -1]]]
    assert counts.tolist() == [[1, 3, 1, 0]]


def changed(**fields: Any) -> str:
    document = json.loads(write_map(DOCUMENT, "raddle"))
    return json.dumps({k: v for k, v in (document | fields).items() if v is not ...})


BAD_MAPS = {
    "no JSON": ("{", "no JSON"),
    "a list": ("[]", "JSON object"),
    "no table": (changed(physical_to_logical=...), "no physical_to_logical"),
    "empty": (changed(physical_to_logical=[]), "not empty"),
    "ragged": (
        changed(physical_to_logical=[[0] * 16, [0] * 15]),
        "layer 1: .*ragged, this layer has 15",
    ),
    "one dimension": (changed(physical_to_logical=[0] * 16), "two-dimensional"),
    "words": (changed(physical_to_logical=[["0"] * 16]), "no whole number"),
    "truth": (changed(physical_to_logical=[[True] * 16]), "no whole number"),
    "huge": (changed(physical_to_logical=[[10**30] * 16]), "beyond"),
    "slots": (changed(slots_per_die=3), "make 24"),
    "slots of others": (changed(slots_per_die=[2, 2]), "2 numbers for 8 dies"),
    "negative slots": (changed(slots_per_die=-1), "not negative"),
    "a field": (changed(colour="red"), "colour"),
    "a version": (changed(version=2), "version 2"),
    "a version that is none": (changed(version=True), "version True"),
    "experts": (changed(experts=0), "experts must be"),
    "no dies": (changed(dies=[]), "list of 1 to"),
    "a die": (changed(dies=[7] * 8), r"dies\[0\]"),
    "a domain": (changed(dies=[{"npu": 0, "node": 0}] * 8), r"dies\[0\].rack"),
    "an order": (changed(dies=[{"die": 3, "npu": 0, "node": 0, "rack": 0}] * 8), "in the order"),
    "a state": (
        changed(dies=[{"npu": 0, "node": 0, "rack": 0, "state": "ill"}] * 8),
        "live, lost, drained",
    ),
    "a speed": (changed(dies=[{"npu": 0, "node": 0, "rack": 0, "speed": 0}] * 8), "speed"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_maps_are_named(name: str) -> None:
    """What is wrong with a map file is said, with its place."""
    text, said = BAD_MAPS[name]
    with pytest.raises(PermanentError, match=said) as caught:
        read_map(text, "raddle")
    assert caught.value.reason in (Reason.INVALID_ARGUMENT, Reason.UNKNOWN_FIELD)


@pytest.mark.parametrize(
    ("form", "document", "said"),
    [
        ("sglang", {"physical_to_logical_map": [[0, -1]]}, "slot 1 holds -1"),
        ("vllm", {"logical": []}, "no physical_to_logical_map"),
        ("vllm", {"physical_to_logical_map": [[0, 1, 2]]}, "3 slots do not spread evenly"),
        ("vllm-ascend", {"moe_layer_count": 2, "layer_list": []}, "moe_layer_count"),
        ("bogus", {}, "raddle, sglang, vllm, vllm-ascend, deepseek"),
    ],
)
def test_bad_maps_of_others_are_named(form: str, document: Any, said: str) -> None:
    """The same for the formats of engines."""
    with pytest.raises(PermanentError, match=said):
        read_map(json.dumps(document), form, DIES[:2])


def test_ascend_devices_must_be_equally_wide_and_in_order() -> None:
    """A device with more slots, or out of order, is named."""
    written = json.loads(write_map(DOCUMENT, "vllm-ascend"))
    written["layer_list"][0]["device_list"][1]["device_expert"].append(3)
    with pytest.raises(PermanentError, match="device 1 has 3 slots"):
        read_map(json.dumps(written), "vllm-ascend", DIES)
    written["layer_list"][0]["device_list"].reverse()
    with pytest.raises(PermanentError, match=r"device_list\[0\] is not device_id 0"):
        read_map(json.dumps(written), "vllm-ascend", DIES)


# --- what a validator is to name ------------------------------------------------------------------


def without_the_last_expert() -> MapDocument:
    """Expert 11 has no copy: its slots are empty."""
    return replace(DOCUMENT, physical_to_logical=np.where(EPLB_MAP == 11, -1, EPLB_MAP))


def test_a_die_of_a_vllm_map_that_holds_nothing_is_lost() -> None:
    """Only if that is so in all layers: vLLM has no other word for a dead die."""
    table = EPLB_MAP.copy()
    table[:, 4:6] = -1
    table[0, 6:8] = -1
    text = write_map(replace(DOCUMENT, physical_to_logical=table), "vllm")
    states = [die.state for die in read_map(text, "vllm", DIES).dies]
    assert states == [DieState.LOST if die == 2 else DieState.LIVE for die in range(8)]


def test_an_expert_without_a_copy_is_not_forgotten() -> None:
    """The arrays of a vLLM map say how many experts there are, each of them alone too."""
    document = without_the_last_expert()
    text = write_map(document, "vllm")
    assert same(read_map(text, "vllm", DIES), document)
    for missing in ("logical_replica_count", "logical_to_physical_map"):
        fields = json.loads(text)
        del fields[missing]
        assert read_map(json.dumps(fields), "vllm", DIES).experts == 12
    table = json.dumps({"physical_to_logical_map": document.physical_to_logical.tolist()})
    read = read_map(table, "vllm", DIES)
    assert (read.experts, read.experts_stated) == (11, False)


def test_arrays_that_contradict_the_table_are_named() -> None:
    """Each expert with other slots or another number of them, and layers that are missing."""
    fields = json.loads(write_map(DOCUMENT, "deepseek"))
    fields["logcnt"][0][5] = 3
    fields["log2phy"][1][2] = [9, -1]
    # Slots may be in any order, but not behind the padding.
    fields["log2phy"][0][5] = [2, 0]
    fields["log2phy"][0][4] = [-1, 5]
    reading = inspect_map(json.dumps(fields), "deepseek", DIES)
    assert reading.defects == (
        "layer 0: logcnt: says 3 of expert 5, which is in slots [0, 2]",
        "layer 0: log2phy: says [-1, 5] of expert 4, which is in slots [5, 7]",
        "layer 1: log2phy: says [9, -1] of expert 2, which is in slots [8]",
    )
    with pytest.raises(
        PermanentError, match=r"says 3 of expert 5.*; 2 more: `raddle experts check`"
    ):
        read_map(json.dumps(fields), "deepseek", DIES)
    fields = json.loads(write_map(DOCUMENT, "deepseek"))
    del fields["logcnt"][1], fields["log2phy"][1][0]
    fields["log2phy"][0][3] = [6, *[-1] * 40]
    assert inspect_map(json.dumps(fields), "deepseek", DIES).defects == (
        "logcnt: 1 layers, the map has 2",
        "layer 0: log2phy: ragged, expert 3 has 41 places, others 2",
        "layer 1: log2phy: must hold a list of slots for each of 12 experts",
    )


def test_layers_that_cannot_be_laid_out_do_not_hide_the_others() -> None:
    """They are named and left out; the others keep their numbers."""
    row = EPLB_MAP[0].tolist()
    rows = [row[:15], row, None, [*row[:15], "x"], row]
    reading = inspect_map(changed(physical_to_logical=rows), "raddle")
    assert [defect.split(":")[0] for defect in reading.defects] == ["layer 0", "layer 2", "layer 3"]
    assert reading.layers == (1, 4)
    assert np.array_equal(reading.document.physical_to_logical, [row, row])


def test_ascend_says_how_many_devices_there_are() -> None:
    """Without dies it is taken at its word; with another number of them it is not cut anew."""
    text = write_map(DOCUMENT, "vllm-ascend")
    assert len(read_map(text, "vllm-ascend").dies) == 8
    with pytest.raises(PermanentError, match="device_count of 8, but --dies is 4"):
        read_map(text, "vllm-ascend", DIES[:4])


def test_every_defect_of_an_ascend_map_is_named() -> None:
    """Counts, numbers, widths and empty slots, in all layers."""
    fields = json.loads(write_map(DOCUMENT, "vllm-ascend"))
    fields["moe_layer_count"] = 9
    first, last = fields["layer_list"]
    first["layer_id"], first["device_count"] = 7, 3
    first["device_list"][2]["device_expert"][0] = -1
    last["device_list"][1]["device_expert"].append(3)
    last["device_list"].pop()
    fields["layer_list"].append({"layer_id": 2, "device_count": 1, "device_list": [{}]})
    reading = inspect_map(json.dumps(fields), "vllm-ascend", DIES)
    assert reading.defects == (
        "moe_layer_count is 9, not 3",
        "layer 0: layer_id is 7, not 0",
        "layer 0: device_count is 3, not 8",
        "layer 0: slot 4 holds -1, but only vllm maps may have empty slots",
        "layer 1: device_count is 8, not 7",
        "layer 1: device 1 has 3 slots, others have 2",
        "layer 1: 7 devices, other layers have 8",
        "layer 2: device_list[0] is not device_id 0",
        "layer 2: device_list[0].device_expert must be a list",
    )
    assert reading.layers == (0,)


def test_domains_that_do_not_nest_are_named() -> None:
    """NPUs that are numbered anew in each node would be taken for one NPU."""
    dies = [{"npu": die % 4 // 2, "node": die // 4, "rack": 0} for die in range(8)]
    reading = inspect_map(changed(dies=dies), "raddle")
    assert reading.defects == ("npu 0 is in nodes 0, 1", "npu 1 is in nodes 0, 1")


def test_formats_without_empty_slots_take_a_compact_map() -> None:
    """Dies that hold nothing are left out and the others numbered anew."""
    table = EPLB_MAP.copy()
    table[:, 4:6] = -1
    lost = replace(DIES[2], state=DieState.LOST)
    holed = replace(DOCUMENT, physical_to_logical=table, dies=(*DIES[:2], lost, *DIES[3:]))
    for form in FORMATS:
        read = read_map(write_map(compacted(holed), form), form, (*DIES[:2], *DIES[3:]))
        assert read.dies == (*DIES[:2], *DIES[3:])
        assert np.array_equal(read.physical_to_logical, np.delete(table, (4, 5), axis=1))
    with pytest.raises(PermanentError, match=r"layer 0, slot 4 is -1 \(die 2\): .*--compact"):
        write_map(holed, "sglang")
    with pytest.raises(PermanentError, match=r"layer 0, slot 4 is -1 \(die 2\), which is alive"):
        write_map(replace(holed, dies=DIES), "sglang")
    with pytest.raises(PermanentError, match="no die is left"):
        compacted(replace(holed, dies=(lost,) * 8))


# --- loads ---------------------------------------------------------------------------------------


def test_loads_come_as_npy_csv_and_json(tmp_path: Path) -> None:
    """The same numbers in every format, SGLang's logical_count among them."""
    loads = np.array([[1.5, 2.0], [0.0, 4.0]])
    np.save(tmp_path / "l.npy", loads.astype(np.float32))
    (tmp_path / "l.csv").write_text("1.5, 2\n\n0,4e0\n")
    (tmp_path / "l.json").write_text("[[1.5, 2], [0, 4]]")
    (tmp_path / "s.json").write_text('{"logical_count": [[1.5, 2], [0, 4]]}')
    for name in ("l.npy", "l.csv", "l.json", "s.json"):
        assert np.array_equal(read_loads(tmp_path / name), loads), name


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("l.csv", "1,2\n3\n", "ragged: layer 1 has 1 experts, layer 0 has 2"),
        ("l.csv", "1,x\n", "line 1"),
        ("l.json", "[[1], [2, 3]]", "ragged"),
        ("l.json", "[1, 2]", "two-dimensional"),
        ("l.json", '[["a"]]', "layer 0 must hold numbers"),
        ("l.json", "{}", "logical_count"),
        ("l.json", "[", "no JSON"),
        ("l.json", f"[[1, {10**400}]]", "too large"),
        ("l.npy", "text", "no .npy file"),
        ("l.txt", "1", "must end in"),
    ],
)
def test_bad_loads_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    """Each refusal names the file and the place."""
    (tmp_path / name).write_text(content)
    with pytest.raises(PermanentError, match=said) as caught:
        read_loads(tmp_path / name)
    assert name in caught.value.message


def test_csv_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Spreadsheets write one."""
    (tmp_path / "l.csv").write_bytes(b"\xef\xbb\xbf1,2\n")
    assert read_loads(tmp_path / "l.csv").tolist() == [[1.0, 2.0]]


def test_a_damaged_header_of_an_array_is_named(tmp_path: Path) -> None:
    """Whatever numpy's reader of headers fails with."""
    np.save(tmp_path / "l.npy", np.ones((2, 3)))
    data = (tmp_path / "l.npy").read_bytes()
    (tmp_path / "l.npy").write_bytes(data.replace(b"(2, 3)", b"(2, 3("))
    with pytest.raises(PermanentError, match=r"is no \.npy file"):
        read_loads(tmp_path / "l.npy")


def test_arrays_of_other_things_are_refused(tmp_path: Path) -> None:
    """Words and complex numbers are no loads, pickled objects are not even read."""
    for values in (np.array([["a"]]), np.array([[1j]]), np.array([[None]], dtype=object)):
        np.save(tmp_path / "l.npy", values, allow_pickle=True)
        with pytest.raises(PermanentError, match=r"l\.npy"):
            read_loads(tmp_path / "l.npy")
    with pytest.raises(PermanentError, match="No such file") as caught:
        read_loads(tmp_path / "none.npy")
    assert caught.value.reason is Reason.NOT_FOUND
