"""Where kernels run in tests, documents of every layout, and outputs that hold NaN until they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tenure.retention import Segments
from tenure.retention.ops.kernel_choice import interpreting


@pytest.fixture(scope="session")
def device() -> str:
    """The interpreter runs on the CPU; compiled kernels need a GPU."""
    return "cpu" if interpreting() else "cuda"


@pytest.fixture
def nan_outputs() -> Iterator[None]:
    """`torch.empty` and its relatives give NaN."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        assert torch.zeros(1).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


@pytest.fixture(params=["whole", "left padding", "right padding", "packed"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_segments(device: str):
    """Two rows of a layout; the second is padded, with tokens that no tile begins or ends with."""

    def make(layout: str, seq_len: int) -> Segments:
        mask = torch.ones(2, seq_len)
        mask[1, : seq_len // 3] = 0
        if layout == "left padding":
            return Segments.from_inputs(2, seq_len, mask, device=device)
        if layout == "right padding":
            return Segments.from_inputs(2, seq_len, mask.flip(-1), device=device)
        if layout == "packed":
            lengths = seq_len // 3, 1, seq_len - seq_len // 3 - 1
            positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
            return Segments.from_inputs(2, seq_len, position_ids=positions, device=device)
        return Segments.whole(2, seq_len, device)

    return make
