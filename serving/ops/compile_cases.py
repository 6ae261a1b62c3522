"""The copy kernels as they are launched for the pages of a layer, for the compiler's report."""

from __future__ import annotations

from ...retention.ops.compiling import KernelCase
from . import page_copies

PAGE, DIM, MODELS = 16, 128, ("Qwen3-4B", "Llama-3.1-8B")
# Words of a page of a head: keys and values in bf16, positions, log β.
WORDS = (PAGE * DIM // 2, PAGE * DIM // 2, PAGE, PAGE)


def compile_cases() -> list[KernelCase]:
    """Gathering and scattering the pages of one layer of a compressed prompt."""
    arguments = {
        "tensors": ("*i32",) * len(WORDS), "ids": "*i32", "buffer": "*i32", "count": "i32", "WORDS": WORDS,
        "BLOCK": page_copies.BLOCK,
    }  # fmt: skip
    return [
        KernelCase(f"tier copies, {name}", page_copies.copy_pages, {**arguments, "GATHER": gather}, shape=model)
        for model in MODELS
        for name, gather in (("gather", True), ("scatter", False))
    ]
