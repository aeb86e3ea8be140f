"""What a Hugging Face `config.json` says of a model's sizes: layers, experts, weights, KV.

In goes the parsed JSON of DeepSeek-V3/R1, Kimi K2, Qwen3 MoE and the reference engine's own small
model; out comes a `ModelShape`. Everything is computed, nothing is typed in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from raddle.model.errors import PermanentError, Reason

CONFIG_BYTES_MAX = 256 * 1024
_NUMBER_MAX = 10_000_000
# Well above the largest models known (Kimi K2: 61 layers, 384 experts).
LAYERS_MAX = 1_000
EXPERTS_MAX = 16_384
_SHOWN_CHARACTERS_MAX = 40
BYTES_BY_DTYPE = {"int8": 1, "fp8": 1, "bf16": 2, "fp16": 2, "float32": 4}
_BF16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of one model. Weights are counted in parameters, KV in bytes per token."""

    model_type: str
    layers: int
    moe_layers: int
    experts: int
    experts_per_token: int
    shared_experts: int
    hidden: int
    # Parameters of one routed expert in one layer: three matrices hidden x intermediate.
    expert_weights: int
    # Parameters of everything that is no routed expert.
    other_weights: int
    # Values per token and layer that the KV cache keeps, of which the last `kv_rope_values` are
    # rotary and stay in BF16 when the rest is quantised.
    kv_values: int
    kv_rope_values: int
    max_context_tokens: int

    @property
    def weights(self) -> int:
        """All parameters of the model (671.0 G for DeepSeek-V3 without its MTP layer)."""
        return self.other_weights + self.moe_layers * self.experts * self.expert_weights

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert in one layer (44.04 MB in INT8 for DeepSeek-V3)."""
        return self.expert_weights * _dtype_bytes(dtype)

    def other_bytes(self, dtype: str) -> int:
        """Bytes of a full copy of what is no routed expert."""
        return self.other_weights * _dtype_bytes(dtype)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV bytes of one token over all layers (70,272 in BF16 for DeepSeek-V3)."""
        rope = self.kv_rope_values * max(_BF16_BYTES, _dtype_bytes(dtype))
        rest = (self.kv_values - self.kv_rope_values) * _dtype_bytes(dtype)
        return (rope + rest) * self.layers


def _dtype_bytes(dtype: str) -> int:
    if dtype not in BYTES_BY_DTYPE:
        known = ", ".join(sorted(BYTES_BY_DTYPE))
        raise PermanentError(Reason.INVALID_ARGUMENT, f"dtype {dtype!r} is unknown; use {known}.")
    return BYTES_BY_DTYPE[dtype]


@lru_cache(maxsize=256)
def parse_config(text: str) -> ModelShape:
    """Parse the text of a `config.json`, once for all who ask with it.

    Raises:
        PermanentError: INVALID_ARGUMENT or LIMIT_EXCEEDED, naming the field.
    """
    if len(text) > CONFIG_BYTES_MAX:
        raise PermanentError(
            Reason.LIMIT_EXCEEDED, f"model.config is larger than {CONFIG_BYTES_MAX} bytes."
        )
    try:
        config = json.loads(text)
    except ValueError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, f"model.config is no JSON: {error}."
        ) from error
    except RecursionError as error:
        raise PermanentError(
            Reason.INVALID_ARGUMENT, "model.config is nested too deep: it is a flat JSON object."
        ) from error
    if not isinstance(config, dict):
        raise PermanentError(Reason.INVALID_ARGUMENT, "model.config must be a JSON object.")
    return _shape(_Reader(cast("dict[str, Any]", config)))


class _Reader:
    """Checked access to a config's numbers."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def number(
        self, *names: str, default: int | None = None, least: int = 1, most: int = _NUMBER_MAX
    ) -> int:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise _invalid(name, f"must be a whole number, not {_shown(value)}")
            if not least <= value <= most:
                raise _invalid(name, f"must be between {least} and {most}, not {_shown(value)}")
            return value
        if default is None:
            raise _invalid(names[0], "is missing")
        return default

    def text(self, name: str) -> str:
        value = self.config.get(name)
        return value if isinstance(value, str) else ""

    def layer_numbers(self, name: str, layers: int) -> frozenset[int]:
        """A list of layers, each once; null is an empty one."""
        listed: Any = self.config.get(name)
        if listed is None:
            return frozenset()
        if not isinstance(listed, list):
            raise _invalid(name, f"must be a list of layers, not {_shown(listed)}")
        values = cast("list[object]", listed)
        if len(values) > layers:
            raise _invalid(name, f"lists {len(values)} layers of {layers}")
        found: set[int] = set()
        for value in values:
            if not isinstance(value, int) or not 0 <= value < layers:
                raise _invalid(name, f"must list layers below {layers}, not {_shown(value)}")
            found.add(value)
        return frozenset(found)


def _shown(value: Any) -> str:
    """A value as a refusal quotes it: short, whatever was sent."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)[:_SHOWN_CHARACTERS_MAX]


