"""The shape and initialisation of a set of retention gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tenure.checked import Range, Size, read, verify

from .decoder_layers import full_attention_layers, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    Raises:
        ValueError: a value of another type or out of its range, or layers that are not distinct and rising.
    """

    hidden_size: Annotated[int, Range(1)]
    num_kv_heads: Annotated[int, Range(1)]
    layer_indices: Annotated[tuple[Annotated[int, Range(0)], ...], Size(1)]
    gate_width: Annotated[int, Range(1)] = 512
    projection: Projection = "shared"
    activation: str = "silu"
    initial_bias: float = 18.0
    init_std: Annotated[float, Range(0)] = 0.02

    def __post_init__(self) -> None:
        verify(self)
        if sorted(set(self.layer_indices)) != list(self.layer_indices):
            raise ValueError(f"got {self.layer_indices} as layer_indices; accepted: distinct layers in rising order")

    @classmethod
    def for_model(cls, model: PreTrainedModel, **overrides: Any) -> RetentionConfig:
        """The configuration for all full-attention layers of `model`; `overrides` replace single fields.

        Raises:
            UnsupportedModelError: tenure cannot attach to the model.
        """
        from torch import nn
        from transformers.activations import ACT2FN

        layers = full_attention_layers(model)
        config = text_config(model)
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None) or "silu"
        if isinstance(ACT2FN[activation], nn.Module) and list(ACT2FN[activation].parameters()):
            activation = "silu"  # a learned activation, such as Apertus' xIELU, is a part of the model
        found: dict[str, Any] = {
            "hidden_size": int(config.hidden_size),
            "num_kv_heads": layers[0].num_kv_heads,
            "layer_indices": tuple(layer.layer_idx for layer in layers),
            "activation": activation,
        }
        return cls(**(found | overrides))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return asdict(self) | {"layer_indices": list(self.layer_indices)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetentionConfig:
        """The configuration of what `to_dict` gave.

        Raises:
            ValueError: unknown or missing fields (all are named), or a value of another type or out of its range.
        """
        return read(cls, values, "the gate configuration")
