"""Whether a model continues several tokens from its cache as it reads them at once; some state-space layers do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from .decoder_layers import execution_device, text_config, text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8  # of a prompt, and of its continuation


@torch.no_grad()
def continues_from_cache(model: PreTrainedModel) -> bool:
    """Whether hidden states of tokens after a prompt in transformers' own cache are those of the whole text.

    The decoder's `forward` is called directly, so that hooks on the decoder, an `evict` block's, do not see it.
    """
    decoder: Any = text_decoder(model)
    ids = check_token_ids(model, 2 * TOKENS)
    whole = decoder.forward(input_ids=ids, use_cache=False).last_hidden_state[:, TOKENS:]
    cache = DynamicCache(config=text_config(model))
    decoder.forward(input_ids=ids[:, :TOKENS], past_key_values=cache, use_cache=True)
    rest = decoder.forward(input_ids=ids[:, TOKENS:], past_key_values=cache, use_cache=True).last_hidden_state
    return same_states(rest, whole)


def check_token_ids(model: PreTrainedModel, count: int) -> torch.Tensor:
    """Different token ids `(1, count)` from all over the model's vocabulary, on its device.

    The first ids of many vocabularies are control tokens: hidden states of several in a row have massive entries, whose
    rounding in bf16 is as large as other tokens' states.
    """
    size = int(text_config(model).vocab_size)
    ids = torch.arange(count, device=execution_device(model)) * max(1, size // count)
    return ids.remainder(size)[None]


def same_states(states: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether hidden states are equal up to rounding: the faults looked for change them by their own size."""
    error = float((states - wanted).float().norm() / wanted.float().norm())
    return error <= torch.finfo(wanted.dtype).eps ** 0.5
