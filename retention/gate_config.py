"""The shape and initialisation of a set of retention gates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tenure.checked import Range, Size, read, verify
from tenure.documents import plain_line, shown

from .decoder_layers import full_attention_layers, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LAYERS = 4096  # of a model that gates are for
Width = Annotated[int, Range(1, 1 << 24)]
Projection = Literal["per_layer", "per_layer_deep", "shared", "shared_heads"]
"""Output projections of gates that are trained here."""


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
            index); `per_layer_deep` has two hidden layers and an output projection a layer (files of DBTrimKV whose
            tensors differ by layer); `shared_heads` is the wording of the DBTrimKV paper (one vector for all layers and
            heads over features that each head has of its own); `fast_kvzip` is Fast KVzip's gate, whose scores no
            projection follows (`kvzip_gate`).
        activation: the model's MLP activation, by its transformers name.
        initial_bias: bias of the output before training; 18 means β ≈ 1, nothing is forgotten at step 0.
        init_std: standard deviation of the weights before training.
        num_groups, num_sinks: of `fast_kvzip`, whose `gate_width` is the dimension of queries and keys; 0 for others.

    Raises:
        ValueError: a value of another type or out of its range, or layers that are not distinct and rising.
    """

    hidden_size: Width
    num_kv_heads: Annotated[int, Range(1, 1 << 16)]
    layer_indices: Annotated[tuple[Annotated[int, Range(0, 1 << 16)], ...], Size(1, MAX_LAYERS)]
    gate_width: Width = 512
    projection: Projection | Literal["fast_kvzip"] = "shared"
    activation: str = "silu"
    initial_bias: Annotated[float, Range(-1e6, 1e6)] = 18.0
    init_std: Annotated[float, Range(0, 1e6)] = 0.02
    num_groups: Annotated[int, Range(0, 1 << 16)] = 0
    num_sinks: Annotated[int, Range(0, 1 << 16)] = 0

    def __post_init__(self) -> None:
        from transformers.activations import ACT2FN  # slow

        verify(self)
        sizes = self.num_groups, self.num_sinks
        if (min(sizes) if self.projection == "fast_kvzip" else 1 - max(sizes)) < 1:
            raise ValueError(
                f"got num_groups and num_sinks {sizes} with projection {self.projection!r}; accepted: above 0 with "
                "fast_kvzip, and 0 with others"
            )
        if self.activation not in ACT2FN:
            raise ValueError(
                f"got {shown(self.activation)} as activation; accepted: transformers' names, such as silu, gelu, relu"
            )
        if sorted(set(self.layer_indices)) != list(self.layer_indices):
            raise ValueError(
                f"got {plain_line(self.layer_indices, 100)} as layer_indices; accepted: distinct layers in rising order"
            )

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
            "num_kv_heads": layers[0].all_kv_heads,
            "layer_indices": tuple(layer.layer_idx for layer in layers),
            "activation": activation,
        }
        return cls(**(found | overrides))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        values = asdict(self) | {"layer_indices": list(self.layer_indices)}
        if self.projection != "fast_kvzip":  # files of the other gates are as they were
            del values["num_groups"], values["num_sinks"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetentionConfig:
        """The configuration of what `to_dict` gave.

        Raises:
            ValueError: unknown or missing fields (all are named), or a value of another type or out of its range.
        """
        return read(cls, values, "the gate configuration")
