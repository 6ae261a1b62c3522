"""A picture of how a policy spread its budget over layers and heads."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..retention.checkpoint import write_atomic


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
