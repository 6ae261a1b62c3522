"""Checks that a model separates packed documents and continues prompts, by running it on a few tokens."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from ..retention.attach import read_prompt
from ..retention.decoder_layers import execution_device, replaces_tensors, text_config, text_decoder

TOKENS = 8  # of each of the two documents, or of a prompt and of its continuation


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
    decoder, ids = text_decoder(model), _token_ids(model)
    position_ids = torch.arange(TOKENS, device=ids.device)[None]
    alone = decoder(input_ids=ids[:, TOKENS:], position_ids=position_ids, use_cache=False).last_hidden_state
    both = decoder(input_ids=ids, position_ids=position_ids.repeat(1, 2), use_cache=False).last_hidden_state
    if not _same(both[:, TOKENS:], alone):
        raise ValueError(refusal.format("hidden states of the second one differ from those of the document alone"))


@torch.no_grad()
def require_continuation(model: PreTrainedModel) -> None:
    """Checks that a model reads several tokens after a prompt in its cache as it reads them together with the prompt.

    Raises:
        ValueError: it does not: some state-space layers start anew with every input of several tokens.
    """
    decoder, ids = text_decoder(model), _token_ids(model)
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, TOKENS:]
    prompt = read_prompt(model, ids[:, :TOKENS])
    rest = decoder(input_ids=ids[:, TOKENS:], past_key_values=prompt.new_cache(), use_cache=True).last_hidden_state
    if not _same(rest, whole):
        raise ValueError(
            f"{type(model).__name__} does not continue a prompt from its cache: hidden states after it differ from "
            "those of the whole text; set prompt_share to 0"
        )


def _token_ids(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(2 * TOKENS, device=execution_device(model))
    return ids.remainder(int(text_config(model).vocab_size))[None]


def _same(states: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether hidden states are equal up to rounding: the faults looked for change them by their own size."""
    error = float((states - wanted).abs().max() / wanted.abs().max())
    return error <= torch.finfo(wanted.dtype).eps ** 0.5
