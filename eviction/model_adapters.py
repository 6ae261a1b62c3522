"""Parts of a model that policies read: its rotary embedding (`Rotary`) and a layer's output projection W_O."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..retention.decoder_layers import AttentionLayer, full_attention_layers, text_config, text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Model types whose attention code was reviewed: every full-attention layer rotates the whole query by
# `apply_rotary_pos_emb(q, k, cos, sin)` with the decoder's `rotary_emb` and one position a token.
ROTARY_TYPES = ("gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")

# Names of the output projection in attention modules.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")
# Kinds of RoPE whose frequencies depend on the length of the input, so that a prompt's chunks would get others.
LENGTH_DEPENDENT = frozenset({"dynamic", "longrope"})


def rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of RoPE in a decoder's configuration: one set, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [part for part in given.values() if isinstance(part, Mapping)]
    return nested or [given]


def rope_type(parameters: Mapping[str, Any]) -> str:
    """The kind of RoPE with these parameters."""
    return parameters.get("rope_type") or parameters.get("type") or "default"


def rotates_queries(model: PreTrainedModel) -> bool:
    """Whether `Rotary` supports the way `model` rotates its queries."""
    return text_config(model).model_type in ROTARY_TYPES


class Rotary:
    """The rotation R(p) that a model gives the query at position p, through the model's own functions.

    R is linear in its cosines and sines, so the inverse and the average over positions are rotations with other cosines
    and sines, for whichever pairs of channels a model rotates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        assert rotates_queries(model), "the session has checked the model"
        # A copy: the module may rescale its frequencies for positions beyond those that the model has seen.
        self._embedding: Any = copy.deepcopy(text_decoder(model).rotary_emb)
        module = full_attention_layers(model)[0].module
        self._apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = sys.modules[
            type(module).__module__
        ].apply_rotary_pos_emb
        typed = "layer_type" in inspect.signature(self._embedding.forward).parameters
        self._layer_type = {"layer_type": "full_attention"} if typed else {}

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, fp32 `(batch, n, rotary_dim)`, of int64 `positions` `(batch, n)`."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        return self._embedding(like, positions, **self._layer_type)

    def undo(self, queries: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Queries before RoPE, fp32 `(batch, num_heads, n, head_dim)`, from those after it at these `angles`."""
        cos, sin = angles
        scale = cos.square() + sin.square()  # 1, or the square of YaRN's attention factor
        return self._rotate(queries.float(), cos / scale, -sin / scale)

    def average(
        self, mean: torch.Tensor, covariance: torch.Tensor, start: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and covariance of queries under the average rotation R̄ of `count` positions from `start` on.

        Args:
            mean: fp32 `(batch, num_heads, head_dim)` before RoPE.
            covariance: fp32 `(batch, num_heads, head_dim, head_dim)` before RoPE.
            start: int64 `(batch,)`.

        Returns:
            `R̄ μ` and `R̄ Σ R̄ᵀ`, shaped as given.
        """
        positions = start.unsqueeze(1) + torch.arange(count, device=start.device)
        cos, sin = (part.mean(1, keepdim=True) for part in self.angles(positions))
        rotated = self._rotate(mean.unsqueeze(2), cos, sin).squeeze(2)
        for _ in range(2):  # the rows, then the columns: Σ is symmetric
            covariance = self._rotate(covariance, cos, sin).transpose(2, 3)
        return rotated, covariance

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return self._apply(x, x[:, :1], cos, sin)[0]


def has_output_weight(layer: AttentionLayer) -> bool:
    """Whether `output_weight` is available: the output projection has a floating-point weight in memory."""
    projection = _output_projection(layer)
    if projection is None or not projection.weight.is_floating_point():
        return False
    if type(projection.weight.data) is not torch.Tensor or projection.weight.is_meta:
        return False  # quantized by a tensor subclass, or offloaded
    return _by_head(projection).shape[0] % layer.num_heads == 0


def output_weight(layer: AttentionLayer) -> torch.Tensor:
    """W_O of a layer with `has_output_weight`: `(num_heads, value_dim, hidden_size)`, a view of the weight."""
    projection = _output_projection(layer)
    assert projection is not None, "the session has checked the module"
    return _by_head(projection).unflatten(0, (layer.num_heads, -1))


def _output_projection(layer: AttentionLayer) -> Any:
    """The linear layer that maps the heads' outputs to hidden states; None if it has another name or kind."""
    from transformers.pytorch_utils import Conv1D

    found = (getattr(layer.module, name, None) for name in OUTPUT_PROJECTIONS)
    return next((module for module in found if isinstance(module, nn.Linear | Conv1D)), None)


def _by_head(projection: Any) -> torch.Tensor:
    """The weight as `(num_heads · value_dim, hidden_size)`."""
    weight = projection.weight.detach()
    return weight.t() if isinstance(projection, nn.Linear) else weight  # Conv1D stores (in, out)
