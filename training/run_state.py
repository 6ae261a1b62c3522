"""Training checkpoints, from which a run resumes to the last bit, in safetensors and JSON."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file, save_file

from tenure.checked import Range, read
from tenure.documents import load_json

from ..retention import RetentionGates

logger = logging.getLogger(__name__)

PREFIX = "step-"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class _RunState:
    """The steps that are done, and the settings that change the loss curve."""

    step: Annotated[int, Range(0)]
    settings: dict[str, Any]


def save_state(
    folder: Path, step: int, gates: RetentionGates, optimizer: torch.optim.Optimizer, settings: dict[str, Any],
    keep: int = 2,
) -> Path:  # fmt: skip
    """Writes `folder/step-NNNNNNNN` as one atomic step and drops all but the last `keep` checkpoints.

    No random state is stored: data and sampling depend on the seed and the step alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{step:08d}"
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        gates.save_pretrained(temporary)
        save_file(_optimizer_tensors(optimizer), temporary / OPTIMIZER_FILE)
        (temporary / STATE_FILE).write_text(json.dumps({"step": step, "settings": settings}, indent=2))
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_state(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`; leftovers of a killed save are cleared away."""
    for leftover in folder.glob(".saving-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_state(path: Path, gates: RetentionGates, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> int:
    """Loads a checkpoint into `gates` and `optimizer`; returns the number of steps it has behind it.

    Raises:
        ValueError: the checkpoint was made with settings that change the loss curve; all are named.
    """
    state = read(_RunState, load_json(path / STATE_FILE), str(path / STATE_FILE))
    # Through JSON, so that tuples compare as the lists they become there.
    now, then = json.loads(json.dumps(settings)), state.settings
    names = [name for name in sorted(set(now) | set(then)) if now.get(name) != then.get(name)]
    changed = [f"{name}: {then.get(name)!r} -> {now.get(name)!r}" for name in names]
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}); resume with those, or choose another "
            "output_dir (start from its gates with init_gates)"
        )
    gates.load_state_dict(RetentionGates.from_pretrained(path).state_dict())
    tensors = load_file(path / OPTIMIZER_FILE)
    saved = optimizer.state_dict()
    saved["state"] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        saved["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(saved)
    logger.info("resumed from %s", path)
    return state.step


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in state.items()
        for key, value in values.items()
    }


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE_FILE).is_file())
