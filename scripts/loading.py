"""The model and tokenizer that `--model` names, as every sub-command loads them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the GPU if there is one, else the CPU; ValueError for a device that is not there."""
    import torch

    if device != "auto":
        from ..eval.runner import find_device

        return find_device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str, device: str = "auto", dtype: Dtype = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Model in eval mode on its device, and its tokenizer.

    Args:
        name: `demo`, a local folder, or a Hub id.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU, few of which are fast in bfloat16.
        revision: of a Hub model.

    Raises:
        ValueError: no such model or device.
        AssetError: the demo model could not be made ready.
    """
    from ..training.assets import DEMO_MODEL_ID, resolve_model  # first: a wrong name is told before the slow imports

    source, target = resolve_model(name), pick_device(device)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    with _bars_only_on_a_terminal():
        model: Any = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=getattr(torch, dtype))
    if name == "demo":  # so that gates trained on it name the model, not this machine's cache folder
        model.config._name_or_path = DEMO_MODEL_ID
    return model.to(target).eval(), tokenizer


@contextlib.contextmanager
def _bars_only_on_a_terminal() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
