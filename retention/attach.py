"""Attaching gates to a model, over whole sequences (training) or after a prompt that is read once without them.

When a prompt is evicted once, at its end, its tokens attend as in the plain model: their keys, values and gate inputs
do not depend on the gates. So they are computed once, without a graph, and only the tokens after the prompt run with
gates, a forward and a backward over a fraction of the sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .attention_arguments import is_causal, padding_mask, refuse_dropout, refuse_unknown, softmax_of
from .context_parallel import SequencePart
from .decoder_layers import (
    AttentionLayer,
    DifferentiableStates,
    LinearAttentionLayer,
    copy_cache_layer,
    execution_device,
    full_attention_layers,
    plain_model,
    text_config,
    text_decoder,
)
from .gates import RetentionGates
from .ops import gated_attention
from .ops.after_prompt import biased_attention, gated_attention_after
from .ops.gated_attention import Implementation
from .ops.softmax import Softmax
from .recomputed_prompt import GatesReader, recomputed_log_beta
from .seams import AttentionCall, AttentionFunction, Interceptor, intercept, is_intercepted
from .segments import Segments
from .soft_eviction import SoftEviction

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GatedInterceptor(Interceptor):
    """Runs gates next to a model's layers and keeps the log β of the last forward."""

    def __init__(self, gates: RetentionGates) -> None:
        self.gates = gates
        self._log_beta: dict[int, torch.Tensor] = {}
        self._call_mask: Any = None  # `attention_mask` of the running call of the model
        self._causal_mask: Any = None  # the 4-D mask that was found to be causal in this forward

    def begin_call(self, kwargs: dict[str, Any]) -> None:
        self._call_mask = kwargs.get("attention_mask")

    def end_call(self) -> None:
        self._call_mask = None

    def end(self, completed: bool) -> None:
        self._causal_mask = None

    def attention_call(self, attend: Callable[..., torch.Tensor]) -> AttentionCall:
        """A call that computes attention by `attend(query, key, value, scaling, softmax)`.

        Its result is `(batch, num_heads, q_len, dim)`.

        It raises ValueError for arguments that `attend` does not take into account, and for masks that are not causal.
        """

        def call(
            base: AttentionFunction, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            attention_mask: Any, scaling: float | None = None, **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:  # fmt: skip
            refuse_unknown(module, kwargs)
            refuse_dropout(kwargs)
            if attention_mask is not self._causal_mask and not is_causal(attention_mask, query.shape[2]):
                raise ValueError(
                    f"{type(module).__name__} was given a mask by which tokens see later ones (an image or a prefix "
                    "that attends in both directions); accepted under gates: causal masks"
                )
            self._causal_mask = attention_mask
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = attend(query, key, value, scaling, softmax_of(kwargs))
            return output.transpose(1, 2).contiguous(), None

        return call

    def log_beta(self) -> torch.Tensor:
        """log β of the last forward (with its prompt, if it had one), with its graph.

        Returns:
            `(layers, batch, num_kv_heads, seq_len)` fp32.
        Raises:
            RuntimeError: the model has not run inside this context.
        """
        if len(self._log_beta) != len(self.gates.layer_indices):
            raise RuntimeError("log_beta() needs a forward of the attached model first")
        device = self.gates.bias.device
        return torch.stack([self._log_beta[index].to(device) for index in self.gates.layer_indices])


def _require_one_device(model: PreTrainedModel, layers: list[AttentionLayer]) -> None:
    """Raises ValueError for `layers` on several devices, or with heads that are divided among processes."""
    devices = sorted({str(execution_device(layer.module)) for layer in layers})
    if layers[0].shards.count > 1:
        kind = type(plain_model(model)).__name__
        raise ValueError(f"got {kind} in tensor parallel; accepted by attach(): a model whose process has all heads")
    if len(devices) > 1:
        kind = type(plain_model(model)).__name__
        raise ValueError(
            f"got {kind} on {', '.join(devices)}; accepted by attach(): a model on one device, or divided by FSDP2"
        )


def _for_heads(per_entry: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A number for each entry, `(batch, num_kv_heads, seq_len)`, for the heads of `key`.

    They differ for latent attention (MLA): one gate for all heads that are expanded from a latent.
    """
    return per_entry.expand(-1, key.shape[1], -1) if per_entry.shape[1] == 1 else per_entry


class Attached(GatedInterceptor):
    """A model with attached gates, as `attach` yields it.

    Attributes:
        segments: documents and padding of the last forward; None before the first.
        implementation: how the gated attention is computed, see `retention.ops.gated_attention`.
        layers: the model's full-attention layers, found when the block is entered.
        part: this process's part of the sequences, where several share them; then `segments` and `log_beta()` are
            of the whole sequences.
    """

    reads_masks = False  # documents and padding are in `segments`

    def __init__(
        self, model: PreTrainedModel, gates: RetentionGates, implementation: Implementation,
        part: SequencePart | None = None,
    ) -> None:  # fmt: skip
        super().__init__(gates)
        self.model = model
        self.implementation: Implementation = implementation
        self.part = part
        self.segments: Segments | None = None
        self.layers: list[AttentionLayer] | None = None

    def again(self) -> AbstractContextManager[Any]:
        """Re-attaches while gradient checkpointing runs layers of the last forward again, after the block has ended."""
        return nullcontext() if is_intercepted(self.model) else intercept(self.model, self, self.layers)

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if inputs is None:
            raise ValueError("the model was called without input_ids and without inputs_embeds")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"got a cache of {cache.get_seq_length()} tokens inside attach(), which runs over whole sequences; "
                "accepted: calls without one; to generate, use evict()"
            )
        self._log_beta = {}
        if self.part is not None:
            self.segments = self.part.segments
            return kwargs
        mask = padding_mask(kwargs.get("attention_mask"), self._call_mask)
        self.segments = Segments.from_inputs(
            inputs.shape[0], inputs.shape[1], mask, kwargs.get("position_ids"), inputs.device
        )
        return kwargs

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall:
        log_beta = self.gates.log_beta(layer.layer_idx, hidden_states)
        if self.part is None:
            self._keep(layer, log_beta)

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softmax: Softmax
        ) -> torch.Tensor:
            if self.part is None:
                return self._attend(query, key, value, _for_heads(log_beta, key), scaling, softmax)
            key, value, gathered = self.part.context.gather(key, value, log_beta)
            self._keep(layer, gathered)
            return self._attend(query, key, value, _for_heads(gathered, key), scaling, softmax)

        return self.attention_call(attend)

    def _keep(self, layer: AttentionLayer, log_beta: torch.Tensor) -> None:
        # Gradient checkpointing runs a layer again in backward: the first run's graph is the one to keep.
        self._log_beta.setdefault(layer.layer_idx, log_beta)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
        softmax: Softmax,
    ) -> torch.Tensor:  # fmt: skip
        """Gated attention of this process's queries over all keys."""
        assert self.segments is not None
        if self.part is None:
            return gated_attention(query, key, value, log_beta, scaling, self.segments, self.implementation, softmax)
        kernels = self.implementation if self.implementation in ("auto", "triton") else "reference"
        return self.part.attention(query, key, value, log_beta, scaling, kernels, softmax)


class AttachedPlain(Attached):
    """The ungated model over whole sequences: gated attention at log β = 0, which needs no mask for packed rows."""

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall:
        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softmax: Softmax
        ) -> torch.Tensor:
            if self.part is not None:
                key, value = self.part.context.gather(key, value)
            none = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
            return self._attend(query, key, value, none, scaling, softmax)

        return self.attention_call(attend)


@contextmanager
def attach_plain(
    model: PreTrainedModel, gates: RetentionGates, implementation: Implementation, part: SequencePart | None = None
) -> Iterator[None]:
    """Inside the block a forward computes what the plain model computes, in memory linear in packed rows.

    Args:
        gates: not used; those of `attach`, which are checked there.
        part: as in `attach`.
    """
    with intercept(model, AttachedPlain(model, gates, implementation, part)):
        yield


@contextmanager
def attach(
    model: PreTrainedModel, gates: RetentionGates, implementation: Implementation = "auto", *, check: bool = True,
    part: SequencePart | None = None,
) -> Iterator[Attached]:  # fmt: skip
    """Gates the full-attention layers of `model` inside the `with` block, for whole sequences (training).

    Packed documents are recognised by restarting `position_ids` (without a mask), padding by the 2-D
    `attention_mask`. The model itself is left unchanged: outside the block it computes as before, bit for bit.
    To generate under a budget use `tenure.eviction.evict`.

    Args:
        check: whether the gates are checked against the model, which waits for the model's device.
        part: the model is given this process's part of the sequences, with their `position_ids` and without a mask.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model.
        ValueError: the gates do not fit the model, or it is already inside an attach() or evict() block.
    """
    if check:
        gates.check_model(model)
    attached = Attached(model, gates, implementation, part)
    with intercept(model, attached) as attached.layers:
        _require_one_device(model, attached.layers)
        yield attached


@dataclass(frozen=True)
class Prompt:
    """A prompt that a model has read: its hidden states, keys and values.

    Attributes:
        input_ids: `(batch, prompt_len)`.
        hidden_states: by layer index, the attention module's inputs `(batch, prompt_len, hidden_size)`; or none, when
            the prompt is to be read again in backward.
        cache: keys, values and recurrent states of all layers; not to be written to, see `new_cache`.
        log_beta: by layer index, without a graph, in place of the hidden states.
    """

    input_ids: torch.Tensor
    hidden_states: dict[int, torch.Tensor]
    cache: DynamicCache
    log_beta: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens."""
        return self.input_ids.shape[1]

    @property
    def in_keys_alone(self) -> bool:
        """Whether keys and values of the full-attention layers are all that later tokens need of it."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def new_cache(self) -> DynamicCache:
        """A cache that starts with the prompt, and shares its tensors where layers replace theirs in every forward."""
        cache = copy.copy(self.cache)
        layers: list[Any] = [
            DifferentiableStates.of(layer) if type(layer) is LinearAttentionLayer else copy_cache_layer(layer)
            for layer in self.cache.layers
        ]
        cache.layers = layers
        return cache


class _Reader(Interceptor):
    def __init__(self) -> None:
        self.hidden_states: dict[int, torch.Tensor] = {}

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> None:
        self.hidden_states[layer.layer_idx] = hidden_states


@torch.no_grad()
def read_prompt(
    model: PreTrainedModel, input_ids: torch.Tensor, gates: RetentionGates | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Prompt:  # fmt: skip
    """Runs the plain model over `input_ids` `(batch, prompt_len)`, no padding; keeps what `attach_after` needs.

    Args:
        gates: if given, hidden states are not kept, but log β; backward then reads the prompt again. Not with
            `arguments`.
        arguments: of the decoder, in place of the token ids: those of a prompt with images, see `image_inputs`.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model.
    """
    cache = DynamicCache(config=text_config(model))
    reader = _Reader() if gates is None else GatesReader(gates)
    with intercept(model, reader):
        given = {"input_ids": input_ids} if arguments is None else dict(arguments)
        text_decoder(model)(**given | {"past_key_values": cache, "use_cache": True})
    if isinstance(reader, GatesReader):
        return Prompt(input_ids, {}, cache, reader.log_beta)
    return Prompt(input_ids, reader.hidden_states, cache)


Recomputed = Literal["nothing", "gates", "layers"]


class AttachedAfter(GatedInterceptor):
    """A model that continues a prompt under gates, as `attach_after` yields it."""

    reads_masks = False  # one document a row, without padding

    def __init__(
        self, model: PreTrainedModel, gates: RetentionGates, prompt: Prompt, eviction: SoftEviction | None,
        recomputed: Recomputed,
    ) -> None:  # fmt: skip
        super().__init__(gates)
        self.model, self.prompt, self.recomputed = model, prompt, recomputed
        self.layers: list[AttentionLayer] | None = None
        self._of_prompt = self._prompt_log_beta()
        self._log_weight: dict[int, torch.Tensor] = {}
        if eviction is not None:
            weights = eviction.log_weight(torch.stack(list(self._of_prompt.values())))
            self._log_weight = dict(zip(gates.layer_indices, weights, strict=True))

    def _prompt_log_beta(self) -> dict[int, torch.Tensor]:
        gates, prompt = self.gates, self.prompt
        if prompt.log_beta:
            return recomputed_log_beta(self.model, gates, prompt.input_ids, prompt.log_beta)
        if self.recomputed == "nothing":
            return {index: gates.log_beta(index, prompt.hidden_states[index]) for index in gates.layer_indices}
        found: dict[int, Any] = {
            index: checkpoint(gates.log_beta, index, prompt.hidden_states[index], use_reentrant=False)
            for index in gates.layer_indices
        }
        return found

    def again(self) -> AbstractContextManager[Any]:
        """As `Attached.again`."""
        return nullcontext() if is_intercepted(self.model) else intercept(self.model, self, self.layers)

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._log_beta = {}
        if self.recomputed != "layers":
            return kwargs | {"past_key_values": self.prompt.new_cache(), "use_cache": True}
        # Transformers hands no cache to layers that it recomputes: the prompt's keys are joined in the attention.
        ids = kwargs["input_ids"]
        positions = torch.arange(self.prompt.length, self.prompt.length + ids.shape[1], device=ids.device)[None]
        return kwargs | {"past_key_values": None, "use_cache": False, "position_ids": positions}

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall:
        index = layer.layer_idx
        log_beta = torch.cat((self._of_prompt[index], self.gates.log_beta(index, hidden_states)), dim=-1)
        self._log_beta.setdefault(index, log_beta)
        bias = None
        if self._log_weight:
            bias = nn.functional.pad(self._log_weight[index], (0, hidden_states.shape[1]))

        def attend(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, softmax: Softmax
        ) -> torch.Tensor:
            if self.recomputed == "layers":
                before: Any = self.prompt.cache.layers[index]
                key, value = torch.cat((before.keys, key), dim=2), torch.cat((before.values, value), dim=2)
            if bias is None:
                return gated_attention_after(query, key, value, _for_heads(log_beta, key), scaling, softmax=softmax)
            return biased_attention(query, key, value, _for_heads(bias, key), scaling, softmax=softmax)

        return self.attention_call(attend)


@contextmanager
def attach_after(
    model: PreTrainedModel, gates: RetentionGates, prompt: Prompt, eviction: SoftEviction | None = None,
    recomputed: Recomputed = "nothing",
) -> Iterator[AttachedAfter]:  # fmt: skip
    """Inside the block a forward of the model's decoder continues `prompt`, under gates; no padding, no dropout.

    Args:
        eviction: the eviction of the prompt; the tokens after it are kept. None lets all keys decay instead, as in
            `attach`, for the queries after the prompt.
        recomputed: what is computed again in backward, to save memory: `gates` over the prompt; `layers` after it as
            well, for which the caller turns on gradient checkpointing and wraps recomputation in `again()`.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model.
        ValueError: the gates do not fit the model, or it is already inside an attach() or evict() block; `layers` with
            a model whose layers keep more of a prompt than keys and values (windows, states, latents).
    """
    gates.check_model(model)
    if recomputed not in get_args(Recomputed):
        raise ValueError(f"got recomputed {recomputed!r}; accepted: {', '.join(get_args(Recomputed))}")
    if recomputed == "layers" and not recomputes_after(model, prompt):
        raise ValueError(
            f"{type(model).__name__} keeps more of a prompt than the keys and values of full attention; accepted as "
            "recomputed: nothing, gates"
        )
    attached = AttachedAfter(model, gates, prompt, eviction, recomputed)
    with intercept(model, attached) as attached.layers:
        _require_one_device(model, attached.layers)
        yield attached


def recomputes_after(model: PreTrainedModel, prompt: Prompt) -> bool:
    """Whether layers after a prompt can be computed again from its keys and values."""
    return prompt.in_keys_alone and not any(layer.latent for layer in full_attention_layers(model))
