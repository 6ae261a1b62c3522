"""Loads the model, tokenizer and gates that a command line names, in the same way for every command."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from ..retention import RetentionGates

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"  # of the checkout; a wheel has them in tenure/
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's names of these settings for mallopt
LARGEST_KEPT, MOST_KEPT = 2**25, 2**27  # bytes of one freed tensor, glibc's own upper limit; of all of them


@contextlib.contextmanager
def needs_checkout() -> Iterator[None]:
    """Around imports of `tenure.scripts.bench` and `tenure.scripts.soak`, which are not installed with the package.

    Raises:
        ImportError: they are not there; the message says that a checkout is needed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("tenure.scripts.bench", "tenure.scripts.soak"):
            raise
        raise ImportError(
            "benchmarks and soak tests are part of the repository and not of the installed package: run this in a "
            "checkout, installed with `pip install -e .`"
        ) from None


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is the GPU if there is one, else the CPU.

    Raises:
        ValueError: the device is not available.
    """
    import torch

    if device != "auto":
        from ..eval.runner import find_device

        return find_device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str, device: str = "auto", dtype: Dtype = "auto", revision: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model in eval mode on its device, and its tokenizer.

    Args:
        name: `demo`, a local folder, or a Hub id.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU, since few CPUs are fast in bfloat16.
        revision: of a Hub model.

    Raises:
        ValueError: no such model or device.
        AssetError: the demo model could not be downloaded or converted.
    """
    from ..training.assets import DEMO_MODEL_ID, resolve_model  # first, before the slow imports

    target = pick_device(device)
    source = resolve_model(name, revision)
    import torch
    from transformers import AutoTokenizer

    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    with _bars_only_on_a_terminal():
        model: Any = _model_class(source, revision).from_pretrained(
            source, revision=revision, dtype=getattr(torch, dtype)
        )
    if name == "demo":  # so that gates trained on it name the model, not this machine's cache folder
        model.config._name_or_path = DEMO_MODEL_ID
    if target.type == "cpu":
        keep_freed_memory()
    return model.to(target).eval(), tokenizer


def keep_freed_memory() -> None:
    """Lets this process keep up to 128 MiB of freed CPU tensors for the next ones, where the C library is glibc.

    By default glibc soon returns freed memory to the system, which clears it page by page for the tensors of the next
    layer: a few percent of a prefill. Tensors above 32 MiB are returned at once, as by default. Settings of the
    environment (`MALLOC_…`, glibc's manual, "Malloc Tunable Parameters") take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(TRIM_THRESHOLD, MOST_KEPT)


def _model_class(source: str | Path, revision: str | None) -> Any:
    """The Auto class for a model that generates text: of text alone, or of text and images."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = type(AutoConfig.from_pretrained(source, revision=revision))
    text = AutoModelForCausalLM._model_mapping  # Gemma-3 and others are in both, and load whole from either
    both = AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if config in both and config not in text else AutoModelForCausalLM


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model that is not loaded.

    Raises:
        ValueError: no such model.
        AssetError: the demo model could not be downloaded or converted.
    """
    from ..training.assets import resolve_model

    source = resolve_model(name)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=revision)


def load_processor(name: str, revision: str | None = None) -> Any:
    """The processor of a model that takes images, with its tokenizer in it.

    Args:
        name: as in `load_model`.

    Raises:
        ValueError: the model takes no images.
        ImportError: its processor needs a package that is not installed; the message names it.
    """
    from ..training.assets import resolve_model

    source = resolve_model(name)
    from transformers import AutoProcessor

    found = AutoProcessor.from_pretrained(source, revision=revision)
    if getattr(found, "image_processor", None) is None or getattr(found, "tokenizer", None) is None:
        raise ValueError(f"the model {name!r} takes no images: its processor is a {type(found).__name__}")
    return found


def load_with_gates(
    config: Any, gates: RetentionGates | None, console: Console, threads: int | None = None
) -> tuple[PreTrainedModel, Any]:
    """`load_model` of a command's `model`, `device` and `dtype`, with a status line; gates are checked and moved to it.

    Args:
        threads: CPU threads; None: torch decides.

    Raises:
        ValueError, AssetError: as `load_model`; gates of another model.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    with console.status(f"loading model {config.model}"):
        model, tokenizer = load_model(config.model, config.device, config.dtype)
        if gates is not None:
            gates.check_model(model)
            gates.to(model.device)
    return model, tokenizer


def progress_bar(console: Console, description: str) -> Progress:
    """A bar with the number of steps done, and the times elapsed and remaining."""
    from rich import progress as bars  # importing it advances Python's random numbers

    columns = bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    return bars.Progress(bars.TextColumn(description), *columns, console=console)


def run_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    return {name: version(name) for name in ("tenure", "torch", "transformers")}


def find_gates(model: str, gates: str | None) -> str:
    """The given gates, or the name of those shipped for the demo model.

    Raises:
        ValueError: none are given, and there are no shipped gates for this model.
    """
    if gates is not None:
        return gates
    if model != "demo":
        raise ValueError(f"the shipped gates fit the demo model only: give --gates for {model!r}")
    return "demo"


def find_example(path: str | Path) -> Path:
    """A YAML file by its path; or the one of this name that comes with the library, for `examples/NAME` or `NAME` where
    there is no such file."""
    path = Path(path).expanduser()
    shipped = EXAMPLES / path.name
    named = path == Path(path.name) or path == Path("examples") / path.name
    return shipped if named and not path.exists() and shipped.is_file() else path


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
