"""Checks of the arguments of a model and of its attention calls, and masks that attention functions compute.

An unknown argument of an attention call is refused by name: a model that passes one computes something else than
attention over its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from tenure.documents import shown

from .ops.softmax import ORDINARY, Softmax

# Arguments for variants of the softmax, which tenure computes (`ops.softmax`): capped logits and learned sinks.
SOFTMAX = frozenset({"softcap", "s_aux"})
# Known arguments that do not change the attention over the given queries, keys, values and mask, or are handled by the
# caller (`scaling`, `dropout`). Positions are applied before; the others are for the model around the attention.
NEUTRAL = frozenset(
    {"scaling", "dropout", "position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"}
    | {"num_items_in_batch", "output_hidden_states", "output_router_logits"}
)
KNOWN = NEUTRAL | SOFTMAX
INTEGERS = (torch.int64, torch.int32)


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def refuse_tokens(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError unless a decoder's arguments hold token ids `(batch, n)` or embeddings of tokens, n >= 1.

    Positions, if any, must be as many.
    """
    embeddings = arguments.get("inputs_embeds")
    name, given = ("inputs_embeds", embeddings) if embeddings is not None else ("input_ids", arguments.get("input_ids"))
    if given is None:
        return  # the model says so
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"got {shown(given)} as {name}; accepted: a tensor, such as tokenizer(…, return_tensors='pt')")
    dims, accepted = (2, "(batch, tokens)") if name == "input_ids" else (3, "(batch, tokens, hidden_size)")
    if given.ndim != dims or given.numel() == 0:
        hint = f"; {name}[None] is a batch of one row" if given.ndim == dims - 1 and given.numel() else ""
        raise ValueError(f"got {name} {tuple(given.shape)}; accepted: {accepted} of at least one token{hint}")
    if name == "input_ids" and given.dtype not in INTEGERS:
        raise ValueError(f"got input_ids in {given.dtype}; accepted: token ids in torch.int64")
    positions = arguments.get("position_ids")
    if isinstance(positions, torch.Tensor) and (positions.ndim < 2 or positions.shape[-1] != given.shape[1]):
        raise ValueError(
            f"got position_ids {tuple(positions.shape)} for {name} {tuple(given.shape)}; accepted: (batch or 1, tokens)"
        )


def refuse_inputs_of_generate(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError unless `generate` can read its inputs, mask and cache; transformers itself fails on others."""
    refuse_tokens(arguments)
    name = "input_ids" if arguments.get("inputs_embeds") is None else "inputs_embeds"
    given, mask, cache = (arguments.get(one) for one in (name, "attention_mask", "past_key_values"))
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"got {shown(cache)} as past_key_values; accepted: a cache, such as session.new_cache()")
    if mask is None or given is None:
        return
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else None
    if shape is None or len(shape) != 2 or shape[0] != len(given) or shape[1] < given.shape[1]:
        raise ValueError(
            f"got attention_mask {shown(mask) if shape is None else shape} for {name} {tuple(given.shape)}; "
            f"accepted: a tensor {tuple(given.shape[:2])}, 0 for padding"
        )


def refuse_unknown_tokens(ids: Any, vocabulary: int, model: str) -> None:
    """Raises ValueError for a token id that the embedding has no row for.

    Ids on another device are not inspected: the host would have to wait for them.
    """
    if not isinstance(ids, torch.Tensor) or ids.device.type != "cpu" or ids.dtype not in INTEGERS or ids.numel() == 0:
        return
    lowest, highest = (int(one) for one in ids.aminmax())
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"got the token id {lowest if lowest < 0 else highest}; accepted: 0 to {vocabulary - 1}, the vocabulary of "
            f"{model} (is the tokenizer that of another model?)"
        )


def softmax_of(kwargs: dict[str, Any]) -> Softmax:
    """The softmax that an attention call requests."""
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    return ORDINARY if softcap is None and sinks is None else Softmax(softcap, sinks)


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises ValueError if an attention call requests something that only the model's own attention function computes.

    An argument that is None or False requests nothing, except `is_causal=False`.
    """
    if kwargs.keys() <= KNOWN:
        return
    given = [name for name, value in kwargs.items() if name not in KNOWN and _requests(name, value)]
    if given:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(sorted(given))} to its attention function, which attention "
            f"under attach() or evict() does not compute; accepted: {', '.join(sorted(KNOWN))}"
        )


def _requests(name: str, value: Any) -> bool:
    if name == "is_causal":
        return value is False
    return value is not None and value is not False


def refuse_dropout(kwargs: dict[str, Any]) -> None:
    """Raises ValueError if an attention call has dropout, which tenure's attention functions do not compute."""
    if kwargs.get("dropout"):
        raise ValueError(f"got attention dropout {kwargs['dropout']}; accepted: 0 (call model.eval())")


def padding_mask(given: Any, of_call: Any) -> Any:
    """The padding mask behind the one that a decoder gets.

    Models with images make one mask for each kind of layer and give the decoder a dict of them; the padding mask is
    then the one that the model was called with.

    Args:
        given: the decoder's `attention_mask`.
        of_call: that of the call of the model, None if there was none.
    """
    return of_call if isinstance(given, dict) else given


def is_causal(mask: Any, q_len: int) -> bool:
    """Whether a model's attention mask lets no new token see a later one.

    Args:
        mask: as the attention function gets it: None or a 2-D padding mask, both causal, or
            `(batch, 1 or heads, q_len, kv_len)`, bool (True: visible) or added to the logits, whose last `q_len`
            columns are the new tokens.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or q_len == 1:
        return True
    square = mask[..., -q_len:]
    hidden = ~square if square.dtype == torch.bool else square <= torch.finfo(square.dtype).min / 2
    later = torch.ones(q_len, q_len, dtype=torch.bool, device=mask.device).triu(1)
    return bool((hidden | ~later).all())
