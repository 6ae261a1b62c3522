"""Cards and models of the papers, by their data sheets and configurations.

These numbers and the two shares in `RooflineCosts` are all that times are made of. They were written down before the
first run of a policy and are not fitted to any ratio.
"""

from __future__ import annotations

from typing import TypeVar

from .costs import Card, ModelShape

_Kind = TypeVar("_Kind")

# Dense BF16 tensor cores. H100: NVIDIA's data sheet, SXM5. A10G: its data sheet; it is the variant of the A10 that AWS
# has, with 70 instead of 125 TFLOPS (baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference).
CARDS = {
    "h100": Card("H100 80 GB", 989e12, 80e9, 3350e9),
    "a10g": Card("A10G 24 GB", 70e12, 24e9, 600e9),
}

# From the models' config.json: parameters, vocabulary × hidden size, layers, query heads × head_dim, KV heads and
# head_dim.
MODELS = {
    "llama-3.1-8b": ModelShape("Llama-3.1-8B", 8.03e9, 128256 * 4096, 32, 4096, 8, 128),
    "qwen2.5-32b": ModelShape("Qwen2.5-32B", 32.76e9, 152064 * 5120, 64, 5120, 8, 128),
}


def card(name: str) -> Card:
    """Raises ValueError for an unknown name."""
    return _find(CARDS, name, "card")


def model(name: str) -> ModelShape:
    """Raises ValueError for an unknown name."""
    return _find(MODELS, name, "model")


def _find(known: dict[str, _Kind], name: str, what: str) -> _Kind:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r:.60}; known: {', '.join(known)}")
    return known[name]
