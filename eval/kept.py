"""Which tokens and how much each (layer, head) of a compressed cache kept, as arrays for pictures."""

from __future__ import annotations

import numpy as np

from ..eviction import RaggedCache


def kept_share(cache: RaggedCache) -> np.ndarray:
    """Share of the tokens seen that each head kept: float64 `(layers, heads)`, the mean over the rows."""
    tokens = cache.tokens_seen.view(-1, 1, 1).double()
    return (cache.lengths().double() / tokens).mean(0).numpy()


def kept_mask(cache: RaggedCache, row: int = 0) -> np.ndarray:
    """Whether each head kept each token of a row: bool `(layers, heads, tokens)`."""
    tokens = int(cache.tokens_seen[row])
    layers = []
    for layer in cache.ragged:
        heads = np.zeros((len(cache.kept(layer.layer_idx)[row]), tokens), dtype=bool)
        for head, positions in enumerate(cache.kept(layer.layer_idx)[row]):
            heads[head, positions.cpu().numpy()] = True
        layers.append(heads)
    return np.stack(layers)
