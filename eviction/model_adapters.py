"""Parts of a model that policies read: its rotary embedding (`Rotary`) and a layer's output projection W_O."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..retention.decoder_layers import (
    AttentionLayer,
    execution_device,
    full_attention_layers,
    text_config,
    text_decoder,
)

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
        cos, sin = self._embedding(like, positions, **self._layer_type)
        return cos.to(positions.device), sin.to(positions.device)  # from where accelerate computes them

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
    """Whether `output_weight` is available: the output projection is a linear layer that takes the heads' values."""
    projection = _output_projection(layer)
    if projection is None:
        return False
    weight = _readable_weight(projection, layer.shards.count > 1)
    if weight is None and layer.shards.count > 1:
        return False  # it sums over the heads of all processes
    width = _in_features(projection) if weight is None else weight.shape[0]
    return width > 0 and width % layer.num_heads == 0


@torch.no_grad()
def output_weight(layer: AttentionLayer, dtype: torch.dtype) -> torch.Tensor:
    """W_O of a layer with `has_output_weight`, as the model applies it now.

    A weight that is quantised, offloaded by accelerate or extended by an adapter cannot be read; then W_O is what the
    projection makes of unit vectors, at the cost of a forward of the projection over `num_heads · value_dim` tokens.

    Args:
        dtype: of the unit vectors where the projection's own weight has none (packed integers): the model's dtype.

    Returns:
        `(num_heads, value_dim, hidden_size)`: a view of the weight where it can be read, else a new tensor.
    """
    projection = _output_projection(layer)
    assert projection is not None, "the session has checked the module"
    weight = _readable_weight(projection, layer.shards.count > 1)
    if weight is None:
        weight = _responses_to_unit_vectors(projection, dtype, execution_device(layer.module))
    return weight.unflatten(0, (layer.num_heads, -1))


def _output_projection(layer: AttentionLayer) -> Any:
    """The linear layer that maps the heads' outputs to hidden states; None if it has another name or kind."""
    found = (getattr(layer.module, name, None) for name in OUTPUT_PROJECTIONS)
    return next((module for module in found if isinstance(module, nn.Module) and _in_features(module)), None)


def _in_features(projection: Any) -> int:
    """Width of a linear layer's input, in the words of torch, peft and of quantised layers; 0 for other modules."""
    if isinstance(projection, Conv1D):
        return int(projection.nx)
    width = getattr(projection, "in_features", 0)
    return width if isinstance(width, int) else 0


def _readable_weight(projection: Any, divided: bool) -> torch.Tensor | None:
    """The projection's matrix `(num_heads · value_dim, hidden_size)`, a view; None if it is not one tensor in memory.

    Args:
        divided: whether tensor parallelism divides the heads: then of those of this process.
    """
    if not isinstance(projection, nn.Linear | Conv1D) or hasattr(projection, "get_base_layer"):
        return None  # of another kind, or with an adapter of peft
    weight: Any = projection.weight.detach()
    if hasattr(weight, "to_local"):  # a DTensor
        weight = weight.to_local() if divided else weight.full_tensor()
    if not weight.is_floating_point() or type(weight) is not torch.Tensor or weight.is_meta:
        return None  # quantised, or offloaded
    return weight if isinstance(projection, Conv1D) else weight.t()


def _responses_to_unit_vectors(projection: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    weight = getattr(projection, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        dtype = weight.dtype
    units = torch.eye(_in_features(projection), dtype=dtype, device=device)
    bias = projection(torch.zeros_like(units[:1]))  # zeros where the layer has none
    return projection(units) - bias
