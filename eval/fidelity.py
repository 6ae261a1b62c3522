"""How far a model's next-token distributions move when its cache is compressed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

VOCAB_CHUNK = 4096


def kl_to_full(logits_full: torch.Tensor, logits: torch.Tensor, chunk: int = VOCAB_CHUNK) -> torch.Tensor:
    """KL divergence of the compressed model from the full one at every position, in nats.

    `KL(p‖q) = Σ_v p_v (log p_v − log q_v)` with p from the full cache: what is lost by predicting with q. Computed in
    float64 over `chunk` vocabulary entries at a time, so that neither precision nor memory depends on the vocabulary.

    Args:
        logits_full: `(..., vocab)`, any float dtype, without a cache or with the full one.
        logits: the same shape, with the compressed cache.
        chunk: vocabulary entries converted at once.

    Returns:
        float64 `(...)`, never negative.
    Raises:
        ValueError: the shapes differ.
    """
    if logits_full.shape != logits.shape:
        raise ValueError(f"logits differ in shape: {tuple(logits_full.shape)} and {tuple(logits.shape)}")
    full_norm, norm = _logsumexp(logits_full, chunk), _logsumexp(logits, chunk)
    total = torch.zeros_like(full_norm)
    for p, q in zip(_chunks(logits_full, chunk), _chunks(logits, chunk), strict=True):
        log_p, log_q = p - full_norm.unsqueeze(-1), q - norm.unsqueeze(-1)
        terms = log_p.exp() * (log_p - log_q)
        # A token the full model rules out (log p = −inf) adds nothing, whatever q says.
        total += terms.masked_fill(log_p == -torch.inf, 0.0).sum(-1)
    return total.clamp(min=0.0)


def top1_agreement(logits_full: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both models' most likely tokens are the same: bool `(...)` for logits `(..., vocab)`."""
    return logits_full.argmax(-1) == logits.argmax(-1)


def _chunks(logits: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    for part in logits.split(chunk, dim=-1):
        yield part.double()


def _logsumexp(logits: torch.Tensor, chunk: int) -> torch.Tensor:
    parts = [part.logsumexp(-1) for part in _chunks(logits, chunk)]
    return torch.stack(parts).logsumexp(0)
