"""The reference model's sizes, from a Hugging Face style config of type `raddle_reference`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from raddle.model.errors import PermanentError, Reason

MODEL_TYPE = "raddle_reference"
# Integer products run through float32 and are exact while K x 127^2 < 2^24.
EXACT_WIDTH_MAX = 1_040


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the reference model; every layer is a mixture of experts."""

    hidden: int
    layers: int
    experts: int
    experts_per_token: int
    intermediate: int
    heads: int
    head: int
    vocabulary: int
    context_max: int
    seed: int
    digest: str

    @property
    def attention(self) -> int:
        return self.heads * self.head


def parse_shape(config_text: str) -> Shape:
    """The shape of a config.

    Raises:
        PermanentError: ENGINE_UNSUPPORTED for another model, INVALID_ARGUMENT for wrong sizes.
    """
    config = json.loads(config_text)
    if config.get("model_type") != MODEL_TYPE:
        raise PermanentError(
            Reason.ENGINE_UNSUPPORTED,
            f"the reference engine runs {MODEL_TYPE} models, not {config.get('model_type')!r}.",
        )
    shape = Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        experts=config["n_routed_experts"],
        experts_per_token=config["num_experts_per_tok"],
        intermediate=config["moe_intermediate_size"],
        heads=config["num_attention_heads"],
        head=config["head_dim"],
        vocabulary=config["vocab_size"],
        context_max=config["max_position_embeddings"],
        seed=config["weights_seed"],
        digest=hashlib.sha256(config_text.encode()).hexdigest(),
    )
    widest = max(shape.hidden, shape.intermediate, shape.attention)
    if widest > EXACT_WIDTH_MAX:
        raise PermanentError(
            Reason.INVALID_ARGUMENT,
            f"a width of {widest} is above {EXACT_WIDTH_MAX}: integer products would not be exact.",
        )
    return shape
