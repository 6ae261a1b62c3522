"""The seams through which tenure meets a transformers model: hooks and a registered attention function.

No modelling file is forked and no forward is replaced. While `intercept` is active

1. a pre-hook on the model sees the arguments of a call, and one on the text decoder those of its forward (mask,
   position ids, cache),
2. a pre-hook on every full-attention module sees its input hidden states and hands the module an
   `AttentionCall` as the keyword argument `tenure`, which transformers passes on to the attention function,
3. that function, registered once in transformers' attention interface, runs the call; without one (a sliding-window
   layer, another model with the same configuration object) it runs the ordinary function.

On leaving, the hooks are removed and the configuration is restored, so the model behaves bit for bit as before.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from .attention_arguments import refuse_inputs_of_generate, refuse_tokens, refuse_unknown_tokens
from .decoder_layers import (
    AttentionLayer,
    decoder_of,
    full_attention_layers,
    plain_model,
    text_config,
    text_decoder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "tenure_"

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
# call(base, module, query, key, value, attention_mask, **kwargs) -> (output (batch, seq, heads, head_dim), weights)
AttentionCall = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class Interceptor(ABC):
    """Handler of `intercept` while a model runs.

    A call of the model is one `begin_call` … `end_call`, with one forward of the decoder in it, or several; a forward
    is one `begin` … `end`. A decoder that is called directly has no call around it.

    Attributes:
        reads_masks: False if no call reads an attention mask: then the model makes none of `seq_len²` elements for its
            full-attention layers (it would for packed documents).
    """

    reads_masks: ClassVar[bool] = True

    def begin_call(self, kwargs: dict[str, Any]) -> None:  # noqa: B027 - most handlers need nothing here
        """Called before the model's forward with its arguments by name."""

    def end_call(self) -> None:  # noqa: B027 - most handlers need nothing here
        """Called after the model's forward, also if it raised."""

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


class _DecoderHooks:
    """The hooks around the decoder's forward."""

    def __init__(self, decoder: nn.Module, interceptor: Interceptor, config: Any, implementation: str) -> None:
        self.interceptor, self.config, self.implementation = interceptor, config, implementation
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.thread: int | None = None  # the one that runs a forward

    def __deepcopy__(self, memo: dict[int, Any]) -> _DecoderHooks:
        raise ValueError("got a copy of a model inside an attach() or evict() block; copy it outside")

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.config._attn_implementation != self.implementation:
            raise ValueError(
                f"got the attention implementation {self.config._attn_implementation!r}, set inside an attach() or "
                "evict() block; set it before the block"
            )
        if self.thread not in (None, threading.get_ident()):
            raise ValueError("a forward of this model is running in another thread; accepted: one thread at a time")
        if self.thread is not None:
            self.interceptor.end(completed=False)  # Ctrl-C ended it: torch runs no hooks for a KeyboardInterrupt
        arguments = named_arguments(self.names, args, kwargs)
        refuse_tokens(arguments)
        self.thread = threading.get_ident()
        return (), self.interceptor.begin(arguments)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.thread == threading.get_ident():
            self.thread = None
            self.interceptor.end(completed=output is not None)


def is_intercepted(model: PreTrainedModel) -> bool:
    """Is `model`, or another model with the same configuration object, inside an `attach` or `evict` block?"""
    return str(text_config(model)._attn_implementation).startswith(PREFIX)


