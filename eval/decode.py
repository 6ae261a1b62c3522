"""Greedy decoding on a cache that already holds the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import Cache, PreTrainedModel

from ..retention.seams import end_tokens


def read(model: PreTrainedModel, cache: Cache, ids: Sequence[int], logits_to_keep: int = 0) -> torch.Tensor:
    """Feeds one row of tokens after what `cache` holds, and extends the cache by them.

    Args:
        ids: at least one token id.
        logits_to_keep: logits of that many last positions; 0 for all.

    Returns:
        Logits `(positions, vocab)` in the model's dtype.
    """
    tokens = torch.tensor([list(ids)], device=model.device)
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep)
    return output.logits[0]


def greedy(
    model: PreTrainedModel,
    cache: Cache,
    ids: Sequence[int],
    max_new_tokens: int,
    stop: Callable[[list[int]], bool] = lambda generated: False,
) -> list[int]:
    """What `model.generate(do_sample=False)` appends to `ids`, one token at a time.

    Args:
        cache: holds what comes before `ids`; it is extended.
        stop: sees the tokens generated so far after each of them and may end the generation; a token that ends the
            sequence ends it anyway.
    """
    ending = end_tokens(model)
    generated: list[int] = []
    following = list(ids)
    while len(generated) < max_new_tokens:
        token = int(read(model, cache, following, logits_to_keep=1)[-1].argmax())
        generated.append(token)
        if token in ending or stop(generated):
            break
        following = [token]
    return generated


def greedy_from_teacher(
    model: PreTrainedModel,
    cache: Cache,
    gold: Sequence[int],
    logits: torch.Tensor,
    max_new_tokens: int,
    stop: Callable[[list[int]], bool] = lambda generated: False,
) -> list[int]:
    """`greedy` after the question, at no cost as far as the model agrees with the gold answer.

    Where every teacher-forced choice is the gold token, greedy decoding would have taken the same path; so decoding
    proper starts only at the first token that differs.

    Args:
        cache: holds everything up to the end of the question; it is extended.
        logits: `(1 + len(gold), vocab)`: of the question's last token and of the gold answer fed after it.
    """
    ending = end_tokens(model)
    generated: list[int] = []
    for choice, expected in zip(logits.argmax(-1).tolist(), [*gold, None], strict=True):
        generated.append(choice)
        if choice in ending or len(generated) >= max_new_tokens or stop(generated):
            return generated
        if choice != expected:
            break
    before = list(generated)
    return before + greedy(model, cache, before, max_new_tokens - len(before), lambda more: stop(before + more))