def _invalid(name: str, message: str) -> PermanentError:
    return PermanentError(
        Reason.INVALID_ARGUMENT, f"model.config.{name} {message}.", field=f"model.config.{name}"
    )


def _shape(read: _Reader) -> ModelShape:
    hidden = read.number("hidden_size")
    layers = read.number("num_hidden_layers", most=LAYERS_MAX)
    experts = read.number("n_routed_experts", "num_experts", default=0, least=0, most=EXPERTS_MAX)
    moe_layers = _moe_layers(read, layers) if experts else 0
    expert_weights = 3 * hidden * read.number("moe_intermediate_size") if experts else 0
    chosen = read.number("num_experts_per_tok") if experts else 0
    if chosen > experts:
        raise _invalid("num_experts_per_tok", f"is {chosen}, but there are {experts} experts")
    shared = read.number("n_shared_experts", default=0, least=0) if experts else 0
    attention, kv_values, rope = _attention(read, hidden)
    vocabulary = read.number("vocab_size")
    tied = read.config.get("tie_word_embeddings", False) is True
    dense = 3 * hidden * read.number("intermediate_size", default=0, least=0)
    other = (
        layers * attention
        + (layers - moe_layers) * dense
        + moe_layers * (shared * expert_weights + experts * hidden)
        + vocabulary * hidden * (1 if tied else 2)
    )
    return ModelShape(
        model_type=read.text("model_type")[:64],
        layers=layers,
        moe_layers=moe_layers,
        experts=experts,
        experts_per_token=chosen,
        shared_experts=shared,
        hidden=hidden,
        expert_weights=expert_weights,
        other_weights=other,
        kv_values=kv_values,
        kv_rope_values=rope,
        max_context_tokens=read.number("max_position_embeddings", default=4096),
    )


def _moe_layers(read: _Reader, layers: int) -> int:
    """DeepSeek counts dense layers first; Qwen lists dense layers and a step."""
    dense = read.number("first_k_dense_replace", default=0, least=0)
    listed = read.layer_numbers("mlp_only_layers", layers)
    step = read.number("moe_layer_freq", "decoder_sparse_step", default=1)
    if dense >= layers:
        raise _invalid("first_k_dense_replace", f"leaves no layer with experts of {layers}")
    sparse = [
        layer
        for layer in range(dense, layers)
        if layer not in listed and (step == 1 or (layer + 1) % step == 0)
    ]
    if not sparse:
        raise _invalid("decoder_sparse_step", f"leaves no layer with experts of {layers}")
    return len(sparse)


def _attention(read: _Reader, hidden: int) -> tuple[int, int, int]:
    """(weights a layer, KV values a token and layer, of them rotary).

    Latent attention (DeepSeek-V3 report, section 2.1.1) keeps kv_lora_rank + qk_rope_head_dim
    values; grouped-query attention keeps a key and a value of each KV head.
    """
    heads = read.number("num_attention_heads")
    if read.config.get("kv_lora_rank") is None:
        head = read.number("head_dim", default=max(1, hidden // heads))
        kv_heads = read.number("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise _invalid("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
        weights = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
        return weights, 2 * kv_heads * head, 0
    rank = read.number("kv_lora_rank")
    rope = read.number("qk_rope_head_dim")
    nope = read.number("qk_nope_head_dim")
    value = read.number("v_head_dim")
    q_rank = read.config.get("q_lora_rank")
    query = hidden * heads * (nope + rope)
    if q_rank is not None:
        q_rank = read.number("q_lora_rank")
        query = hidden * q_rank + q_rank * heads * (nope + rope)
    weights = (
        query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    )
    return weights, rank + rope, rope
