"""How far a model's next-token distributions move when its cache is compressed."""

from __future__ import annotations

import torch

# Logits that are converted at a time: few enough for a processor's cache, many enough for a GPU.
HELD_ON_CPU, HELD_ON_GPU = 2**16, 2**24


def kl_to_full(logits_full: torch.Tensor, logits: torch.Tensor, held: int | None = None) -> torch.Tensor:
    """KL divergence of the compressed model from the full one at every position, in nats.

    `KL(p‖q) = Σ_v p_v (log p_v − log q_v)` with p from the full cache: what is lost by predicting with q. Computed in
    float64, a few positions at a time, so that neither precision nor memory depends on how many there are.

    Args:
        logits_full: `(..., vocab)`, any float dtype, without a cache or with the full one.
        logits: the same shape, with the compressed cache.
        held: logits converted at once, at least a position's; None suits the device.

    Returns:
        float64 `(...)`, never negative.
    Raises:
        ValueError: the shapes differ.
    """
    if logits_full.shape != logits.shape:
        raise ValueError(f"logits differ in shape: {tuple(logits_full.shape)} and {tuple(logits.shape)}")
    vocab = logits.shape[-1]
    if held is None:
        held = HELD_ON_CPU if logits.device.type == "cpu" else HELD_ON_GPU
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
