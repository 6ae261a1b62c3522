"""Predictions on a cache that holds the context: reading tokens, greedy decoding, and KL to the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..eviction import RaggedCache, Session


def agreed(gold: Sequence[int], logits: torch.Tensor, ends: Callable[[list[int]], bool]) -> tuple[list[int], bool]:
    """The beginning of a greedy generation that costs nothing: as far as the model agrees with the gold answer.

    Where every teacher-forced choice is the gold token, greedy decoding would have taken the same path; so decoding
    proper starts only behind the first token that differs.

    Args:
        logits: `(1 + len(gold), vocab)`: of the question's last token and of the gold answer fed after it.
        ends: whether the generation ends behind these tokens.

    Returns:
        The tokens, and whether the generation ends with them.
    """
    generated: list[int] = []
    for choice, expected in zip(logits.argmax(-1).tolist(), [*gold, None], strict=True):
        generated.append(choice)
        if ends(generated):
            return generated, True
        if choice != expected:
            break
    return generated, False


def greedy_rows(
    session: Session, cache: RaggedCache, before: Sequence[Sequence[int]], ends: Callable[[list[int]], bool]
) -> list[list[int]]:
    """Greedy generations of all rows at once, each behind the tokens it has generated already.

    Args:
        cache: a row for each; it is extended and may lose rows.
        before: at least one token a row, of different numbers perhaps.
        ends: whether a generation ends behind these tokens.

    Returns:
        For each row the tokens of `before` and those after them.
    """
    generated = [list(tokens) for tokens in before]
    rows, live, fed = list(range(len(generated))), set(range(len(generated))), 0
    while live:
        width = min(len(generated[row]) for row in live) - fed
        ids = torch.tensor([(generated[row] + [0] * width)[fed : fed + width] if row in live else [0] * width
                            for row in rows])  # fmt: skip
        logits = session.extend(cache, ids, logits_to_keep=1)
        fed += width
        for row, choice in zip(rows, logits[:, -1].argmax(-1).tolist(), strict=True):
            if row in live and len(generated[row]) == fed:
                generated[row].append(choice)
                if ends(generated[row]):
                    live.remove(row)
        if live and 2 * len(live) <= len(rows):  # finished rows are dropped once that is worth the copy
            cache.select_rows(torch.tensor([place for place, row in enumerate(rows) if row in live]))
            rows = [row for row in rows if row in live]
    return generated


@dataclass(frozen=True)
class LogitsAtOnce:
    """Numbers of logits that are converted to float64 at a time.

    Attributes:
        cpu: few enough for a processor's cache.
        gpu: many enough to occupy a GPU.
    """

    cpu: int = 2**16
    gpu: int = 2**24


def kl_to_full(
    logits_full: torch.Tensor, logits: torch.Tensor, held: int | LogitsAtOnce = LogitsAtOnce()
) -> torch.Tensor:
    """KL divergence of the compressed model from the full one at every position, in nats.

    `KL(p‖q) = Σ_v p_v (log p_v − log q_v)` with p from the full cache. Computed in
    float64, a few positions at a time, so that neither precision nor memory depends on their number.

    Args:
        logits_full: `(..., vocab)`, any float dtype, without a cache or with the full one.
        logits: the same shape, with the compressed cache.
        held: logits converted at once, at least those of a position; one number, or one for each kind of device.

    Returns:
        float64 `(...)`, never negative.
    Raises:
        ValueError: the shapes differ.
    """
    if logits_full.shape != logits.shape:
        raise ValueError(f"logits differ in shape: {tuple(logits_full.shape)} and {tuple(logits.shape)}")
    vocab = logits.shape[-1]
    if isinstance(held, LogitsAtOnce):
        held = held.cpu if logits.device.type == "cpu" else held.gpu
    positions = max(1, held // vocab)
    pieces = (each.reshape(-1, vocab).split(positions) for each in (logits_full, logits))
    found = [_kl(full.double(), other.double()) for full, other in zip(*pieces, strict=True)]
    return torch.cat(found).view(logits.shape[:-1])


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`kl_to_full` of float64 `(positions, vocab)`: `Σ w_v (p_v − q_v) / Σ w_v − log Σ exp p + log Σ exp q`."""
    top = p.amax(-1, keepdim=True)
    weights = (p - top).exp_()
    total = weights.sum(-1)
    shift = total.log() + top.squeeze(-1) - q.logsumexp(-1)
    difference = p - q
    terms = torch.linalg.vecdot(weights, difference)
    if terms.isnan().any():  # 0 · inf: a token the full model rules out (p = −inf) adds nothing, whatever q says
        terms = torch.linalg.vecdot(weights, difference.masked_fill_(p == -torch.inf, 0.0))
    return (terms / total - shift).clamp(min=0.0)


def top1_agreement(logits_full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both models' most likely tokens are the same: bool `(...)` for logits `(..., vocab)`."""
    return logits_full.argmax(-1) == logits.argmax(-1)
