"""A web page that shows a document with each token shaded by how many heads kept it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..retention.checkpoint import write_atomic
from .cases import Case

_SLOT = "__DATA__"


@dataclass(frozen=True)
class PagePolicy:
    """What one policy kept of the document and what the model then answered.

    Attributes:
        label: name on the page.
        mask: bool `(layers, heads, tokens)`, see `kept_mask`.
        prediction: the generated answer.
        correct: whether it was accepted.
        kl: KL to the full cache in nats.
    """

    label: str
    mask: np.ndarray
    prediction: str
    correct: bool
    kl: float


def save_token_page(
    path: str | os.PathLike, case: Case, texts: Sequence[str], policies: Sequence[PagePolicy], subtitle: str
) -> None:
    """Writes one self-contained HTML file, in one step: no request leaves the page.

    Args:
        texts: the text of each context token, see `token_texts`.
        policies: the first one is shown first.
        subtitle: one line under the title, e.g. model and budget.

    Raises:
        ValueError: masks, texts and context differ in length, or there is no policy.
    """
    if not policies:
        raise ValueError("the page needs at least one policy")
    for policy in policies:
        if policy.mask.shape[-1] != case.length or len(texts) != case.length:
            raise ValueError(
                f"the page got {len(texts)} token texts and a mask of {policy.mask.shape[-1]} tokens for a context of "
                f"{case.length}"
            )
    layers, heads, _ = policies[0].mask.shape
    data = {
        "subtitle": subtitle,
        "texts": list(texts),
        "facts": [list(span) for span in case.facts],
        "question": case.question,
        "answer": case.answer,
        "layers": layers,
        "heads": heads,
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
    """JSON that cannot end the script element it stands in, whatever the texts contain."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
