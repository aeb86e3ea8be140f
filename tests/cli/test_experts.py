"""`raddle experts` on files: the forms and keys that scripts rely on, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from raddle.cli.main import app
from raddle.cli.session import EXIT_FAILED, EXIT_NOT_FOUND, EXIT_OK, EXIT_REFUSED, EXIT_USAGE

KEYS = {"cpu_ms", "balancedness", "bound", "duplicates", "uncovered", "loads", "bytes", "margin"}
EXPERT_BYTES = 44_040_192


class Folder:
    """Runs `raddle experts` in a folder with loads of 6 layers x 64 experts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warning = ""
        self.loads = np.random.default_rng(0).lognormal(0, 0.8, (6, 64))
        np.save(path / "L.npy", self.loads)

    def __call__(self, *words: str, code: int = EXIT_OK) -> str:
        """Names that end in a suffix of files are in the folder."""
        at_home = [
            str(self.path / word) if word.endswith((".json", ".npy", ".csv")) else word
            for word in words
        ]
        result = CliRunner().invoke(app, ["experts", *at_home], prog_name="raddle")
        assert result.exit_code == code, (words, result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        self.warning = result.stderr
        return result.stdout if code in (EXIT_OK, EXIT_FAILED) else result.stderr

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--output", "json"))

    def file(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def place(self, dies: int = 16, slots: str = "5", out: str = "map.json") -> Any:
        form = ("--dies", str(dies), "--slots-per-die", slots, "--out", out)
        return self.json("place", "--loads", "L.npy", *form)


@pytest.fixture
def experts(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_place_writes_a_map_and_says_what_it_is_worth(experts: Folder) -> None:
    """All keys are there, and the map's dies are those of a CloudMatrix384."""
    said = experts.place()
    assert set(said) >= KEYS
    assert (said["duplicates"], said["uncovered"], said["margin"]) == (0, 0, 0)
    assert (said["loads"], said["bytes"]) == (6 * 80, 6 * 80 * EXPERT_BYTES)
    assert 0.95 < said["balancedness"] <= said["bound"] <= 1
    assert said["cpu_ms"] > 0
    written = experts.file("map.json")
    assert (written["format"], written["version"]) == ("raddle-expert-map", 1)
    assert np.array(written["physical_to_logical"]).shape == (6, 80)
    assert written["slots_per_die"] == 5
    assert written["dies"][15] == {"die": 15, "npu": 7, "node": 0, "rack": 0}


def test_place_takes_uneven_slots_shared_experts_and_slow_dies(experts: Folder) -> None:
    """One number a die; the last die holds the shared expert alone; die 0 is slow."""
    slots = ",".join(["5"] * 15 + ["3", "5"])
    experts(
        *("place", "--loads", "L.npy", "--dies", "17", "--slots-per-die", slots, "--out", "m.json"),
        *("--shared-expert-dies", "1", "--slow", "die:0=0.5"),
    )
    written = experts.file("m.json")
    table = np.array(written["physical_to_logical"])
    assert written["slots_per_die"][15:] == [3, 5]
    assert (table[:, -5:] == -1).all()
    assert (written["dies"][16]["shared"], written["dies"][0]["speed"]) == (True, 0.5)
    experts("check", "m.json")


def test_repair_moves_little_and_marks_what_is_lost(experts: Folder) -> None:
    """A die, an NPU: the map is valid on the rest, and loads are the difference of the maps."""
    experts.place()
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--lost", "die:7,npu:1")
    said = experts.json(*form, "--swaps", "0", "--out", "new.json")
    assert set(said) >= KEYS
    assert (said["duplicates"], said["uncovered"]) == (0, 0)
    assert said["bytes"] == said["loads"] * EXPERT_BYTES
    old, new = experts.file("map.json"), experts.file("new.json")
    assert [n for n, die in enumerate(new["dies"]) if die.get("state") == "lost"] == [2, 3, 7]
    before, after = (np.array(m["physical_to_logical"]).reshape(6, 16, 5) for m in (old, new))
    assert (after[:, [2, 3, 7]] == -1).all()
    loaded = sum(
        len(set(after[layer, die].tolist()) - set(before[layer, die].tolist()) - {-1})
        for layer in range(6)
        for die in range(16)
    )
    assert said["loads"] == loaded
    assert sum(said["sources"].values()) == loaded
    assert said["predicted_s"] > 0
    assert said["sources_cpu_ms"] > 0
    swapped = experts.json(*form, "--swaps", "4", "--out", "swapped.json")
    assert swapped["balancedness"] > said["balancedness"]
    experts("check", "new.json")


def test_repair_of_nothing_changes_nothing_and_a_die_comes_back(experts: Folder) -> None:
    """Without a loss the map stays; a die that joined again is filled."""
    experts.place()
    form = ("repair", "--loads", "L.npy", "--map")
    assert experts.json(*form, "map.json", "--out", "same.json")["loads"] == 0
    assert experts.file("same.json") == experts.file("map.json")
    experts(*form, "map.json", "--lost", "die:3", "--out", "less.json")
    back = experts.json(*form, "less.json", "--joined", "die:3", "--out", "back.json")
    assert back["loads"] > 0
    table = np.array(experts.file("back.json")["physical_to_logical"])
    assert (table >= 0).all()
    assert "state" not in experts.file("back.json")["dies"][3]
    drained = experts.json(*form, "map.json", "--drained", "die:3", "--out", "d.json")
    lost = experts.json(*form, "map.json", "--lost", "die:3", "--out", "l.json")
    assert drained["loads"] == lost["loads"]
    assert drained["sources"]["peer"] > lost["sources"]["peer"]


def test_a_repair_for_a_slow_die_is_compared_at_its_new_speed(experts: Folder) -> None:
    """What was balanced at full speed is not any more, and the repair improves on that."""
    whole = experts.place()
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--out", "slow.json")
    said = experts.json(*form, "--slow", "die:5=0.5")
    assert said["balancedness_before"] < 0.7 * whole["balancedness"]
    assert said["balancedness"] > said["balancedness_before"]
    again = ("repair", "--map", "slow.json", "--loads", "L.npy", "--out", "again.json")
    assert experts.json(*again)["loads"] == 0


def test_rebalance_follows_a_shift_and_ignores_noise(experts: Folder) -> None:
    """Small noise moves nothing; other loads move experts and say what is gained."""
    experts.place(dies=8, slots="9")
    noise = 1 + 0.01 * np.random.default_rng(1).standard_normal(experts.loads.shape)
    np.save(experts.path / "noise.npy", experts.loads * noise)
    form = ("rebalance", "--map", "map.json", "--out", "new.json", "--loads")
    said = experts.json(*form, "noise.npy")
    assert (said["loads"], said["bytes"]) == (0, 0)
    assert experts.file("new.json") == experts.file("map.json")
    np.save(experts.path / "shift.npy", experts.loads[:, ::-1])
    moved = experts.json(*form, "shift.npy")
    assert set(moved) >= KEYS
    assert moved["reason"] == "PAYS"
    assert moved["loads"] > 0
    assert moved["balancedness"] > moved["balancedness_before"]
    short = experts.json(*form, "shift.npy", "--horizon", "0.0001")
    assert (short["reason"], short["loads"]) == ("TOO_DEAR", 0)


def test_check_names_every_defect(experts: Folder) -> None:
    """One a line, and exit code 1; a sound map has none."""
    experts.place()
    assert "no defect" in experts("check", "map.json")
    document = experts.file("map.json")
    row = document["physical_to_logical"][2]
    row[0], row[1] = row[2], 99
    (experts.path / "bad.json").write_text(json.dumps(document))
    lines = experts("check", "bad.json", code=EXIT_FAILED).splitlines()
    assert f"layer 2: die 0 holds expert {row[2]} 2 times" in lines
    assert "layer 2: slot 1 (die 0) holds 99, which is no expert of 64" in lines
    assert all(line.startswith("layer 2: ") for line in lines)
    data = json.loads(experts("check", "bad.json", "-o", "json", code=EXIT_FAILED))
    assert (data["valid"], data["defects"]) == (False, lines)


def test_coverage_says_what_a_loss_costs(experts: Folder) -> None:
    """One expert a die twice: any die may go, and an NPU takes nothing that is spread."""
    experts.place(dies=32, slots="4")
    said = experts.json("coverage", "map.json")
    assert set(said) >= {"margin", "uncovered", "levels", "extra_copies_needed", "extra_copies"}
    assert set(said["levels"]) == {"die", "npu", "node", "rack"}
    one, two = (said["levels"]["die"][number] for number in ("one", "two"))
    assert len(one["experts"]) == one["experts_lost"] <= two["experts_lost"]
    assert said["levels"]["rack"]["two"] is None
    table = experts("coverage", "map.json")
    assert "margin: 0 dies may be lost" in table
    assert "EXPERTS LOST" in table


@pytest.mark.parametrize("form", ["sglang", "vllm", "vllm-ascend", "deepseek"])
def test_convert_there_and_back(experts: Folder, form: str) -> None:
    """A map in an engine's format says the same, once its dies are named."""
    experts.place()
    experts("convert", "--to", form, "map.json", "--out", "other.json")
    back = ("--map-format", form, "--dies", "16", "other.json", "--out", "back.json")
    experts("convert", "--to", "raddle", *back)
    assert experts.file("back.json") == experts.file("map.json")
    experts("check", "--map-format", form, "--dies", "16", "other.json")
    if form == "vllm-ascend":
        # It says itself how many dies there are; on which machine is the caller's.
        alone = ("convert", "--to", "raddle", "--map-format", form, "other.json")
        experts(*alone, "--out", "alone.json")
        assert experts.file("alone.json") == experts.file("map.json")
        few = ("check", "--map-format", form, "--dies", "8", "other.json")
        assert "device_count of 16, but --dies is 8" in experts(*few, code=EXIT_USAGE)
    else:
        said = experts("check", "--map-format", form, "other.json", code=EXIT_USAGE)
        assert "pass --dies" in said


def test_people_see_a_picture_of_the_dies(experts: Folder) -> None:
    """A row a node, a bar a die, what is lost marked; YAML on request."""
    experts.place(dies=32, slots="4")
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--lost", "die:17")
    shown = experts(*form, "--out", "new.json")
    rows = [line for line in shown.splitlines() if line.startswith("node ")]
    assert len(rows) == 2
    assert rows[1].split()[2][1] == "x"
    assert len(rows[0].split()[2]) == 16
    assert "balancedness" in shown
    text = experts(*form, "--out", "new.json", "-o", "yaml")
    assert set(yaml.safe_load(text)) >= KEYS


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ([[1.0, float("nan")]], "not finite"),
        ([[1.0, -1.0]], "negative"),
        ([1.0, 2.0], "two-dimensional"),
    ],
)
def test_bad_loads_are_refused_and_write_nothing(experts: Folder, loads: Any, said: str) -> None:
    """NaN, negative and one-dimensional loads: a clear sentence, exit code 2, no file."""
    np.save(experts.path / "bad.npy", np.array(loads))
    form = ("place", "--loads", "bad.npy", "--dies", "4", "--slots-per-die", "4")
    assert said in experts(*form, "--out", "new.json", code=EXIT_USAGE)
    assert not (experts.path / "new.json").exists()


def test_what_does_not_fit_or_exist_is_refused(experts: Folder) -> None:
    """Too many experts, unknown dies, maps of other models, missing files, wrong options."""
    small = ("place", "--loads", "L.npy", "--out", "new.json", "--dies")
    said = experts(*small, "4", "--slots-per-die", "4", code=EXIT_REFUSED)
    assert "64 experts do not fit into 16 slots" in said
    said = experts(*small, "1000", "--slots-per-die", "1", code=EXIT_REFUSED)
    assert "has 768 dies, not 1000" in said
    assert "3 numbers for 4" in experts(*small, "4", "--slots-per-die", "9,9,9", code=EXIT_USAGE)
    for wrong in ("x", "-1", "9" * 5_000):
        assert f"'{wrong}'" in experts(*small, "4", "--slots-per-die", wrong, code=EXIT_USAGE)
    experts.place()
    repair = ("repair", "--map", "map.json", "--loads", "L.npy", "--out", "new.json", "--lost")
    assert "no such die" in experts(*repair, "die:16", code=EXIT_NOT_FOUND)
    assert "no such node" in experts(*repair, "node:1", code=EXIT_NOT_FOUND)
    for wrong in ("die", "die:x", "core:1", "die:-1"):
        assert "die:N" in experts(*repair, wrong, code=EXIT_USAGE)
    assert "no die is left" in experts(*repair, "node:0", code=EXIT_REFUSED)
    np.save(experts.path / "other.npy", np.ones((2, 64)))
    other = ("repair", "--map", "map.json", "--loads", "other.npy", "--out", "new.json")
    assert "different models" in experts(*other, code=EXIT_USAGE)
    assert "No such file" in experts("check", "none.json", code=EXIT_NOT_FOUND)
    assert "unknown" in experts("convert", "--to", "x", "map.json", "--out", "n.json", code=2)
    assert not (experts.path / "new.json").exists()


def test_a_broken_map_is_not_repaired(experts: Folder) -> None:
    """A map with a double is refused with a hint at `check`."""
    experts.place()
    document = experts.file("map.json")
    document["physical_to_logical"][0][0] = document["physical_to_logical"][0][1]
    (experts.path / "bad.json").write_text(json.dumps(document))
    form = ("repair", "--map", "bad.json", "--loads", "L.npy", "--out", "new.json")
    assert "experts check" in experts(*form, code=EXIT_USAGE)


def test_a_vllm_map_is_repaired_twice_and_taken_back(experts: Folder) -> None:
    """A die that an earlier repair emptied stays empty until it joins again."""
    vllm = ("--map-format", "vllm", "--dies", "16")
    place = ("place", "--loads", "L.npy", "--dies", "16", "--slots-per-die", "5")
    experts(*place, "--map-format", "vllm", "--out", "v0.json")
    form = ("repair", *vllm, "--loads", "L.npy", "--swaps", "0", "--map")
    experts(*form, "v0.json", "--lost", "die:5", "--out", "v1.json")
    experts(*form, "v1.json", "--lost", "die:9", "--out", "v2.json")
    table = np.array(experts.file("v2.json")["physical_to_logical_map"]).reshape(6, 16, 5)
    assert (table[:, [5, 9]] == -1).all()
    said = experts.json(*form, "v2.json", "--joined", "die:5", "--out", "v3.json")
    assert said["loads"] > 0
    table = np.array(experts.file("v3.json")["physical_to_logical_map"]).reshape(6, 16, 5)
    assert (table[:, 5] >= 0).all()
    # The same map in our format, where the state is a word, is worth the same.
    experts("convert", *vllm, "--to", "raddle", "v1.json", "--out", "r1.json")
    assert experts.file("r1.json")["dies"][5]["state"] == "lost"


def test_a_die_that_joins_has_nothing_in_memory_whatever_the_map_says(experts: Folder) -> None:
    """Lost and back before anybody repaired: all that it holds is loaded anew."""
    experts.place()
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--swaps", "0", "--out", "new.json")
    assert experts.json(*form, "--joined", "die:3")["loads"] == 6 * 5


def test_options_that_name_dies_add_up(experts: Folder) -> None:
    """Nothing that was named is dropped."""
    experts.place()
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--swaps", "0", "--out", "new.json")
    experts(
        *form, "--lost", "die:0", "--lost", "die:2", "--slow", "die:4=0.5", "--slow", "npu:3=0.5"
    )
    dies = experts.file("new.json")["dies"]
    assert [number for number, die in enumerate(dies) if die.get("state") == "lost"] == [0, 2]
    assert [number for number, die in enumerate(dies) if die.get("speed") == 0.5] == [4, 6, 7]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lost", "die:0", "--joined", "npu:0"), "die 0 is in --lost and in --joined"),
        (("--lost", "die:0", "--drained", "die:0"), "die 0 is in --lost and in --drained"),
        (("--slow", "die:0=0.5", "--slow", "die:0=0.6"), "two speeds, 0.5 and 0.6"),
        (("--lost", ""), "--lost: a name is empty"),
        (("--joined", "die:0,"), "--joined: a name is empty"),
        (("--slow", ""), "--slow: a name is empty"),
        (("--slow", "die:0=1e-300"), "a speed from 0.001 to 1"),
        (("--slow", "die:0"), "a speed from 0.001 to 1"),
        (("--lost", "die:" + "9" * 5_000), "no such die"),
    ],
)
def test_options_that_contradict_or_name_nothing_are_refused(
    experts: Folder, options: tuple[str, ...], said: str
) -> None:
    """A mistake of a script is not taken for a wish."""
    experts.place(dies=16, slots="5")
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--out", "new.json")
    code = EXIT_NOT_FOUND if "no such" in said else EXIT_USAGE
    assert said in experts(*form, *options, code=code)
    assert not (experts.path / "new.json").exists()


