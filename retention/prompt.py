"""Reading a prompt once without gates, and attaching them for what comes after it.

When a prompt is evicted once, at its end, its tokens attend as in the plain model: their keys, values and gate inputs
do not depend on the gates. So they are computed once, without a graph, and only the tokens after the prompt run with
gates, a forward and a backward over a fraction of the sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from .attach import GatedInterceptor, attention_call
from .gates import RetentionGates
from .ops.after_prompt import biased_attention, gated_attention_after
from .seams import AttentionCall, AttentionLayer, Interceptor, intercept, text_config, text_decoder
from .soft_eviction import SoftEviction


@dataclass(frozen=True)
class Prompt:
    """What a model computed over a prompt.

    Attributes:
        hidden_states: by layer index, the attention module's inputs `(batch, prompt_len, hidden_size)`.
        cache: keys and values of all layers; not to be written to, see `new_cache`.
        length: tokens.
    """

    hidden_states: dict[int, torch.Tensor]
    cache: DynamicCache
    length: int

    def new_cache(self) -> DynamicCache:
        """A cache that starts with the prompt. Its layers share the prompt's tensors until they grow into new ones."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


class _Reader(Interceptor):
    def __init__(self) -> None:
        self.hidden_states: dict[int, torch.Tensor] = {}

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> None:
        self.hidden_states[layer.layer_idx] = hidden_states


@torch.no_grad()
def read_prompt(model: PreTrainedModel, input_ids: torch.Tensor) -> Prompt:
    """Runs the plain model over `input_ids` `(batch, prompt_len)`, no padding, and keeps what attaching later needs.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model.
    """
    reader, cache = _Reader(), DynamicCache(config=text_config(model))
    with intercept(model, reader):
        text_decoder(model)(input_ids=input_ids, past_key_values=cache, use_cache=True)
    return Prompt(reader.hidden_states, cache, input_ids.shape[1])


class AttachedAfter(GatedInterceptor):
    """What `attach_after` yields."""

    def __init__(self, gates: RetentionGates, prompt: Prompt, eviction: SoftEviction | None) -> None:
        super().__init__(gates)
        self.prompt = prompt
        self._of_prompt = {index: gates.log_beta(index, prompt.hidden_states[index]) for index in gates.layer_indices}
        self._log_weight: dict[int, torch.Tensor] = {}
        if eviction is not None:
            weights = eviction.log_weight(torch.stack(list(self._of_prompt.values())))
            self._log_weight = dict(zip(gates.layer_indices, weights, strict=True))

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._log_beta = {}
        return kwargs | {"past_key_values": self.prompt.new_cache(), "use_cache": True}

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall:
        index = layer.layer_idx
        log_beta = torch.cat((self._of_prompt[index], self.gates.log_beta(index, hidden_states)), dim=-1)
        self._log_beta[index] = log_beta
        bias = None
        if self._log_weight:
            bias = nn.functional.pad(self._log_weight[index], (0, hidden_states.shape[1]))

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
            if bias is None:
                return gated_attention_after(query, key, value, log_beta, scaling)
            return biased_attention(query, key, value, bias, scaling)

        return attention_call(attend)


@contextmanager
def attach_after(
    model: PreTrainedModel, gates: RetentionGates, prompt: Prompt, eviction: SoftEviction | None = None
) -> Iterator[AttachedAfter]:
    """Inside the block a forward of the model's decoder continues `prompt`, under gates; no padding, no dropout.

    Args:
        eviction: how the prompt is evicted; what comes after it is kept. None lets all keys decay instead, as in
            `attach`, for the queries after the prompt.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model.
        ValueError: the gates do not fit the model, or it is already inside an attach() or evict() block.
    """
    gates.check_model(model)
    attached = AttachedAfter(gates, prompt, eviction)
    with intercept(model, attached):
        yield attached