@contextmanager
def intercept(
    model: PreTrainedModel, interceptor: Interceptor, layers: list[AttentionLayer] | None = None
) -> Iterator[list[AttentionLayer]]:
    """Routes the full-attention layers of `model` through `interceptor` inside the `with` block.

    A compiled model runs uncompiled in it (and so does everything else that torch.compile has compiled).

    Args:
        layers: the model's full-attention layers, where an earlier block found them: finding takes milliseconds.

    Yields:
        The layers that are intercepted.
    Raises:
        UnsupportedModelError: see `full_attention_layers`.
        ValueError: the model, or one that shares its configuration object, is already inside an `attach` or `evict`
            block.
    """
    given, model = model, plain_model(model)
    layers = full_attention_layers(model) if layers is None else layers
    config, decoder = text_config(model), decoder_of(model, layers)
    base = config._attn_implementation or "eager"
    if is_intercepted(model):
        hooks = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
        if any(isinstance(hook, _DecoderHooks) for hook in hooks):
            raise ValueError(
                f"{type(model).__name__} is already inside an attach() or evict() block; leave that one first "
                "(one block at a time per model)"
            )
        raise ValueError(
            f"another model with the same configuration object as this {type(model).__name__} is inside an attach() or "
            "evict() block; give each model a configuration of its own (copy.deepcopy)"
        )
    with ExitStack() as stack:
        stack.callback(setattr, config, "_attn_implementation", base)
        config._attn_implementation = _register(base, interceptor.reads_masks)
        hooks = _DecoderHooks(decoder, interceptor, config, config._attn_implementation)
        handles = [
            decoder.register_forward_pre_hook(hooks.before, with_kwargs=True),
            decoder.register_forward_hook(hooks.after, always_call=True),
        ]
        if decoder is not model:
            handles += _call_hooks(model, interceptor)
        handles += _token_hooks(model, layers)
        stack.enter_context(_checked_generate(model))
        handles += [
            layer.module.register_forward_pre_hook(_pre_hook(layer, interceptor), with_kwargs=True) for layer in layers
        ]
        for handle in handles:
            stack.callback(handle.remove)
        if _is_compiled(given):
            # Compilation would trace through the hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield layers


