"""Pictures of a compressed cache: a heat map over layers and heads, and a page that shades every token."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..eviction import RaggedCache
from ..eviction.modalities import MODALITIES, modality_labels
from ..eviction.protected_tokens import TokenRanges
from ..retention.checkpoint import write_atomic

_SLOT = "__DATA__"


@dataclass(frozen=True)
class PageDocument:
    """The document of a page.

    Attributes:
        texts: the text of each token, see `token_texts`; images' tokens are shown as squares.
        question: asked after the compression; may be empty.
        answer: the right one; None if it is not known.
        facts: token ranges of planted sentences, the asked one first.
        modalities: token ranges by modality, see `modality_ranges`. With images among them the page shows what every
            layer and head kept of each modality.
    """

    texts: Sequence[str]
    question: str = ""
    answer: str | None = None
    facts: Sequence[tuple[int, int]] = ()
    modalities: Mapping[str, TokenRanges] = field(default_factory=dict)


@dataclass(frozen=True)
class PagePolicy:
    """The part of the document that one policy kept, and the model's answer from it.

    Attributes:
        label: name on the page.
        mask: bool `(layers, heads, tokens)`, see `kept_mask`.
        prediction: the generated answer.
        correct: whether it was accepted; None if nobody knows.
        kl: KL to the full cache in nats; None if it was not measured.
    """

    label: str
    mask: np.ndarray
    prediction: str
    correct: bool | None = None
    kl: float | None = None


def save_token_page(
    path: str | os.PathLike, document: PageDocument, policies: Sequence[PagePolicy], subtitle: str
) -> None:
    """Writes one self-contained HTML file, in one step: no request leaves the page.

    Args:
        policies: the first one is shown first.
        subtitle: one line under the title, e.g. model and budget.

    Raises:
        ValueError: a mask is not of the document's tokens, or there is no policy.
    """
    if not policies:
        raise ValueError("the page needs at least one policy")
    tokens = len(document.texts)
    for policy in policies:
        if policy.mask.shape[-1] != tokens:
            raise ValueError(f"the page got a mask of {policy.mask.shape[-1]} tokens for a document of {tokens}")
    layers, heads, _ = policies[0].mask.shape
    data = {
        "subtitle": subtitle,
        "texts": list(document.texts),
        "facts": [list(span) for span in document.facts],
        "question": document.question,
        "answer": document.answer,
        "layers": layers,
        "heads": heads,
        "modalities": MODALITIES if len(document.modalities) > 1 else [],
        "modalityOf": modality_labels(document.modalities, tokens).tolist() if len(document.modalities) > 1 else [],
        "policies": [_policy(policy) for policy in policies],
    }
    template = files(__package__ or "tenure.eval").joinpath("token_page.html").read_text(encoding="utf-8")
    write_atomic(Path(path), template.replace(_SLOT, _script_safe(data)).encode())


def _policy(policy: PagePolicy) -> dict[str, Any]:
    """Masks as one hexadecimal number a token: bit `layer · heads + head`, the first bit leftmost."""
    bits = policy.mask.reshape(-1, policy.mask.shape[-1])
    packed = np.packbits(bits, axis=0)
    return {
        "label": policy.label,
        "masks": [packed[:, token].tobytes().hex() for token in range(bits.shape[1])],
        "share": float(bits.mean()),
        "prediction": policy.prediction.strip(),
        "correct": policy.correct,
        "kl": policy.kl,
    }


def _script_safe(data: Any) -> str:
    """JSON that cannot end its script element, whatever the texts contain."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


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


def save_heat_map(path: str | os.PathLike, shares: Mapping[str, np.ndarray], title: str) -> None:
    """Writes a PNG with one panel a policy: layers across, key/value heads down, colour = share of entries kept.

    Args:
        path: replaced in one step.
        shares: a policy's name and its `(layers, heads)` shares between 0 and 1.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("the heat map needs matplotlib: pip install 'tenure[demo]'") from None
    layers, heads = next(iter(shares.values())).shape
    height = 1.3 + len(shares) * (0.75 + 0.28 * heads)
    figure = Figure(figsize=(max(6.0, 1.8 + 0.3 * layers), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shares), 1, squeeze=False)[:, 0]
    top = max(float(share.max()) for share in shares.values())
    image = None
    for axis, (name, share) in zip(axes, shares.items(), strict=True):
        image = axis.imshow(share.T, aspect="auto", cmap="viridis", vmin=0.0, vmax=top, interpolation="nearest")
        axis.set_title(f"{name}: {share.mean():.0%} kept", loc="left", fontsize=10)
        axis.set_yticks(range(heads))
        axis.set_ylabel("KV head")
        step = max(1, layers // 15)
        axis.set_xticks(range(0, layers, step))
    axes[-1].set_xlabel("layer")
    assert image is not None, "there is at least one panel"
    bar = figure.colorbar(image, ax=list(axes), pad=0.01)
    bar.set_label("share of the context kept")
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomic(Path(path), buffer.getvalue())
