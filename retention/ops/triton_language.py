"""Triton's `jit` and language for kernel modules, which import without Triton too; their launchers report its absence.

Only kernel modules import this file, and only launchers import kernel modules, at their first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # A kernel's values have no types that Python's rules describe.
    from typing import TypeAlias

    class _Untyped(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Untyped):
        constexpr: TypeAlias = Any

    def jit(function: Callable[..., Any]) -> Any: ...

    def constexpr(value: Any) -> Any:
        """Marks a number that kernels read from their module."""
else:
    try:
        import triton.language as tl
        from triton import jit
        from triton.language import constexpr
    except ImportError:
        tl = None

        def jit(function):
            """Leaves the function as it is: nothing can run it."""
            return function

        def constexpr(value):
            return value


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in fp32. PRECISION: `kernel_choice.dot_precision` of the operands' dtype."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