def test_experts_that_find_no_slot_are_named(experts: Folder) -> None:
    """48 slots for 64 experts: the map is written, the rest is named, and the exit code is 1."""
    experts.place(dies=32, slots="3")
    form = ("repair", "--map", "map.json", "--loads", "L.npy", "--lost", "node:0")
    words = [*form, "--out", "new.json", "--output", "json"]
    said = json.loads(experts(*words, code=EXIT_FAILED))
    assert said["uncovered"] == len(said["uncovered_experts"]) == 6 * 16
    held = [set(row) for row in experts.file("new.json")["physical_to_logical"]]
    missing = [[layer, x] for layer in range(6) for x in range(64) if x not in held[layer]]
    assert said["uncovered_experts"] == missing
    first = ", ".join(str(expert) for layer, expert in missing if layer == 0)
    shown = experts(*form, "--out", "new.json", code=EXIT_FAILED)
    assert f"layer 0: no copy of 16 experts: {first}\n" in shown
    assert "48 slots a layer are left for 64 experts" in experts.warning
    assert f"layer 0: no copy of 16 experts: {first}\n" in experts("coverage", "new.json")
    refused = ("rebalance", "--map", "new.json", "--loads", "L.npy", "--out", "moved.json")
    assert "raddle experts repair" in experts(*refused, code=EXIT_USAGE)
    assert not (experts.path / "moved.json").exists()


