"""Compile cases of `tenure.retention.ops`: every launch of its kernels at the shapes of two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...retention.ops import gated_attention_gradients, gated_attention_kernels, occupancy_kernels
from ...retention.ops.gated_attention_triton import DELTA_ROWS, launch_numbers
from ...retention.ops.kernel_choice import LAUNCH_OPTIONS
from ...retention.ops.occupancy_triton import COMPILED
from .compiling import Constant, KernelCase, specialised

POINTERS = {"start": "*i32", "end": "*i32", "log_beta": "*fp32", "lse": "*fp32", "delta": "*fp32", "beta_grad": "*fp32"}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Triton compiles a launch whose sizes are multiples of 16 on its own, and one whose batch is 1.
LENGTHS = {"": 32768, ", odd length": 32767}
SAMPLES = 64


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a model that its kernels depend on."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = (ModelShape("Qwen3-4B", 36, 32, 8, 128), ModelShape("Llama-3.1-8B", 32, 32, 8, 128))


def compile_cases(capability: int, models: tuple[ModelShape, ...] = MODELS) -> list[KernelCase]:
    """All launches in bf16 of a single row on a card of this capability."""
    return [case for model in models for case in [*attention_cases(model, capability), *occupancy_cases(model)]]


def attention_cases(model: ModelShape, capability: int, dtype: torch.dtype = torch.bfloat16) -> list[KernelCase]:
    """Forward, and backward's three kernels; after a prompt the same ones run, or those with one bias a key."""
    launches = []
    groups = model.heads // model.kv_heads
    kernels = {
        "forward": gated_attention_kernels.forward_kernel,
        "query_grad": gated_attention_gradients.query_grad_kernel,
        "key_grad": gated_attention_gradients.key_grad_kernel,
    }
    for kind, decays in (("gated", True), ("biased", False)):
        for name, kernel in kernels.items():
            _, numbers = launch_numbers(name, model.head_dim, model.head_dim, groups, dtype, capability, decays)
            launches.append((f"{kind} attention {name}", kernel, numbers))
    block = launches[0][2]["BLOCK_V"]
    numbers = {"VALUE_DIM": model.head_dim, "BLOCK_V": block, "BLOCK_M": DELTA_ROWS, **LAUNCH_OPTIONS}
    launches.append(("gated attention delta", gated_attention_gradients.delta_kernel, numbers))
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads}
    return [
        _case(name + odd, kernel, numbers, dtype, model, sizes | {"q_len": length, "seq_len": length})
        for odd, length in LENGTHS.items()
        for name, kernel, numbers in launches
    ]


def occupancy_cases(model: ModelShape) -> list[KernelCase]:
    """Everywhere and at chosen positions."""
    cases = []
    for chosen in (False, True):
        tile = {"BLOCK_M": COMPILED.queries, "BLOCK_N": COMPILED.keys, "num_warps": COMPILED.warps}
        numbers = {"CHOSEN": chosen, **tile, **LAUNCH_OPTIONS}
        where = "at samples" if chosen else "everywhere"
        for name in ("forward", "backward"):
            kernel = getattr(occupancy_kernels, f"{name}_kernel")
            for odd, length in LENGTHS.items():
                sizes = {"batch": 1, "heads": model.kv_heads, "seq_len": length}
                sizes["samples"] = SAMPLES if chosen else length
                cases.append(_case(f"occupancy {name} {where}{odd}", kernel, numbers, torch.float32, model, sizes))
    return cases


def _case(
    name: str, kernel: Any, numbers: dict[str, Any], dtype: torch.dtype, model: ModelShape, sizes: dict[str, int]
) -> KernelCase:
    """Types of the launcher's positional arguments; the strides are multiples of the head dimension."""
    strides = {name: model.head_dim for name in kernel.arg_names if name.startswith("stride_")}
    integers = sizes | strides
    arguments, divisible = specialised({name: integers[name] for name in kernel.arg_names if name in integers})
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
        elif argument not in arguments:
            arguments[argument] = f"*{TYPES[dtype]}"
    options = {name: numbers[name] for name in ("num_warps", "num_stages") if name in numbers}
    return KernelCase(name, kernel, arguments, divisible=divisible, shape=model.name, **options)
