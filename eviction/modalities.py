"""Text, image, video and audio tokens of a multimodal prompt: ranges of them, and what a cache kept of each.

The placeholder ids of a model's configuration say which tokens stand for pixels. The ranges count a row's real tokens,
as `evict(protect=…)` and `evict(token_floors=…)` do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cache import RaggedCache
from .protected_tokens import ProtectedTokens, TokenRanges

TEXT, IMAGE, VIDEO, AUDIO = "text", "image", "video", "audio"
MODALITIES = (TEXT, IMAGE, VIDEO, AUDIO)
# Where transformers' configurations keep the placeholder's id, by modality; the older models say "index".
_PLACEHOLDERS = {
    IMAGE: ("image_token_id", "image_token_index"),
    VIDEO: ("video_token_id", "video_token_index"),
    AUDIO: ("audio_token_id", "audio_token_index"),
}


def placeholder_ids(config: Any) -> dict[str, int]:
    """The token id that stands for a piece of each modality, by the model's configuration; empty for a text model."""
    found = {}
    for modality, names in _PLACEHOLDERS.items():
        ids = (getattr(config, name, None) for name in names)
        given = next((one for one in ids if isinstance(one, int)), None)
        if given is not None:
            found[modality] = given
    return found


def modality_ranges(
    config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> list[dict[str, TokenRanges]]:
    """For each row the ranges `(start, stop)` of its tokens by modality, text included; absent modalities are left out.

    Args:
        config: the model's (the outer one, `model.config`).
        input_ids: `(batch, n)` or `(n,)`, the prompt from its first token on, placeholders expanded by the processor.
        attention_mask: the same shape, 0 for padding, which is not counted.

    Raises:
        ValueError: another shape.
    """
    if input_ids.ndim not in (1, 2) or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        mask = None if attention_mask is None else tuple(attention_mask.shape)
        raise ValueError(
            f"got input_ids {tuple(input_ids.shape)} and attention_mask {mask}; accepted: (batch, n) or (n,) for both"
        )
    ids = input_ids.reshape(-1, input_ids.shape[-1])
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.reshape(ids.shape) != 0
    known = placeholder_ids(config)
    rows = []
    for row, valid in zip(ids, real, strict=True):
        tokens, ranges = row[valid], {}
        text = torch.ones_like(tokens, dtype=torch.bool)
        for modality, token in known.items():
            mask = tokens == token
            text &= ~mask
            if bool(mask.any()):
                ranges[modality] = ProtectedTokens.of(mask).rows[0]
        if bool(text.any()):
            ranges[TEXT] = ProtectedTokens.of(text).rows[0]
        rows.append({name: ranges[name] for name in MODALITIES if name in ranges})
    return rows


@dataclass(frozen=True)
class ModalityKept:
    """The kept tokens of one modality, in a row of a cache.

    Attributes:
        modality: its name.
        tokens: tokens of the prompt and what was generated.
        heads: for each layer that evicts the entries that each head kept of them.
    """

    modality: str
    tokens: int
    heads: tuple[tuple[int, ...], ...]

    @property
    def entries(self) -> int:
        """Their entries now, in all layers and heads."""
        return sum(map(sum, self.heads))

    @property
    def full_entries(self) -> int:
        """The entries of a cache that evicts nothing."""
        return self.tokens * sum(map(len, self.heads))

    @property
    def kept_share(self) -> float:
        """`entries / full_entries`."""
        return self.entries / self.full_entries if self.full_entries else 1.0

    @property
    def head_shares(self) -> torch.Tensor:
        """float64 `(layers, heads)`: the share of the tokens that each head kept."""
        return torch.tensor(self.heads, dtype=torch.float64) / max(1, self.tokens)


def kept_by_modality(cache: RaggedCache, ranges: Mapping[str, TokenRanges], row: int = 0) -> list[ModalityKept]:
    """The kept tokens of each modality in a row of `cache`; only the layers that evict are counted.

    Args:
        ranges: of the row, see `modality_ranges`; tokens in no range (those generated since) count as text.
    """
    labels = modality_labels(ranges, int(cache.tokens_seen[row]))
    present = labels.bincount(minlength=len(MODALITIES)).tolist()
    layers = [
        [labels[positions.cpu()].bincount(minlength=len(MODALITIES)).tolist() for positions in kept]
        for kept in (cache.kept(layer.layer_idx)[row] for layer in cache.ragged)
    ]
    return [
        ModalityKept(name, present[place], tuple(tuple(head[place] for head in heads) for heads in layers))
        for place, name in enumerate(MODALITIES)
        if name in ranges or (name == TEXT and present[place])
    ]


def modality_labels(ranges: Mapping[str, TokenRanges], tokens: int) -> torch.Tensor:
    """int64 `(tokens,)`: the index in `MODALITIES` of each token; 0, text, where no range names it.

    Raises:
        ValueError: an unknown modality.
    """
    unknown = [name for name in ranges if name not in MODALITIES]
    if unknown:
        raise ValueError(f"got the modality {unknown[0]!r}; accepted: {', '.join(MODALITIES)}")
    labels = torch.zeros(tokens, dtype=torch.long)
    for name, spans in ranges.items():
        for start, stop in spans:
            labels[start:stop] = MODALITIES.index(name)
    return labels


def row_masks(rows: Sequence[Mapping[str, TokenRanges]], modality: str) -> ProtectedTokens:
    """The tokens of `modality` of every row, as `evict(protect=…)` takes them."""
    if modality not in MODALITIES:
        raise ValueError(f"got the modality {modality!r}; accepted: {', '.join(MODALITIES)}")
    return ProtectedTokens(tuple(row.get(modality, ()) for row in rows), shared=len(rows) == 1)
