"""Where kernels run in tests, and documents of every layout."""

from __future__ import annotations

import pytest
import torch

from tenure.retention import Segments
from tenure.retention.ops.kernel_choice import interpreting


@pytest.fixture(scope="session")
def device() -> str:
    """The interpreter runs on the CPU; compiled kernels need a GPU."""
    return "cpu" if interpreting() else "cuda"


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
