"""Checks that a model separates packed documents and continues prompts, by running it on a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from ..retention.continuation import check_token_ids, continues_from_cache, same_states
from ..retention.decoder_layers import replaces_tensors, text_config, text_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 8  # of each of two documents


@torch.no_grad()
def require_packing(model: PreTrainedModel) -> None:
    """Checks, by its layers and by two short documents, that a model reads packed documents as it reads each alone.

    Raises:
        ValueError: it does not: its positions or its state-space layers continue from one document into the next.
    """
    kinds = [type(layer).__name__ for layer in DynamicCache(config=text_config(model)).layers
             if not replaces_tensors(layer)]  # fmt: skip
    refusal = f"{type(model).__name__} does not separate packed documents: {{}}; set pack to false"
    if kinds:
        raise ValueError(refusal.format(f"the state in its {kinds[0]}s passes from one document to the next"))
    decoder, ids = text_decoder(model), check_token_ids(model, 2 * TOKENS)
    position_ids = torch.arange(TOKENS, device=ids.device)[None]
    alone = decoder(input_ids=ids[:, TOKENS:], position_ids=position_ids, use_cache=False).last_hidden_state
    both = decoder(input_ids=ids, position_ids=position_ids.repeat(1, 2), use_cache=False).last_hidden_state
    if not same_states(both[:, TOKENS:], alone):
        raise ValueError(refusal.format("hidden states of the second one differ from those of the document alone"))


def require_continuation(model: PreTrainedModel) -> None:
    """Checks that a model reads several tokens after a prompt in its cache as it reads them together with the prompt.

    Raises:
        ValueError: it does not: some state-space layers start anew with every input of several tokens.
    """
    if not continues_from_cache(model):
        raise ValueError(
            f"{type(model).__name__} does not continue a prompt from its cache: hidden states after it differ from "
            "those of the whole text; set prompt_share to 0"
        )
