"""Training checkpoints, from which a run resumes to the last bit, in safetensors and JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from tenure.checked import Range, read
from tenure.documents import load_json, plain_line, shown_name

from ..retention import CheckpointError, RetentionGates
from .train_config import TrainConfig

logger = logging.getLogger(__name__)

PREFIX = "step-"
TEMPORARY_PREFIX = ".saving-"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
OPTIMIZER_KEY = re.compile(r"([0-9]{1,9})\.[a-z_]{1,40}")


@dataclass(frozen=True)
class RunState:
    """A run after some of its steps.

    Attributes:
        step: the steps that are done.
        settings: those that change the loss curve, and the global batch.
        digests: of `data` and `base`; states of older versions have none.
        skipped: numbers of the steps that were skipped, because a loss or a gradient was not finite.
        metrics: of the last evaluation.
        evaluated: the step of that evaluation, 0 before one.
        best: the best value of the chosen metric so far, or None.
    """

    step: Annotated[int, Range(0)] = 0
    settings: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    skipped: tuple[int, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    evaluated: int = 0
    best: float | None = None


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Errors of the operating system inside the block name `path`, if they name none (a full disk does not)."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file that is on the disk, not only in the system's memory, when this returns; readable as umask says."""
    with named_errors(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Writes the names in a folder to the disk, where the system has that (Windows does not)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_state(
    folder: Path, state: RunState, gates: RetentionGates, optimizer: torch.optim.Optimizer, keep: int = 2
) -> Path:
    """Writes `folder/step-NNNNNNNN` as one atomic step and drops all but the last `keep` checkpoints.

    Files and names are synced before the checkpoint gets its name, so a crash of the machine leaves whole ones only.
    No random state is stored: data and sampling depend on the seed and the step alone.

    Raises:
        OSError: nothing is left of the new checkpoint; the message names the file.
    """
    target = folder / f"{PREFIX}{state.step:08d}"
    temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with named_errors(target):
            temporary.mkdir(parents=True)
            gates.save_pretrained(temporary)
        write_synced(temporary / OPTIMIZER_FILE, save(_optimizer_tensors(optimizer)))
        write_synced(temporary / STATE_FILE, json.dumps(asdict(state), indent=2).encode())
        sync_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_state(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`; leftovers of a killed save are cleared away."""
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    complete = _complete(folder)
    return complete[-1] if complete else None


def read_state(path: Path, now: RunState) -> tuple[RunState, dict[str, torch.Tensor]]:
    """A checkpoint and its tensors: `gates.…` and `optimizer.…`.

    Args:
        now: settings and digests of the run that resumes.

    Raises:
        ValueError: the checkpoint was made with settings that change the loss curve, with other data or another base
            model; all differences are named.
    """
    state = read(RunState, load_json(path / STATE_FILE), str(path / STATE_FILE))
    # Through JSON, so that tuples compare as the lists they become there. A setting that the checkpoint's version did
    # not have is compared by its default.
    settings, defaults = (json.loads(json.dumps(values)) for values in (now.settings, TrainConfig().to_dict()))
    then = {name: default for name, default in defaults.items() if name in settings} | state.settings
    names = [name for name in sorted(set(settings) | set(then)) if settings.get(name) != then.get(name)]
    pairs = [(shown_name(name), then.get(name), settings.get(name)) for name in names[:20]]
    changed = [f"{name}: {plain_line(repr(old), 100)} -> {plain_line(repr(new), 100)}" for name, old, new in pairs]
    changed += [
        f"digest of the {shown_name(name)}: {plain_line(old, 60)} -> {now.digests[name]}"
        for name, old in sorted(state.digests.items())
        if now.digests.get(name, old) != old
    ]
    if changed:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(changed)}); resume with those, or choose another "
            "output_dir (start from its gates with init_gates)"
        )
    gates = RetentionGates.from_pretrained(path)
    tensors = {f"gates.{name}": one for name, one in gates.state_dict().items()}
    shapes = [parameter.shape for parameter in gates.parameters()]
    return state, tensors | {f"optimizer.{name}": one for name, one in _read_optimizer(path, shapes).items()}


def _read_optimizer(path: Path, shapes: Sequence[torch.Size]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors of a checkpoint, `NUMBER.KEY` with the number of a parameter.

    Args:
        shapes: of the parameters.

    Raises:
        CheckpointError: the file is absent, cut, or holds other tensors or numbers that are not finite.
    """
    file = path / OPTIMIZER_FILE
    try:
        tensors = load_file(file)
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a dtype that torch does not have
        raise CheckpointError(f"{file} is absent, truncated or not a safetensors file: {plain_line(error)}") from None
    for name, tensor in tensors.items():
        match = OPTIMIZER_KEY.fullmatch(name)
        number = -1 if match is None else int(match[1])
        fits = 0 <= number < len(shapes) and tensor.shape in (shapes[number], torch.Size([]))
        if not fits or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file} holds {plain_line(name, 60)} {tuple(tensor.shape)}, which is no finite state of one of the "
                f"{len(shapes)} parameters"
            )
    return tensors


def apply_state(tensors: dict[str, torch.Tensor], gates: RetentionGates, optimizer: torch.optim.Optimizer) -> None:
    """Loads the tensors of `read_state` into gates and optimizer."""
    gates.load_state_dict({name.partition(".")[2]: one for name, one in tensors.items() if name.startswith("gates.")})
    saved = optimizer.state_dict()
    saved["state"] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition(".")
        if owner == "optimizer":
            index, key = rest.split(".", 1)
            saved["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(saved)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for index, values in state.items()
        for key, value in values.items()
    }


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / STATE_FILE).is_file())
