"""What a set of retention gates looks like."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from .seams import full_attention_layers, text_config

Projection = Literal["per_layer", "shared", "shared_heads"]


@dataclass(frozen=True)
class RetentionConfig:
    """Shape and initialisation of the gates of one model.

    Attributes:
        hidden_size: width of the hidden states the gates read.
        num_kv_heads: key/value heads of every gated layer.
        layer_indices: the full-attention layers that have a gate.
        gate_width: features inside a gate.
        projection: `per_layer` is TRIM-KV's gate ("rg": one hidden layer, an output projection a layer);
            `shared` is DBTrimKV's ("rg10": two hidden layers, ONE projection for all layers with a row per head
            index); `shared_heads` is the wording of the DBTrimKV paper (one vector for all layers and heads over
            features that each head has of its own).
        activation: the model's MLP activation, by its transformers name.
        initial_bias: bias of the output before training; 18 means β ≈ 1, nothing is forgotten at step 0.
        init_std: standard deviation of the weights before training.
    """

    hidden_size: int
    num_kv_heads: int
    layer_indices: tuple[int, ...]
    gate_width: int = 512
    projection: Projection = "shared"
    activation: str = "silu"
    initial_bias: float = 18.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_indices", tuple(int(i) for i in self.layer_indices))
        if self.projection not in get_args(Projection):
            raise ValueError(f"projection is {self.projection!r}; accepted: {', '.join(get_args(Projection))}")
        for name in ("hidden_size", "num_kv_heads", "gate_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a positive number is accepted")
        if not self.layer_indices or sorted(set(self.layer_indices)) != list(self.layer_indices):
            raise ValueError(f"layer_indices is {self.layer_indices}; distinct layers in rising order are accepted")

    @classmethod
    def for_model(cls, model: PreTrainedModel, **overrides: Any) -> RetentionConfig:
        """The configuration for all full-attention layers of `model`; `overrides` replace single fields.

        Raises:
            UnsupportedModelError: tenure cannot attach to the model.
        """
        layers = full_attention_layers(model)
        config = text_config(model)
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"
        found: dict[str, Any] = {
            "hidden_size": int(config.hidden_size),
            "num_kv_heads": layers[0].num_kv_heads,
            "layer_indices": tuple(layer.layer_idx for layer in layers),
            "activation": activation,
        }
        return cls(**(found | overrides))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layer_indices": list(self.layer_indices)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetentionConfig:
        """Raises ValueError naming unknown and absent fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        absent = sorted({"hidden_size", "num_kv_heads", "layer_indices"} - set(values))
        if unknown or absent:
            raise ValueError(f"gate configuration has unknown fields {unknown} and lacks {absent}")
        return cls(**values)
