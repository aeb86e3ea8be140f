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
    assert "pass --dies" in experts("check", "--map-format", form, "other.json", code=EXIT_USAGE)


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
    assert "'x'" in experts(*small, "4", "--slots-per-die", "x", code=EXIT_USAGE)
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