def test_loads_of_another_number_of_experts_are_refused(experts: Folder) -> None:
    """Where the map states how many there are, more are another model too."""
    experts.place()
    np.save(experts.path / "more.npy", np.ones((6, 70)))
    form = ("repair", "--map", "map.json", "--loads", "more.npy", "--out", "new.json")
    assert "layers of 64 experts, the loads have 6 layers of 70" in experts(*form, code=EXIT_USAGE)


def test_check_goes_on_after_the_first_defect(experts: Folder) -> None:
    """A ragged layer, a double in another one, and NPUs that are in two nodes."""
    experts.place(dies=32, slots="5")
    document = experts.file("map.json")
    rows = document["physical_to_logical"]
    del rows[0][-1]
    rows[3][0] = rows[3][1]
    for number, die in enumerate(document["dies"]):
        die["npu"] = number % 16 // 2
    (experts.path / "bad.json").write_text(json.dumps(document))
    lines = experts("check", "bad.json", code=EXIT_FAILED).splitlines()
    assert lines[0] == "npu 0 is in nodes 0, 1"
    assert (
        "layer 0: physical_to_logical: ragged, this layer has 159 numbers, others have 160" in lines
    )
    assert f"layer 3: die 0 holds expert {rows[3][0]} 2 times" in lines
    form = ("repair", "--map", "bad.json", "--loads", "L.npy", "--out", "new.json")
    assert "raddle experts check" in experts(*form, code=EXIT_USAGE)


