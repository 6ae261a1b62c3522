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


def find_kernel(name: str, arguments: tuple[type, ...], defines: tuple[str, ...]) -> Kernel | None:
    """The function `name` of `NAME.c` beside this file, compiled with these macros; None if that is impossible here.

    The first call for each set of macros compiles it, which takes about 0.3 s.

    Raises:
        ValueError: `TENURE_KERNELS` is unknown.
    """
    return _kernel(os.environ.get(VARIABLE), name, arguments, defines)


@cache
def _kernel(kernels: str | None, name: str, arguments: tuple[type, ...], defines: tuple[str, ...]) -> Kernel | None:
    """`find_kernel` when `TENURE_KERNELS` is `kernels`."""
    if not compiles_for_cpu():
        return None
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, f"{name}.so")
        command = [*compiler, *FLAGS, *(f"-D{one}" for one in defines), str(source), "-o", str(library)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["no output"])[-1])
            kernel = getattr(ctypes.CDLL(str(library)), name)  # it stays loaded without its file
        except OSError as error:
            logger.info("%s runs in plain torch: %s could not compile it: %s", name, compiler[0], error)
            return None
    kernel.argtypes, kernel.restype = arguments, None
    return kernel