def _is_compiled(model: nn.Module) -> bool:
    """Whether `model`, a part of it or its forward is compiled by torch.compile."""
    return any(
        hasattr(module, "_orig_mod")  # torch.compile's wrapper; importing its class would take seconds
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def named_arguments(names: list[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def _call_hooks(model: PreTrainedModel, interceptor: Interceptor) -> list[Any]:
    names = list(inspect.signature(model.forward).parameters)

    def before_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        interceptor.begin_call(named_arguments(names, args, kwargs))

    def after_model(module: nn.Module, args: tuple, output: Any) -> None:
        interceptor.end_call()

    return [
        model.register_forward_pre_hook(before_model, with_kwargs=True),
        model.register_forward_hook(after_model, always_call=True),
    ]


def _token_hooks(model: PreTrainedModel, layers: list[AttentionLayer]) -> list[Any]:
    """A hook on the embedding, by which unknown ids are refused in a sentence; none where its rows are divided."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or layers[0].shards.count > 1:
        return []
    vocabulary, name = embedding.num_embeddings, type(model).__name__

    def before_lookup(module: nn.Module, args: tuple) -> None:
        if args:
            refuse_unknown_tokens(args[0], vocabulary, name)

    return [embedding.register_forward_pre_hook(before_lookup)]


@contextmanager
def _checked_generate(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `generate` refuses in a sentence what transformers would fail on before the model runs."""
    name = "_prepare_model_inputs"  # the first step of generate that has its arguments by name
    prepare = getattr(model, name, None)
    if prepare is None:
        yield
        return

    def checked(inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
        refuse_inputs_of_generate(model_kwargs if inputs is None else model_kwargs | {"input_ids": inputs})
        return prepare(inputs, bos_token_id, model_kwargs)

    setattr(model, name, checked)
    try:
        yield
    finally:
        delattr(model, name)


def _pre_hook(layer: AttentionLayer, interceptor: Interceptor) -> Callable[..., Any]:
    def before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        call = interceptor.call(layer, hidden_states)
        return args, kwargs if call is None else kwargs | {"tenure": call}

    return before_attention


def _register(base: str, masks: bool) -> str:
    """Registers, once, the attention function called `tenure_<base>`, or `tenure_maskless_<base>` without `masks`."""
    from transformers import AttentionInterface, AttentionMaskInterface  # slow: a model's classes have imported them
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = PREFIX + ("" if masks else "maskless_") + base
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
        ordinary = ALL_MASK_ATTENTION_FUNCTIONS[base]
        AttentionMaskInterface.register(name, ordinary if masks else _without_causal_masks(ordinary))
    return name


def _without_causal_masks(ordinary: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function of transformers that gives None instead of a causal mask over whole documents.

    Masks of sliding windows and chunks are made as ever, and so are those by which a token sees the next one (images,
    prefixes), which attention calls refuse.
    """

    def mask(*, mask_function: Callable[..., torch.Tensor], local_size: int | None = None, **kwargs: Any) -> Any:
        if local_size is None and not kwargs.get("use_vmap") and not _sees_the_next(mask_function, **kwargs):
            return None
        sizes = {} if local_size is None else {"local_size": local_size}
        return ordinary(mask_function=mask_function, **sizes, **kwargs)

    return mask


def _sees_the_next(
    mask_function: Callable[..., torch.Tensor], *, batch_size: int, q_length: int = 0, q_offset: int = 0,
    device: torch.device | str = "cpu", cache_position: torch.Tensor | None = None, **kwargs: Any,
) -> bool:  # fmt: skip
    """Whether any token attends to the one after it; `cache_position` is what older transformers give for `q_…`."""
    if cache_position is None:
        cache_position = torch.arange(q_length, device=device) + q_offset
    if len(cache_position) < 2:
        return False
    tokens = cache_position[None, :-1]
    rows = torch.arange(batch_size, device=tokens.device)[:, None]
    return bool(mask_function(rows, torch.zeros_like(rows), tokens, tokens + 1).any())


def _base_function(base: str, module: nn.Module) -> AttentionFunction:
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[base]


class OutputHead:
    """A model's own logits of given last hidden states, with all that it does around its output embedding.

    What a family does after its decoder (scaling, capping, further layers) is nowhere written a second time: the model
    runs, and during a call a module that returns the given states takes the decoder's place, so that no layer runs.
    One run of the decoder over one token, in the first call, shows what else its output holds.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = _language_model(model)
        decoder = text_decoder(model)
        path = next(name for name, module in self.head.named_modules() if module is decoder)
        parent, _, self.name = path.rpartition(".")
        self.parent = self.head.get_submodule(parent)
        self.decoder, self._form = decoder, None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Args:
            hidden_states: `(n, hidden_size)`, the decoder's last hidden states of any tokens.

        Returns:
            `(n, vocab_size)`, the model's dtype, differentiable in `hidden_states`.
        """
        token = torch.zeros(1, 1, dtype=torch.long, device=hidden_states.device)
        if self._form is None:
            with torch.no_grad():
                self._form = self.decoder(input_ids=token, use_cache=False)
        output = copy.copy(self._form)
        output["last_hidden_state"] = hidden_states[None]
        modules = self.parent._modules
        modules[self.name] = _Given(self.decoder, output)
        try:
            return self.head(input_ids=token, use_cache=False).logits[0]
        finally:
            modules[self.name] = self.decoder


class _Given(nn.Module):
    """In a decoder's place: returns a given output; anything else is the decoder's own."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__.update(_decoder=decoder, _output=output)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_output"]


def _language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The innermost model around the decoder that has an output embedding: the text model of some with images."""
    from transformers import PreTrainedModel

    model, decoder = plain_model(model), text_decoder(model)
    around = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module is not decoder and decoder in module.modules()
    ]
    heads = [module for module in around if isinstance(module.get_output_embeddings(), nn.Module)]
    return heads[-1] if heads else model


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Token ids that end a sequence, as `model.generate` takes them from the generation configuration."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    configured = model.config.eos_token_id if configured is None else configured
    if configured is None:
        return frozenset()
    return frozenset(configured if isinstance(configured, list | tuple) else [configured])
