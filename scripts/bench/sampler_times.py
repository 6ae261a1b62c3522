"""Time of the batched sampler against transformers' processors on the same logits, for `tenure bench engine`."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .benching import BenchRow, alternate, median_ratio

if TYPE_CHECKING:
    import torch

    from ...serving.sampling.params import SamplingParams

PROMPT_TOKENS = 1000
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature+top_p": {"temperature": 0.8, "top_p": 0.95},
    "all": {
        "temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02, "repetition_penalty": 1.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {5: 1.0, 7: 2.0}, "logprobs": 5,
    },
}  # fmt: skip


def sampler_rows(
    vocab_size: int = 49152,
    batches: Sequence[int] = (8, 64),
    runs: int = 7,
    dtype: str = "float32",
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> list[BenchRow]:
    """Rows `sampler/b8/greedy` and so on: microseconds per row of the batch, tokens on the host included.

    Both sides apply the same parameters to random logits, in turn; transformers has no presence and frequency penalty
    and is spared them. `ratio` is transformers' time over ours.
    """
    import torch

    from ...serving.sampling.params import SamplingParams
    from ...serving.sampling.sampler import Sampler

    draws, found = random.Random(0), []
    prompt = [draws.randrange(vocab_size) for _ in range(PROMPT_TOKENS)]
    for batch in batches:
        logits = torch.randn(batch, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
        logits = logits.to(device, getattr(torch, dtype))
        for name, options in KINDS.items():
            sampler = Sampler(vocab_size)
            rows = [sampler.new_row(SamplingParams(seed=seed, **options), prompt) for seed in range(batch)]
            before = torch.tensor([prompt] * batch, device=device)
            params = rows[0].params
            seconds = alternate(
                {
                    "ours": lambda sampler=sampler, rows=rows, logits=logits: sampler.sample(logits, rows),
                    "peer": lambda params=params, before=before, logits=logits: transformers_step(
                        logits, before, params
                    ),
                },
                runs,
                clock=clock,
            )
            ours, peer = (statistics.median(seconds[side]) / batch * 1e6 for side in ("ours", "peer"))
            ratio = median_ratio(seconds["peer"], seconds["ours"])
            found.append(BenchRow(f"sampler/b{batch}/{name}", ours, peer, ratio, "µs per row", runs))
    return found


def transformers_step(logits: torch.Tensor, before: torch.Tensor, params: SamplingParams) -> list[int]:
    """The next tokens as `generate` chooses them.

    Args:
        logits: `(batch, vocab_size)`.
        before: int64 `(batch, tokens)`, prompts.
    """
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if params.logit_bias:
        bias: Any = {(token,): value for token, value in params.logit_bias.items()}
        steps.append(SequenceBiasLogitsProcessor(bias))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if not params.greedy:
        steps.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k > 0:
            steps.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            steps.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            steps.append(MinPLogitsWarper(params.min_p))
    ids: Any = before
    scores: Any = logits.to(torch.float32, copy=True)
    if params.logprobs is not None:
        scores.log_softmax(-1).topk(max(1, params.logprobs)).values.tolist()
    scores = steps(ids, scores)
    tokens = scores.argmax(-1) if params.greedy else torch.multinomial(scores.softmax(-1), 1).squeeze(1)
    return tokens.tolist()