def test_check_of_a_vllm_map_misses_no_expert(experts: Folder) -> None:
    """The last expert has no copy: the arrays of the map say that there is one."""
    counts = [[1] * 11 + [0]] * 2
    slots = [[[expert if expert < 11 else -1] for expert in range(12)]] * 2
    table = [[*range(11), -1]] * 2
    fields = {"physical_to_logical_map": table, "logical_to_physical_map": slots}
    (experts.path / "v.json").write_text(json.dumps(fields | {"logical_replica_count": counts}))
    form = ("check", "v.json", "--map-format", "vllm", "--dies", "4")
    lines = experts(*form, code=EXIT_FAILED).splitlines()
    assert lines == [f"layer {layer}: expert 11 has no live copy" for layer in range(2)]
    (experts.path / "v.json").write_text(json.dumps({"physical_to_logical_map": table}))
    assert "11 experts (the file does not say how many)" in experts(*form)


def test_the_coverage_table_joins_the_rows_of_a_level(experts: Folder) -> None:
    """One node: it is followed by the rack, and no row is shown twice."""
    experts.place()
    shown = experts("coverage", "map.json").split("margin:")[0]
    levels = [line.split()[:2] for line in shown.splitlines()[1:] if line.strip()]
    assert levels == [[level, n] for level in ("die", "npu") for n in "12"] + [
        ["node", "1"],
        ["rack", "1"],
    ]


