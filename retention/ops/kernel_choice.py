"""The choice between an operation's Triton kernel and plain torch: by device, or by force."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

logger = logging.getLogger(__name__)

Kernels = Literal["auto", "triton", "reference"]
VARIABLE = "TENURE_KERNELS"
# Triton 3.10 turns the fusion of multiplies and adds off unless a launch asks for it.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def chosen_kernels(device: torch.device | str, kernels: Kernels = "auto") -> Literal["triton", "reference"]:
    """The form of an operation that runs on `device`.

    Args:
        kernels: an argument other than `auto` decides; then the environment variable `TENURE_KERNELS`; then the device:
            `triton` on CUDA, if Triton is installed, and `reference` elsewhere.

    Raises:
        ValueError: an unknown choice, or `triton` where it cannot run: off CUDA without Triton's interpreter.
        ImportError: `triton` was asked for and is not installed.
    """
    asked, source = _asked(kernels)
    on_cuda = torch.device(device).type == "cuda"
    if asked == "triton":
        require_triton()
        if not on_cuda and not interpreting():
            raise ValueError(
                f"{source} is 'triton' and the tensors are on {torch.device(device).type}: Triton kernels run on CUDA, "
                "or anywhere in a process started with TRITON_INTERPRET=1"
            )
        return "triton"
    if asked == "auto" and on_cuda and _installed():
        return "triton"
    return "reference"


def _asked(kernels: Kernels = "auto") -> tuple[str, str]:
    """The choice of the argument or else of the environment, and its source; ValueError for an unknown choice."""
    asked, source = kernels, "kernels"
    if kernels == "auto":
        asked, source = os.environ.get(VARIABLE, "auto") or "auto", VARIABLE
    if asked not in get_args(Kernels):
        raise ValueError(f"{source} is {asked!r}; accepted: {', '.join(get_args(Kernels))}")
    return asked, source


def compiles_for_cpu() -> bool:
    """Whether operations on a CPU may run a C kernel: unless `TENURE_KERNELS` asks for another form."""
    return _asked()[0] == "auto"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` is a CPU with instructions for products of bf16 numbers, AVX512-BF16."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def multiplies_bf16_tiles(device: torch.device) -> bool:
    """Whether `device` is a CPU with units for products of bf16 matrices, AMX, that this process may use."""
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def require_triton() -> None:
    """Raises ImportError, saying what to install, if Triton is missing."""
    if not _installed():
        raise ImportError("Triton kernels need Triton: pip install triton (Linux), or set TENURE_KERNELS=reference")


def interpreting() -> bool:
    """Whether this process runs Triton kernels in Triton's interpreter, on the CPU (`TRITON_INTERPRET=1`)."""
    require_triton()
    # As Triton reads it: its own settings cannot be traced by torch.compile.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Around launches: Triton launches on the current device, which in a model on several need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of kernels' matrix products in this dtype: fp32 without rounding to TF32; bf16 and fp16 as is.

    Triton's interpreter keeps bf16 as bits and would multiply those, so there the operands are `widened` to fp32, in
    which their products are exact.
    """
    if dtype == torch.bfloat16 and interpreting():
        return "widened"
    return "ieee" if dtype == torch.float32 else "tf32"


def check_dtype(operation: str, name: str, tensor: torch.Tensor, accepted: Iterable[torch.dtype]) -> None:
    """Raises ValueError naming the tensor, its dtype and the dtypes that the Triton kernel of `operation` accepts."""
    accepted = tuple(accepted)
    if tensor.dtype not in accepted:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        given = str(tensor.dtype).removeprefix("torch.")
        others = f"{VARIABLE}=reference takes others"
        raise ValueError(f"{operation} in Triton: {name} is {given}; accepted: {names} ({others})")


@cache
def _installed() -> bool:
    if find_spec("triton") is None:
        logger.warning("Triton is not installed: operations on CUDA run in plain torch")
        return False
    return True
