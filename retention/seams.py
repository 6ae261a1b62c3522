"""The seams through which tenure meets a transformers model: hooks and a registered attention function.

No modelling file is forked and no forward is replaced. While `intercept` is active

1. a pre-hook on the text decoder sees the keyword arguments of its forward (2-D mask, position ids, cache),
2. a pre-hook on every full-attention module sees its input hidden states and hands the module an
   `AttentionCall` as the keyword argument `tenure`, which transformers passes on to the attention function,
3. that function, registered once in transformers' attention interface, runs the call; without one (a sliding-window
   layer, another model with the same configuration object) it runs the ordinary function.

On leaving, the hooks are removed and the configuration is restored, so the model behaves bit for bit as before.
"""

from __future__ import annotations

import inspect
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger(__name__)

SUPPORTED_FAMILIES = (
    "Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Phi-3, Gemma-3 and other decoders of transformers >= 5.2 that use its "
    "attention interface and have full-attention layers"
)
PREFIX = "tenure_"

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
# call(base, module, query, key, value, attention_mask, **kwargs) -> (output (batch, seq, heads, head_dim), weights)
AttentionCall = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class UnsupportedModelError(ValueError):
    """The model cannot be attached to; the message names the model, the reason and the supported families."""


@dataclass(frozen=True)
class AttentionLayer:
    """One full-attention layer of a decoder.

    Attributes:
        layer_idx: index of the layer in the decoder, the one its cache layer has.
        name: dotted module name, e.g. `model.layers.0.self_attn`.
        module: the attention module.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads and the key's head dimension.
    """

    layer_idx: int
    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the text decoder (`model.config` itself for text-only models)."""
    return model.config.get_text_config(decoder=True)


def full_attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The causal full-attention layers of `model`, in order of `layer_idx`.

    Sliding-window and linear layers are left out: they bound their own memory.

    Raises:
        UnsupportedModelError: the model has no such layer or does not use the attention interface.
    """
    config = text_config(model)
    kind = type(model).__name__
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise _unsupported(kind, "it caps its attention logits (attn_logit_softcapping)")
    cache_layers = DynamicCache(config=config).layers
    layers = []
    for name, module in model.named_modules():
        if not _is_attention(module, config):
            continue
        if hasattr(module, "sinks"):
            raise _unsupported(kind, "its attention has learned sinks")
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if index < len(cache_layers) and getattr(cache_layers[index], "is_sliding", False):
            continue
        num_heads = int(config.num_attention_heads)
        groups = int(getattr(module, "num_key_value_groups", 1))
        head_dim = int(getattr(module, "head_dim", None) or getattr(module, "qk_head_dim", None) or 0)
        layers.append(AttentionLayer(index, name, module, num_heads, num_heads // groups, head_dim))
    if not layers:
        raise _unsupported(kind, "no causal full-attention layer that uses the attention interface was found")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the decoder layers (`LlamaModel` inside `LlamaForCausalLM`)."""
    name = full_attention_layers(model)[0].name
    path = name.split(".")
    while path and not path[-1].isdigit():
        path.pop()
    return model.get_submodule(".".join(path[:-2]))


def _is_attention(module: nn.Module, config: Any) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int) or not getattr(module, "is_causal", False):
        return False
    if getattr(module, "config", None) is not config or "Attention" not in type(module).__name__:
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    takes_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    uses_interface = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    takes_cache = any(p.name == "past_key_values" for p in parameters)
    return takes_kwargs and uses_interface and takes_cache


def _unsupported(kind: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{kind} is not supported: {reason}. Supported: {SUPPORTED_FAMILIES}.")


class Interceptor(ABC):
    """Handler of `intercept` while a model runs. One forward of the decoder is one `begin` … `end`."""

    @abstractmethod
    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Called before the decoder's forward with its arguments by name; returns those to use instead."""

    @abstractmethod
    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall | None:
        """Called before a layer's attention with its input `(batch, seq_len, hidden_size)`.

        Returns the call that computes this layer's attention, or None for the ordinary attention.
        """

    def end(self, completed: bool) -> None:  # noqa: B027 - attaching needs nothing here
        """Called after the decoder's forward; `completed` is False when the forward raised."""


def is_intercepted(model: PreTrainedModel) -> bool:
    """Is `model` inside an `attach` or `evict` block?"""
    return str(text_config(model)._attn_implementation).startswith(PREFIX)


@contextmanager
def intercept(model: PreTrainedModel, interceptor: Interceptor) -> Iterator[list[AttentionLayer]]:
    """Routes the full-attention layers of `model` through `interceptor` inside the `with` block.

    Yields:
        The layers that are intercepted.
    Raises:
        UnsupportedModelError: see `full_attention_layers`.
        ValueError: the model is already inside an `attach` or `evict` block.
    """
    layers = full_attention_layers(model)
    config = text_config(model)
    base = config._attn_implementation or "eager"
    if is_intercepted(model):
        raise ValueError(
            f"{type(model).__name__} is already inside an attach() or evict() block; leave that one first "
            "(one block at a time per model)"
        )
    decoder = text_decoder(model)
    names = list(inspect.signature(decoder.forward).parameters)
    running = [False]

    def before_decoder(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        bound = dict(zip(names, args, strict=False)) | kwargs
        running[0] = True
        return (), interceptor.begin(bound)

    def after_decoder(module: nn.Module, args: tuple, output: Any) -> None:
        if running[0]:
            running[0] = False
            interceptor.end(completed=output is not None)

    with ExitStack() as stack:
        handles = [
            decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
            decoder.register_forward_hook(after_decoder, always_call=True),
        ]
        handles += [layer.module.register_forward_pre_hook(_pre_hook(layer, interceptor), with_kwargs=True)
                    for layer in layers]
        for handle in handles:
            stack.callback(handle.remove)
        stack.callback(setattr, config, "_attn_implementation", base)
        config._attn_implementation = _register(base)
        yield layers


def _pre_hook(layer: AttentionLayer, interceptor: Interceptor) -> Callable[..., Any]:
    def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        call = interceptor.call(layer, hidden_states)
        return args, kwargs if call is None else kwargs | {"tenure": call}

    return before_attention


def _register(base: str) -> str:
    """Registers, once per base implementation, the attention function called `tenure_<base>`."""
    name = PREFIX + base
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        dropout: float = 0.0, *, tenure: AttentionCall | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        kwargs["dropout"] = dropout  # by position where kvpress has wrapped this function
        ordinary = _base_function(base, module)
        if tenure is None:
            return ordinary(module, query, key, value, attention_mask, **kwargs)
        return tenure(ordinary, module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attention)
    # Without a mask function of its own, a registered attention name gets no mask at all.
    if base in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _base_function(base: str, module: nn.Module) -> AttentionFunction:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a sequence, as `model.generate` takes them from the generation configuration."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    configured = model.config.eos_token_id if configured is None else configured
    if configured is None:
        return frozenset()
    return frozenset(configured if isinstance(configured, list | tuple) else [configured])
