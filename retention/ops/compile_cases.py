"""Every launch of this package's kernels at the shapes of two models, for `compiling.compile_kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import gated_attention_gradients, gated_attention_kernels, occupancy_kernels
from .compiling import Constant, KernelCase
from .gated_attention_triton import DELTA_ROWS, launch_numbers
from .kernel_choice import LAUNCH_OPTIONS
from .occupancy_triton import BLOCK_M, BLOCK_N, WARPS

POINTERS = {"start": "*i32", "end": "*i32", "log_beta": "*fp32", "lse": "*fp32", "delta": "*fp32", "beta_grad": "*fp32"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SIZES = ("batch", "heads", "kv_heads", "q_len", "seq_len", "samples")
STAGES = 3  # Triton's own default


@dataclass(frozen=True)
class ModelShape:
    """What the kernels see of a model."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = (ModelShape("Qwen3-4B", 36, 32, 8, 128), ModelShape("Llama-3.1-8B", 32, 32, 8, 128))


def compile_cases(capability: int, models: tuple[ModelShape, ...] = MODELS) -> list[KernelCase]:
    """All launches in bf16 on a card of this capability."""
    return [case for model in models for case in [*attention_cases(model, capability), *occupancy_cases(model)]]


def attention_cases(model: ModelShape, capability: int, dtype: torch.dtype = torch.bfloat16) -> list[KernelCase]:
    """Forward, and backward's three kernels; after a prompt the same ones run, or those with one bias a key."""
    cases = []
    groups = model.heads // model.kv_heads
    kernels = {
        "forward": gated_attention_kernels.forward_kernel,
        "query_grad": gated_attention_gradients.query_grad_kernel,
        "key_grad": gated_attention_gradients.key_grad_kernel,
    }
    for kind, decays in (("gated", True), ("biased", False)):
        for name, kernel in kernels.items():
            _, numbers = launch_numbers(name, model.head_dim, model.head_dim, groups, dtype, capability, decays)
            cases.append(_case(f"{kind} attention {name}", kernel, numbers, dtype, model))
    block = cases[0].arguments["BLOCK_V"]
    numbers = {"VALUE_DIM": model.head_dim, "BLOCK_V": block, "BLOCK_M": DELTA_ROWS, **LAUNCH_OPTIONS}
    return [*cases, _case("gated attention delta", gated_attention_gradients.delta_kernel, numbers, dtype, model)]


def occupancy_cases(model: ModelShape) -> list[KernelCase]:
    """Everywhere and at chosen positions."""
    cases = []
    for chosen in (False, True):
        numbers = {"CHOSEN": chosen, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": WARPS, **LAUNCH_OPTIONS}
        where = "at samples" if chosen else "everywhere"
        for name in ("forward", "backward"):
            kernel = getattr(occupancy_kernels, f"{name}_kernel")
            cases.append(_case(f"occupancy {name} {where}", kernel, numbers, torch.float32, model))
    return cases


def _case(name: str, kernel: Any, numbers: dict[str, Any], dtype: torch.dtype, model: ModelShape) -> KernelCase:
    """Types of what the launcher passes by place; the strides are multiples of the head dimension."""
    arguments: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument in numbers:
            value = numbers[argument]
            arguments[argument] = Constant(value) if isinstance(value, str) else value
        elif argument in POINTERS:
            arguments[argument] = POINTERS[argument]
        elif argument == "index":
            arguments[argument] = "*i32" if numbers["CHOSEN"] else "*fp32"
        elif argument in ("scale", "scaling"):
            arguments[argument] = "fp32"
        elif argument.startswith("stride_") or argument in SIZES:
            arguments[argument] = "i32"
        else:
            arguments[argument] = f"*{TYPES[dtype]}"
    divisible = tuple(argument for argument in arguments if argument.startswith("stride_"))
    warps, stages = numbers.get("num_warps", 4), numbers.get("num_stages", STAGES)
    return KernelCase(name, kernel, arguments, warps, stages, divisible, model.name)