def test_coverage_asks_for_no_copy_that_cannot_be(experts: Folder) -> None:
    """Every die holds every expert."""
    np.save(experts.path / "few.npy", np.ones((2, 4)))
    place = ("place", "--loads", "few.npy", "--dies", "4", "--slots-per-die", "4")
    experts(*place, "--out", "full.json")
    said = experts.json("coverage", "full.json")
    assert (said["margin"], said["extra_copies_needed"], said["extra_copies"]) == (3, 0, [])
    assert "no more copy can raise it" in experts("coverage", "full.json")


@pytest.mark.parametrize("form", ["sglang", "vllm-ascend", "deepseek"])
def test_formats_without_empty_slots_are_repaired_too(experts: Folder, form: str) -> None:
    """The refusal says how: with fewer ranks, or in a format that knows lost dies."""
    place = ("place", "--loads", "L.npy", "--dies", "16", "--slots-per-die", "5")
    experts(*place, "--map-format", form, "--out", "e.json")
    repair = ("repair", "--map", "e.json", "--map-format", form, "--dies", "16", "--lost", "die:5")
    words = (*repair, "--loads", "L.npy", "--swaps", "0", "--out", "new.json")
    said = experts(*words, code=EXIT_USAGE)
    assert "--compact" in said
    assert "--to" in said
    experts(*words, "--compact")
    experts("check", "new.json", "--map-format", form, "--dies", "15")
    experts(*words, "--to", "raddle")
    assert experts.file("new.json")["dies"][5]["state"] == "lost"
    experts("convert", "--to", form, "--compact", "new.json", "--out", "again.json")
    again = ("--map-format", form, "--dies", "15")
    experts("check", "again.json", *again)
    rebalance = ("rebalance", "--map", "again.json", "--loads", "L.npy", *again, "--swaps", "0")
    experts(*rebalance, "--to", "vllm", "--out", "v.json")
    assert "logical_replica_count" in experts.file("v.json")


def test_files_of_spreadsheets_and_huge_loads(experts: Folder) -> None:
    """A byte order mark is no defect; loads whose sum is no number are."""
    experts.place()
    text = (experts.path / "map.json").read_text()
    (experts.path / "bom.json").write_text(text, encoding="utf-8-sig")
    experts("check", "bom.json")
    (experts.path / "huge.json").write_text("[[1e308, 1e308]]")
    form = ("place", "--loads", "huge.json", "--dies", "2", "--slots-per-die", "2")
    assert "above 1e+100" in experts(*form, "--out", "new.json", code=EXIT_USAGE)
