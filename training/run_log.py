"""The log of a training run: metrics.jsonl next to the checkpoints, accelerate's trackers, a picture of occupancy."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .run_state import named_errors

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "occupancy.png"
RUN_ID_FILE = "wandb_run_id"


class MetricsLog:
    """Appends one JSON object per logged step to `output_dir/metrics.jsonl` and hands the same to the trackers.

    Resuming at a step first drops later lines, so the file reads like an uninterrupted run's.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, resumed_at: int) -> None:
        self.path = output_dir / METRICS_FILE
        self.accelerator = accelerator
        self.resumed_at = resumed_at
        if accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            kept = [line for line in self._lines() if line.get("step", 0) <= resumed_at] if resumed_at else []
            temporary = self.path.with_suffix(".tmp")
            with named_errors(temporary):
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(temporary, self.path)

    def start_trackers(self, trackers: Sequence[str], project: str, settings: dict[str, Any]) -> None:
        """Starts accelerate's trackers; a resumed run continues the run of wandb, which is named after the folder."""
        plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
        options: dict[str, Any] = {"tensorboard": {"purge_step": self.resumed_at + 1}}
        if "wandb" in trackers and self.accelerator.is_main_process:
            path = self.path.with_name(RUN_ID_FILE)
            if not (self.resumed_at and path.is_file()):
                path.write_text(uuid.uuid4().hex[:8])
            folder = self.path.parent.resolve().name
            options["wandb"] = {"id": path.read_text().strip(), "resume": "allow", "name": folder}
        self.accelerator.init_trackers(project, config=plain, init_kwargs=options)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                if not isinstance(line, dict) or not isinstance(line.get("step", 0), int):
                    raise ValueError("it is no step's")
                lines.append(line)
            except (ValueError, RecursionError):  # the line a killed process was writing
                logger.warning("dropped a broken line of %s", self.path)
        return lines

    def write(self, step: int, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with named_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")

    def picture(self, step: int, occupancy: torch.Tensor) -> None:
        """Draws `(layers, num_kv_heads)` mean occupancy to occupancy.png and the trackers; needs matplotlib."""
        if not self.accelerator.is_main_process:
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            logger.warning("no picture of occupancy: matplotlib is missing (pip install 'tenure[train]')")
            return
        figure = Figure(figsize=(2 + 0.3 * occupancy.shape[1], 1 + 0.2 * occupancy.shape[0]), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        image = axes.imshow(occupancy.cpu().numpy(), aspect="auto", cmap="viridis", vmin=0)
        axes.set(xlabel="KV head", ylabel="layer", title=f"mean occupancy, step {step}")
        figure.colorbar(image, label="entries")
        path = self.path.with_name(PICTURE_FILE)
        with named_errors(path):
            figure.savefig(path, dpi=110)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[None, ..., :3]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"occupancy": pixels}, step=step, **layout)


def occupancy_metrics(occupancy: torch.Tensor) -> dict[str, float]:
    """Mean and max occupancy and every layer's share of it, from `(layers, batch, num_kv_heads, positions)`."""
    per_layer = occupancy.mean(dim=(1, 2, 3))
    share = per_layer / per_layer.sum().clamp_min(1e-9)
    values = {"occupancy/mean": float(occupancy.mean()), "occupancy/max": float(occupancy.max())}
    return values | {f"kept_share/layer_{row:02d}": float(x) for row, x in enumerate(share)}
