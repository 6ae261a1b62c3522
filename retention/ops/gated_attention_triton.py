"""Launching the Triton kernels of gated attention, as custom ops that autograd, `torch.compile` and export see."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any

import torch

from ..segments import Segments
from .gated_attention_gradients import delta_kernel, key_grad_kernel, query_grad_kernel
from .gated_attention_kernels import forward_kernel
from .kernel_choice import LAUNCH_OPTIONS, check_dtype, dot_precision, interpreting, launching_on
from .softmax import ORDINARY, Softmax

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
LEAST_BLOCK = 16  # of a matrix product in Triton
LOG2_E = log2(2.718281828459045)
DELTA_ROWS = 32


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a block, and copies that are loaded ahead.

    The values are the largest of those tried that compile without spills; how fast they are was not measured.
    """

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """One tile for each kernel."""

    forward: Tile
    query_grad: Tile
    key_grad: Tile

    @classmethod
    def choose(cls, width: int, dtype: torch.dtype, capability: int | None, decays: bool) -> Tiles:
        """For the larger head dimension `width`, rounded up to a power of two, and a card's capability, e.g. 90.

        None is the interpreter, where small tiles let short sequences have many.
        """
        if capability is None:
            return cls(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(16, 32, 4, 1))
        hopper = capability >= 90
        ahead = 2 if decays else 1  # without decays Ampere's compiler keeps more in registers, and spills
        if dtype == torch.float32:
            return cls(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1))
        if width > 128:
            return cls(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1))
        if width > 64:
            key_grad = Tile(32, 128, 8, 2) if hopper else Tile(64, 64, 8, ahead)
        else:
            key_grad = Tile(64, 128, 8, 2) if hopper else Tile(32, 64, 4, ahead)
        if hopper:
            return cls(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), key_grad)
        return cls(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), key_grad)


def gated_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """Same contract as `retention.ops.gated_attention`: q·k in the model's dtype, the bias in fp32.

    Under autocast query, key and value are cast to its dtype. Every gradient has one owner: no atomics, the same bits
    in every run.

    Raises:
        ValueError: a dtype other than bf16, fp16, fp32, unequal dtypes, or a head dimension above 256.
    """
    return _attend(query, key, value, log_beta, scaling, segments.bounds, True, softmax)


def attention_after(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float, decays: bool,
    softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """`gated_attention_after`, bias being log β, or without `decays` `biased_attention`: the same kernels."""
    start = torch.zeros(key.shape[0], key.shape[2], dtype=torch.int32, device=key.device)
    return _attend(query, key, value, bias, scaling, (start, torch.full_like(start, key.shape[2])), decays, softmax)


def attention_part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
    segments: Segments, softmax: Softmax = ORDINARY,
) -> torch.Tensor:  # fmt: skip
    """`gated_attention_part` for the last queries of the columns that `key` has: the same kernels."""
    start, end = (bound[:, : key.shape[2]].contiguous() for bound in segments.bounds)
    return _attend(query, key, value, log_beta, scaling, (start, end.clamp_max(key.shape[2])), True, softmax)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float,
    bounds: tuple[torch.Tensor, torch.Tensor], decays: bool, softmax: Softmax,
) -> torch.Tensor:  # fmt: skip
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_dtype("gated attention", name, x, DTYPES)
    if not query.dtype == key.dtype == value.dtype:
        given = ", ".join(str(x.dtype).removeprefix("torch.") for x in (query, key, value))
        raise ValueError(f"gated attention in Triton: query, key and value are {given}; one dtype is accepted")
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_HEAD_DIM:
        raise ValueError(f"gated attention in Triton: a head dimension is {width}; up to {MAX_HEAD_DIM} is accepted")
    with torch.autocast(device, enabled=False):
        cap = (softmax.softcap or 0.0) * LOG2_E
        output, _ = forward_op(query, key, value, bias.float(), *bounds, scaling, decays, softmax.sinks, cap)
    return output.to(dtype)


