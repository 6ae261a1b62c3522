"""Compiles a Triton kernel for a GPU that need not be present, and reads its registers, shared memory and spills.

`triton.compile` builds a cubin for any target, and `cuobjdump`, which comes with Triton, reads its resources. So a
machine without a GPU can reject a kernel that spills or does not fit. Speed can only be measured on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...retention.ops.kernel_choice import LAUNCH_OPTIONS, interpreting

KIB = 1024
CAPABILITIES = (80, 90)  # A100, H100
SHARED_LIMIT = {80: 163 * KIB, 90: 227 * KIB}  # bytes a block may have (CUDA programming guide, compute capabilities)
SHARED_PER_SM = {80: 164 * KIB, 90: 228 * KIB}
REGISTERS_PER_SM = 64 * KIB
THREADS_PER_SM = 2048
BLOCKS_PER_SM = 32
POINTER_ALIGNMENT = 16  # what a launch finds for torch's own allocations
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class KernelCase:
    """One way in which a launcher launches a kernel.

    Attributes:
        name: for the report, e.g. `gated attention forward`.
        kernel: the `triton.jit` function.
        arguments: by name, in any order, all of the kernel's: a type as text for what a launch passes (`*bf16`,
            `*fp32`, `*i32`, `*i1`, `i32`, `fp32`), a tuple of texts for a tuple of pointers, a value for a
            `tl.constexpr` (`64`, `True`, `None`, `"ieee"` in a `Constant`).
        num_warps, num_stages: as the launcher passes them; Triton's own where it passes none.
        divisible: integer arguments that are multiples of 16 at this shape; Triton compiles such a launch on its own.
        shape: name of the shape, e.g. `Qwen3-4B`.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    shape: str = ""


def specialised(sizes: Mapping[str, int]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How Triton specialises a launch's integers: their types (1 is a constant), and which are multiples of 16."""
    types = {name: 1 if size == 1 else "i32" for name, size in sizes.items()}
    return types, tuple(name for name, size in sizes.items() if size % POINTER_ALIGNMENT == 0)


@dataclass(frozen=True)
class Constant:
    """A `tl.constexpr` whose value is a text or a Triton dtype, which would read as a type."""

    value: Any


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel.

    Attributes:
        name, shape: of the case.
        capability: 80 or 90.
        registers: 32-bit registers a thread.
        shared: bytes of shared memory a block.
        spills: bytes of stack a thread, 0 if all its values stay in registers.
        threads: of a block.
        tensor_cores: `wgmma` (Hopper's asynchronous ones), `mma`, or `none`.
    """

    name: str
    shape: str
    capability: int
    registers: int
    shared: int
    spills: int
    threads: int
    tensor_cores: str

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit on a multiprocessor at the same time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        fits = [BLOCKS_PER_SM, THREADS_PER_SM // self.threads, REGISTERS_PER_SM // registers]
        return min([*fits, SHARED_PER_SM[self.capability] // (self.shared + KIB)])

    @property
    def problems(self) -> list[str]:
        """Why this kernel must not ship, in words; empty if it may."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes a thread are spilled")
        limit = SHARED_LIMIT[self.capability]
        if self.shared > limit:
            found.append(f"{self.shared / KIB:.1f} KiB of shared memory exceed the card's {limit // KIB} KiB")
        return found


def compile_kernel(case: KernelCase, capability: int) -> Compiled:
    """Compiles a case for `sm_<capability>`, without a GPU.

    Raises:
        ValueError: the case's arguments are not the kernel's, or the capability is unknown.
        RuntimeError: this process runs kernels in the interpreter, where there is nothing to compile.
    """
    if capability not in CAPABILITIES:
        raise ValueError(f"capability is {capability}; accepted: {', '.join(map(str, CAPABILITIES))}")
    if interpreting():
        raise RuntimeError("kernels cannot be compiled in a process that interprets them (TRITON_INTERPRET=1)")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    if sorted(names) != sorted(case.arguments):
        wrong = sorted(set(names) ^ set(case.arguments))
        raise ValueError(f"{case.name}: the case and the kernel differ in the arguments {', '.join(wrong)}")
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        value = case.arguments[name]
        if isinstance(value, tuple) and all(isinstance(one, str) for one in value):
            signature[name] = value
            attributes |= {(place, i): [["tt.divisibility", POINTER_ALIGNMENT]] for i in range(len(value))}
            continue
        if not isinstance(value, str):
            signature[name] = "constexpr"
            constants[name] = value.value if isinstance(value, Constant) else value
            continue
        signature[name] = value
        if value.startswith("*") or name in case.divisible:
            attributes[(place,)] = [["tt.divisibility", POINTER_ALIGNMENT]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **LAUNCH_OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack, local = _resources(compiled.asm["cubin"], compiled.metadata.name)
    return Compiled(
        case.name,
        case.shape,
        capability,
        registers,
        compiled.metadata.shared,
        stack + local,
        case.num_warps * 32,
        _tensor_cores(compiled.asm["ptx"]),
    )


def _resources(cubin: bytes, name: str) -> tuple[int, int, int]:
    """Registers a thread, and bytes of stack and of local memory a thread, of the function `name`."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {function: (int(reg), int(stack), int(local)) for function, reg, stack, _, local in RESOURCES.findall(text)}
    return found[name]


def _tensor_cores(ptx: str) -> str:
    if "wgmma.mma_async" in ptx:
        return "wgmma"
    return "mma" if "mma.sync" in ptx else "none"
