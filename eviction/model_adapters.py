"""Parts of a model that policies read: the rotation of its queries (`Rotary`) and a layer's output projection W_O."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..retention.continuation import TOKENS, check_token_ids, same_states
from ..retention.decoder_layers import (
    AttentionLayer,
    execution_device,
    full_attention_layers,
    text_config,
    text_decoder,
)
from ..retention.seams import AttentionCall, Interceptor, intercept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Model types whose attention code was reviewed: every full-attention layer rotates the whole query by
# `apply_rotary_pos_emb(q, k, cos, sin)` with the decoder's `rotary_emb` and one position a token. Others are tried out
# (`find_rotary`), except for kvpress's presses, which compute queries and rotations by themselves.
ROTARY_TYPES = ("gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe")

MROPE_AXES = 3  # time, height and width

# Names of the output projection in attention modules.
OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
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


def is_rotary_reviewed(model: PreTrainedModel) -> bool:
    """Whether the way `model` rotates its queries is one that `ROTARY_TYPES` names."""
    return text_config(model).model_type in ROTARY_TYPES


class Rotary:
    """The rotation R(p) that a model gives the query at position p, through the model's own functions.

    R is linear in its cosines and sines, so the inverse and the average over positions are rotations with other cosines
    and sines, for whichever pairs of channels a model rotates. Channels behind the cosines' are left as they are
    (partial rotary). With M-RoPE a token has three positions, of which text behind the prompt has three equal ones.

    Args:
        unrotated: layers that do not rotate their queries (NoPE).
    Attributes:
        axes: positions of a token: 3 with M-RoPE, else 0, for one without an axis of its own.
    """

    def __init__(self, model: PreTrainedModel, unrotated: frozenset[int] = frozenset()) -> None:
        self._unrotated = unrotated
        # A copy: the module may rescale its frequencies for positions beyond those that the model has seen.
        self._embedding: Any = copy.deepcopy(getattr(text_decoder(model), "rotary_emb", None))
        module = full_attention_layers(model)[0].module
        functions = sys.modules[type(module).__module__]
        self._apply: Callable[..., tuple[torch.Tensor, torch.Tensor]] = getattr(functions, "apply_rotary_pos_emb", None)  # type: ignore[assignment]
        forward = getattr(self._embedding, "forward", None)
        typed = forward is not None and "layer_type" in inspect.signature(forward).parameters
        self._layer_type = {"layer_type": "full_attention"} if typed else {}
        self.axes = MROPE_AXES if any("mrope_section" in each for each in rope_parameters(text_config(model))) else 0

    def of_layer(self, layer_idx: int) -> Rotary:
        """The rotation of a layer's queries."""
        return NoRotation() if layer_idx in self._unrotated else self

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, fp32 `(batch, n, rotary_dim)`, of int64 `positions` `(batch, n)`, or three with M-RoPE."""
        if self._embedding is None:
            none = torch.empty(*positions.shape[-2:], 0, device=positions.device)
            return none, none
        if self.axes and positions.ndim == 2:
            positions = positions.expand(self.axes, -1, -1)
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
        rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if not rest.shape[-1]:
            return self._apply(x, x[:, :1], cos, sin)[0]
        return torch.cat([self._apply(rotated, rotated[:, :1], cos, sin)[0], rest], -1)


class NoRotation(Rotary):
    """Of layers that do not rotate their queries."""

    def __init__(self) -> None:
        pass

    def undo(self, queries: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return queries.float()

    def average(
        self, mean: torch.Tensor, covariance: torch.Tensor, start: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return mean, covariance


class QueryProbe(Interceptor):
    """Keeps the queries of every full-attention layer, fp32 `(1, num_heads, n, head_dim)`."""

    def __init__(self) -> None:
        self.found: dict[int, torch.Tensor] = {}

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall:
        def keep(base: AttentionCall, module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.found[layer.layer_idx] = query.float()
            return base(module, query, *args, **kwargs)

        return keep


@torch.no_grad()
def find_rotary(model: PreTrainedModel, layers: list[AttentionLayer]) -> Rotary | None:
    """The rotation of a model's queries; None if they are not rotated by its own `rotary_emb` and function.

    Models that are not among `ROTARY_TYPES` read a few tokens twice, at positions that differ by a constant: every
    layer's queries before RoPE are the same both times, and so are those of a layer without RoPE. With M-RoPE the
    constant is another for each axis, and each axis counts in another way.
    """
    if is_rotary_reviewed(model):
        return Rotary(model)
    decoder: Any = text_decoder(model)
    config = text_config(model)
    scaled = any("llama_4_scaling_beta" in each for each in rope_parameters(config))  # by position, far from 0
    scaled |= bool(getattr(config, "attn_temperature_tuning", False))
    if scaled or "position_ids" not in inspect.signature(decoder.forward).parameters:
        return None
    rotary = Rotary(model)
    ids, count = check_token_ids(model, TOKENS), torch.arange(TOKENS, device=execution_device(model))
    positions = torch.stack([count, 2 * count, count // 2])[:, None] if rotary.axes else count[None]
    shift = torch.tensor([13, 17, 19], device=count.device)[: len(positions), None, None] if rotary.axes else 13
    runs = []
    for place in (positions, positions + shift):
        queries = QueryProbe()
        with intercept(model, queries, layers):
            decoder(input_ids=ids, position_ids=place, use_cache=False)
        runs.append((place, queries.found))
    (_, first), (_, second) = runs
    unrotated = frozenset(index for index, states in first.items() if same_states(second[index], states))
    for index in first.keys() - unrotated:
        try:
            states, again = (rotary.undo(found[index], rotary.angles(place)) for place, found in runs)
        except (RuntimeError, TypeError, ValueError):  # no such function, or one of other arguments
            return None
        if states.shape != first[index].shape or not same_states(again, states):
            return None
    return Rotary(model, unrotated)


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
    return weight.t() if isinstance(projection, nn.Linear) else weight  # Conv1D stores (in, out)


def _responses_to_unit_vectors(projection: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    weight = getattr(projection, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        dtype = weight.dtype
    units = torch.eye(_in_features(projection), dtype=dtype, device=device)
    bias = projection(torch.zeros_like(units[:1]))  # zeros where the layer has none
    return projection(units) - bias