@torch.library.custom_op("tenure::gated_attention", mutates_args=())
def forward_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, start: torch.Tensor,
    end: torch.Tensor, scaling: float, decays: bool, sinks: torch.Tensor | None = None, softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output, and `lse` `(batch, num_heads, q_len)` fp32: log2 of each row's sum, its sink included.

    Without a sink it is 0 where a row has no key.

    Args:
        query: of the last `q_len` tokens of the sequence.
        start, end: `Segments.bounds` of the whole sequence.
        decays: whether log_beta decays with the age of a key, or is the bias of its logits as it is.
        sinks: `(num_heads,)`, as in `softmax.Softmax`.
        softcap: cap on logits in powers of two; 0 for none.
    """
    query, key, value = (_last_contiguous(x) for x in (query, key, value))
    output, lse = _outputs(query, value)
    batch, heads, q_len, _ = query.shape
    if not query.numel():
        return output, lse
    tile, numbers = _numbers("forward", query, key, value, decays, softcap)
    grid = (-(-q_len // tile.queries), batch * heads)
    with launching_on(query):
        forward_kernel[grid](
            query, key, value, log_beta.contiguous(), start, output, lse,
            *_strides(query, key, value, output), heads, q_len, key.shape[2], scaling * LOG2_E, **numbers,
        )  # fmt: skip
    if sinks is not None:
        # One more entry of value zero: a larger sum. With it, the kernels of the backward give the right gradients.
        whole = torch.logaddexp2(lse, _sink_levels(sinks))
        output.mul_(torch.exp2(lse - whole).unsqueeze(-1))
        lse = whole
    return output, lse


def _sink_levels(sinks: torch.Tensor) -> torch.Tensor:
    """fp32 `(num_heads, 1)`: sinks in powers of two."""
    return sinks.float().mul(LOG2_E).unsqueeze(-1)


@forward_op.register_fake
def _(query, key, value, log_beta, start, end, scaling, decays, sinks=None, softcap=0.0):
    return _outputs(query, value)


@torch.library.custom_op("tenure::gated_attention_backward", mutates_args=())
def backward_op(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor,
    start: torch.Tensor, end: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, scaling: float, decays: bool,
    with_query: bool, softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query (empty without `with_query`), key, value and log_beta."""
    query, key, value, grad = (_last_contiguous(x) for x in (query, key, value, grad))
    grads = query_grad, key_grad, value_grad, beta_grad = _gradients(query, key, value, log_beta, with_query)
    (batch, heads, q_len, _), (kv_heads, seq_len) = query.shape, key.shape[1:3]
    if not query.numel():
        for gradient in grads:
            gradient.zero_()
        return grads
    log_beta = log_beta.contiguous()
    delta = torch.empty_like(lse)
    tile, numbers = _numbers("key_grad", query, key, value, decays, softcap)
    of_values = {name: numbers[name] for name in ("VALUE_DIM", "BLOCK_V")}
    scale = scaling * LOG2_E
    with launching_on(query):
        delta_kernel[(-(-q_len // DELTA_ROWS), batch * heads)](
            output, grad, delta, *_strides(output, grad), heads, q_len, BLOCK_M=DELTA_ROWS, **of_values,
            **LAUNCH_OPTIONS,
        )  # fmt: skip
        key_grad_kernel[(-(-seq_len // tile.keys), batch * kv_heads)](
            query, key, value, log_beta, end, grad, lse, delta, key_grad, value_grad, beta_grad,
            *_strides(query, key, value, grad, key_grad, value_grad), kv_heads, q_len, seq_len, scale, scaling,
            **numbers,
        )  # fmt: skip
        if with_query:
            tile, numbers = _numbers("query_grad", query, key, value, decays, softcap)
            query_grad_kernel[(-(-q_len // tile.queries), batch * heads)](
                query, key, value, log_beta, start, grad, lse, delta, query_grad,
                *_strides(query, key, value, grad, query_grad), heads, q_len, seq_len, scale, scaling, **numbers,
            )  # fmt: skip
    return grads


@backward_op.register_fake
def _(grad, query, key, value, log_beta, start, end, output, lse, scaling, decays, with_query, softcap=0.0):
    return _gradients(query, key, value, log_beta, with_query)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scaling, ctx.decays, sinks, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output, sinks)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    with_query = ctx.needs_input_grad[0]  # not in a model's first layer, whose gates see what no gate has touched
    *inputs, output, lse, sinks = ctx.saved_tensors
    grads = backward_op(grad, *inputs, output, lse, ctx.scaling, ctx.decays, with_query, ctx.softcap)
    wanted = ctx.needs_input_grad  # without trailing arguments that have their default
    of_sinks = _sink_gradient(grad, output, lse, sinks) if any(wanted[8:]) else None
    return (grads[0] if with_query else None, *grads[1:], None, None, None, None, of_sinks, None)[: len(wanted)]


def _sink_gradient(
    grad: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    weight = torch.exp2(_sink_levels(sinks) - lse)
    delta = (grad.float() * output.float()).sum(-1)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


forward_op.register_autograd(_backward, setup_context=_setup_context)


def _outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output lies in memory as `(batch, q_len, num_heads, value_dim)`, which is how models read it."""
    batch, heads, q_len, _ = query.shape
    output = query.new_empty(batch, q_len, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, q_len, dtype=torch.float32)


def _gradients(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, with_query: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """In memory as the output, whatever the strides of the inputs."""
    wanted = (query, key, value)
    query_grad, key_grad, value_grad = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in wanted)
    return query_grad if with_query else query.new_empty(0), key_grad, value_grad, log_beta.new_empty(log_beta.shape)


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _numbers(
    kernel: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decays: bool, softcap: float
) -> tuple[Tile, dict[str, Any]]:
    """The tile of a launch, its constants and its options."""
    capability = None
    if not interpreting():
        major, minor = torch.cuda.get_device_capability(query.device)
        capability = 10 * major + minor
    groups = query.shape[1] // key.shape[1]
    return launch_numbers(kernel, query.shape[-1], value.shape[-1], groups, query.dtype, capability, decays, softcap)


def launch_numbers(
    kernel: str, head_dim: int, value_dim: int, groups: int, dtype: torch.dtype, capability: int | None,
    decays: bool = True, softcap: float = 0.0,
) -> tuple[Tile, dict[str, Any]]:  # fmt: skip
    """The tile of `forward`, `query_grad` or `key_grad`, and the keyword arguments of its launch."""
    block_d, block_v = (max(LEAST_BLOCK, 1 << (width - 1).bit_length()) for width in (head_dim, value_dim))
    tile: Tile = getattr(Tiles.choose(max(block_d, block_v), dtype, capability, decays), kernel)
    numbers = {
        "GROUPS": groups,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": block_d,
        "BLOCK_V": block_v,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "PRECISION": dot_precision(dtype),
        "DECAYS": decays,
        "SOFTCAP": softcap,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **LAUNCH_OPTIONS,
    }
    return tile, numbers
