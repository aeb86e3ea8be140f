"""Machines and models: sizes are computed, wrong descriptions are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raddle import machines, models, traces
from raddle.model.errors import PermanentError
from raddle.model.llm import parse_config
from raddle.model.topology import parse_position


def test_deepseek_v3_has_the_published_sizes() -> None:
    """671.0 G weights, 44.04 MB an expert and layer in INT8, 70,272 B of KV a token in BF16."""
    shape = parse_config(models.config_text("deepseek-r1"))
    assert round(shape.weights / 1e9, 1) == 671.0
    assert shape.expert_bytes("int8") == 44_040_192
    assert shape.kv_bytes_per_token("bf16") == 70_272
    assert shape.kv_bytes_per_token("int8") == 39_040


@pytest.mark.parametrize(
    ("name", "billions", "experts"),
    [("qwen3-235b-a22b", 235.1, 128), ("kimi-k2", 1026.4, 384)],
)
def test_other_models_parse(name: str, billions: float, experts: int) -> None:
    """Qwen3 MoE and Kimi K2 configs give their published sizes."""
    shape = parse_config(models.config_text(name))
    assert round(shape.weights / 1e9, 1) == billions
    assert shape.experts == experts


@pytest.mark.parametrize("value", [0, -1, 1.5, "x", True, None])
def test_a_wrong_size_is_refused_by_name(value: object) -> None:
    """Zero, negative, fractional, missing and wrongly typed sizes name the field."""
    config = json.loads(models.config_text("deepseek-r1")) | {"hidden_size": value}
    with pytest.raises(PermanentError, match="hidden_size"):
        parse_config(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_hidden_layers": 10_000_000, "mlp_only_layers": [-1] * 30_000}, "num_hidden_layers"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"mlp_only_layers": [[0]]}, "mlp_only_layers"),
        ({"mlp_only_layers": [0] * 30_000}, "mlp_only_layers"),
        ({"mlp_only_layers": {}}, "mlp_only_layers"),
        ({"n_routed_experts": 1_000_000}, "n_routed_experts"),
        ({"hidden_size": {"a": 1}}, "hidden_size"),
        ({"hidden_size": 10**4_000}, "hidden_size"),
    ],
)
def test_a_hostile_config_is_refused_in_few_words(change: dict[str, Any], word: str) -> None:
    """Sizes that no model has and lists of nonsense are refused by name, never worked through."""
    config = json.loads(models.config_text("deepseek-r1")) | change
    with pytest.raises(PermanentError, match=word) as caught:
        parse_config(json.dumps(config))
    assert len(caught.value.message) < 200


def test_listed_dense_layers_hold_no_experts() -> None:
    """Qwen's list of dense layers counts each layer once."""
    config = json.loads(models.config_text("qwen3-235b-a22b"))
    layers = parse_config(json.dumps(config)).moe_layers
    listed = parse_config(json.dumps(config | {"mlp_only_layers": [0, 3, 3]}))
    assert listed.moe_layers == layers - 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 40_000])
def test_a_config_nested_without_end_is_refused(text: str) -> None:
    """Depth is no way to break the parser."""
    with pytest.raises(PermanentError, match="nested"):
        parse_config(text)


def test_the_built_in_machines_have_their_dies() -> None:
    """CloudMatrix384 has 768 dies, NVL72 has 72."""
    assert machines.load_machine("cloudmatrix384").dies == 768
    assert machines.load_machine("nvl72").dies == 72


@pytest.mark.parametrize("change", ["nodes: 0", "nodes: -3", "nodes: many", "colour: red"])
def test_a_wrong_machine_is_refused(change: str, tmp_path: Path) -> None:
    """Unknown fields, wrong types and values below one are refused."""
    file = tmp_path / "machine.yaml"
    file.write_text(f"name: sn0\nmachine: m\n{change}\n")
    with pytest.raises(PermanentError):
        machines.load_machine(str(file))


def test_a_description_says_what_differs_from_a_built_in_machine(tmp_path: Path) -> None:
    """What a file leaves out is as in the machine that it names."""
    file = tmp_path / "machine.yaml"
    file.write_text("name: ours\nmachine: nvl72\nnodes: 9\n")
    whole = machines.load_machine("nvl72")
    assert machines.load_machine(str(file)) == replace(whole, name="ours", nodes=9)


@pytest.mark.parametrize("text", ["", "sn0/", "sn0/n1", "sn0/n01/npu", "../x", "sn0/n01\n"])
def test_a_wrong_position_is_refused(text: str) -> None:
    """Only positions of the four levels are positions."""
    with pytest.raises(PermanentError):
        parse_position(text)


def test_equal_trace_blocks_give_equal_tokens() -> None:
    """Requests that share prefix blocks share prompt tokens; sizes are bounded."""
    requests = traces.load_requests(96)
    assert len({request.prompt[:16] for request in requests}) == 1
    assert all(1 <= len(r.prompt) <= 128 and 8 <= r.output_tokens <= 64 for r in requests)
