"""Digests of training data and base model, by which a resumed run sees that they are the ones it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIGITS = 16
SAMPLED_ELEMENTS = 64  # of every parameter
SAMPLED_EXAMPLES = 4  # of sources that give no digest themselves


def digest(parts: Iterable[bytes]) -> str:
    """16 hex digits of SHA-256 over parts of bytes, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()[:DIGITS]


@torch.no_grad()
def base_digest(model: PreTrainedModel) -> str:
    """Digest of a base model: names, shapes and 64 elements of every parameter, in bf16.

    It sees a fine-tuned model of the same shape whose embeddings were frozen (`retention.checkpoint.fingerprint` reads
    embeddings only), and is the same for a model loaded in fp32 or bf16.
    """
    names, samples = [], []
    for name, parameter in sorted(model.named_parameters()):
        names.append(f"{name} {tuple(parameter.shape)}")
        flat = parameter.detach().flatten()
        count = min(SAMPLED_ELEMENTS, flat.numel())
        places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        samples.append(flat[places].to(torch.bfloat16))
    sample = torch.cat([one.cpu() for one in samples])
    return digest(["\n".join(names).encode(), sample.view(torch.uint8).numpy().tobytes()])


def data_digest(source: Any) -> str:
    """Digest of a source of examples: its own `digest()`, or one over its first examples."""
    if hasattr(source, "digest"):
        return source.digest()
    return digest(
        repr((one.input_ids, one.loss_mask, one.position_ids, one.prompt_tokens)).encode()
        for one in (source[index] for index in range(SAMPLED_EXAMPLES))
    )


def column_digest(column: Any) -> str:
    """Digest of the values of a pyarrow column of lists or numbers, whatever its chunks.

    Lists are hashed as one run of values and the lengths: the same content gives the same digest on every machine.
    """
    import pyarrow

    values, lengths = hashlib.sha256(), hashlib.sha256()
    for chunk in column.chunks:
        if pyarrow.types.is_list(chunk.type) or pyarrow.types.is_large_list(chunk.type):
            lengths.update(chunk.value_lengths().cast("int64").to_numpy(zero_copy_only=False).tobytes())
            chunk = chunk.flatten()
        values.update(chunk.cast("int64").to_numpy(zero_copy_only=False).tobytes())
    return digest([values.digest(), lengths.digest()])
