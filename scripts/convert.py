"""`tenure convert`: released gates of TRIM-KV, DBTrimKV, KVzap and Fast KVzip as a gates folder of tenure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .loading import load_model
from .output import OutputFolder


@dataclass
class ConvertConfig:
    """Convert released gates into a gates folder, and say in which sense the result is exact."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE_PATH")]
    """Folder with trimkv_weights.pth (TRIM-KV, DBTrimKV), KVzap's safetensors, or Fast KVzip's .pt file."""
    out: Annotated[OutputFolder, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_PATH")]
    """Folder to write; it must not hold gates yet."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """Base model of the gates: Hub id, local folder, or `demo`."""
    revision: str | None = None
    """Revision of a Hub model."""


def main(config: ConvertConfig) -> int:
    from rich.console import Console

    from ..retention.checkpoint import CONFIG_FILE
    from ..retention.released_gates import read_released_gates

    source, out = Path(config.source).expanduser(), config.out
    if (out / CONFIG_FILE).exists():
        raise ValueError(f"got {out}, which holds gates already; accepted: another folder")
    if not source.exists():
        raise ValueError(f"no file or folder {config.source}; accepted: downloaded files, for example by `hf download`")
    model, _ = load_model(config.model, device="cpu", dtype="bfloat16", revision=config.revision)
    converted = read_released_gates(source, model)
    converted.gates.save_pretrained(out)
    console = Console(soft_wrap=True)
    console.print(f"{converted.kind} of {len(converted.gates.layer_indices)} layers is in {out}")
    console.print(converted.note)
    console.print(f"Use it with --policy {converted.policy} --gates {out}.")
    return 0
