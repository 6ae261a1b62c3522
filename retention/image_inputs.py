"""The inputs that a model with images hands to its text decoder; taken once, forwards share the tower's work."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .decoder_layers import plain_model, text_decoder, unsupported
from .seams import named_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ImageInputs:
    """The decoder's arguments for a sequence with images.

    Attributes:
        arguments: by name, without a cache: embeddings with the images' features in them, positions, masks, and what a
            family adds (Qwen3-VL's deepstack features).
        rope_deltas: `(batch, 1)` int64, M-RoPE's offset of the text that follows; None for other models.
    """

    arguments: dict[str, Any]
    rope_deltas: torch.Tensor | None

    def positions_after(self, seen: int, count: int) -> torch.Tensor:
        """int64 `(3, batch, count)`: positions of text after `seen` tokens, the same in time, height and width."""
        assert self.rope_deltas is not None, "the model has M-RoPE"
        after = torch.arange(seen, seen + count, device=self.rope_deltas.device)
        return (after + self.rope_deltas).expand(3, -1, -1)


class _DecoderReached(Exception):
    """Ends the model's forward where its decoder would begin."""


@torch.no_grad()
def image_inputs(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> ImageInputs:
    """Runs the model up to its text decoder: the vision tower once, the decoder not at all.

    Args:
        input_ids: `(batch, seq_len)`, no padding, with the processor's placeholders for images.
        inputs: the model's other inputs: `pixel_values` and so on.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model, or its decoder was not reached.
        ValueError, RuntimeError: as the model itself, e.g. for placeholders that do not match the images.
    """
    model, decoder = plain_model(model), text_decoder(model)
    names = list(inspect.signature(decoder.forward).parameters)
    found: dict[str, Any] = {}

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.update(named_arguments(names, args, kwargs))
        raise _DecoderReached

    holder: Any = next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)
    if holder is not None:
        holder.rope_deltas = None  # of whatever ran before
    placed = {name: _like(value, model) for name, value in inputs.items()}
    handle = decoder.register_forward_pre_hook(take, with_kwargs=True)
    try:
        model(input_ids=input_ids, **placed, use_cache=False)
        raise unsupported(model, "its forward does not run the text decoder")
    except _DecoderReached:
        pass
    finally:
        handle.remove()
    arguments = {name: value for name, value in found.items() if name not in ("past_key_values", "use_cache")}
    return ImageInputs(arguments, None if holder is None else getattr(holder, "rope_deltas", None))


def _like(value: Any, model: PreTrainedModel) -> Any:
    """Floating-point inputs, pixels, in the model's dtype."""
    return value.to(model.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
