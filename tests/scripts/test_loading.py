"""The memory of a command's process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from tenure.scripts.loading import keep_freed_memory
keep_freed_memory()
def faults():
    several = [torch.ones(2**21) for _ in range(8)]  # of 8 MiB each
    del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(8)]
print(counts[-1] - counts[3])
"""


GLIBC = sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_a_tensor_takes_the_memory_of_the_one_before() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def pages(**environment: str) -> int:
        command = [sys.executable, "-c", FAULTS]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**plain, **environment})
        return int(done.stdout)

    assert pages() < 1000
    assert pages(MALLOC_MMAP_THRESHOLD_="131072") > 10000  # what the user has set holds
