"""C kernels for the CPU: compiled at their first use, for the shape at hand, and loaded into the process.

They need a C compiler with OpenMP: the one that `CC` names, or `cc`. Where there is none, and where `TENURE_KERNELS`
asks for another form, there is no kernel and the caller runs plain torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ...retention.ops.kernel_choice import VARIABLE, compiles_for_cpu

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
POINTER, COUNT, THREADS, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float  # arguments' types

Kernel = Callable[..., None]


def find_kernel(
    name: str, arguments: tuple[type, ...], defines: tuple[str, ...], source: str | None = None
) -> Kernel | None:
    """The function `name` of `SOURCE.c` beside this file, compiled with these macros; None if that is impossible here.

    The first call for each set of macros compiles the file, which takes about 0.3 s.

    Args:
        source: by default the function's name.

    Raises:
        ValueError: `TENURE_KERNELS` is unknown.
    """
    return _kernel(os.environ.get(VARIABLE), name, arguments, defines, source or name)


@cache
def _kernel(
    kernels: str | None, name: str, arguments: tuple[type, ...], defines: tuple[str, ...], source: str
) -> Kernel | None:
    """`find_kernel` when `TENURE_KERNELS` is `kernels`."""
    library = _library(source, defines) if compiles_for_cpu() else None
    if library is None:
        return None
    kernel = getattr(library, name)
    kernel.argtypes, kernel.restype = arguments, None
    return kernel


@cache
def _library(source: str, defines: tuple[str, ...]) -> ctypes.CDLL | None:
    """The compiled file; None if it cannot be compiled or loaded."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    path = Path(__file__).with_name(f"{source}.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, f"{source}.so")
        command = [*compiler, *FLAGS, *(f"-D{one}" for one in defines), str(path), "-o", str(library), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["no output"])[-1])
            return ctypes.CDLL(str(library))  # it stays loaded without its file
        except OSError as error:
            logger.info("%s runs in plain torch: %s could not compile it: %s", source, compiler[0], error)
            return None
