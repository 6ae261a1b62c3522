"""Launching the Triton kernels of occupancy, as custom ops that autograd, `torch.compile` and export see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..segments import Segments
from .kernel_choice import LAUNCH_OPTIONS, check_dtype, interpreting, launching_on
from .occupancy_kernels import backward_kernel, forward_kernel


@dataclass(frozen=True)
class OccupancyLaunch:
    """A launch of the kernels.

    Attributes:
        queries, keys: tokens of a tile; BLOCK_M and BLOCK_N of the kernels.
        warps: of a program.
    """

    queries: int = 32
    keys: int = 64
    warps: int = 4


COMPILED = OccupancyLaunch()
INTERPRETED = OccupancyLaunch(queries=16, keys=32)  # small tiles, so that the tests' short sequences have many


def occupancy(log_beta: torch.Tensor, query_index: torch.Tensor | None, segments: Segments) -> torch.Tensor:
    """Same contract as `retention.ops.occupancy_at` with four axes; `query_index` None is every position.

    Raises:
        ValueError: log_beta is not fp32.
    """
    check_dtype("occupancy", "log_beta", log_beta, (torch.float32,))
    return forward_op(log_beta, query_index, *segments.bounds)


@torch.library.custom_op("tenure::occupancy", mutates_args=())
def forward_op(
    log_beta: torch.Tensor, query_index: torch.Tensor | None, start: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """`(layers, batch, heads, seq_len)` fp32 -> `(layers, batch, heads, samples)`. start, end: `Segments.bounds`."""
    output = _output(log_beta, query_index)
    if output.numel():
        numbers = launch_numbers(query_index is not None)
        tiles = -(-output.shape[-1] // numbers["BLOCK_M"])
        _launch(forward_kernel, tiles, log_beta, query_index, (start, output), numbers)
    return output


@forward_op.register_fake
def _(log_beta, query_index, start, end):
    return _output(log_beta, query_index)


@torch.library.custom_op("tenure::occupancy_backward", mutates_args=())
def backward_op(
    grad: torch.Tensor, log_beta: torch.Tensor, query_index: torch.Tensor | None, end: torch.Tensor
) -> torch.Tensor:
    """Gradient of log_beta."""
    beta_grad = log_beta.new_empty(log_beta.shape)
    if beta_grad.numel():
        numbers = launch_numbers(query_index is not None)
        tiles = -(-log_beta.shape[-1] // numbers["BLOCK_N"])
        _launch(backward_kernel, tiles, log_beta, query_index, (end, grad.contiguous(), beta_grad), numbers)
    return beta_grad


@backward_op.register_fake
def _(grad, log_beta, query_index, end):
    return log_beta.new_empty(log_beta.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    log_beta, query_index, _, end = inputs
    ctx.save_for_backward(log_beta, query_index, end)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return backward_op(grad, *ctx.saved_tensors), None, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)


def launch_numbers(chosen: bool) -> dict[str, Any]:
    """The keyword arguments of a launch. `chosen`: at chosen positions only."""
    launch = INTERPRETED if interpreting() else COMPILED
    blocks = {"BLOCK_M": launch.queries, "BLOCK_N": launch.keys}
    return {"CHOSEN": chosen, **blocks, "num_warps": launch.warps, **LAUNCH_OPTIONS}


def _launch(
    kernel: Any, tiles: int, log_beta: torch.Tensor, query_index: torch.Tensor | None,
    tensors: tuple[torch.Tensor, ...], numbers: dict[str, Any],
) -> None:  # fmt: skip
    """One program for each row and tile. `tensors`: the kernel's arguments between `index` and the sizes."""
    layers, batch, heads, seq_len = log_beta.shape
    index = log_beta if query_index is None else query_index.to(torch.int32).contiguous()  # not read if None
    samples = seq_len if query_index is None else query_index.shape[1]
    grid = (layers * batch * heads, tiles)
    with launching_on(log_beta):
        kernel[grid](log_beta.contiguous(), index, *tensors, batch, heads, seq_len, samples, **numbers)


def _output(log_beta: torch.Tensor, query_index: torch.Tensor | None) -> torch.Tensor:
    samples = log_beta.shape[-1] if query_index is None else query_index.shape[1]
    return log_beta.new_empty(*log_beta.shape[:-1], samples)
