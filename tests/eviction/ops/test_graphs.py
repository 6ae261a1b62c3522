"""torch.compile and export take the runtime's operations into their graphs whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tenure.eviction.ops.copy_entries import copy_entries
from tenure.eviction.ops.page_table import append_entries, move_entries, release_pages
from tenure.eviction.ops.paged_attention import ragged_decode
from tenure.eviction.ops.radix_select import select_top
from tenure.eviction.ops.value_norms import value_norms_by_kernel
from tenure.eviction.ops.window_risk import window_risk

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def scored(query, key, weight) -> Any:
    """A window's scores, the norms of values, and the choice by their product."""
    n = key.shape[2]
    positions = torch.arange(n, dtype=torch.int32, device=key.device).expand(1, 1, n).contiguous()
    asked = positions[0, :, -query.shape[2] :].contiguous()
    worst, mean = window_risk(query, key, positions, asked, asked[:, 0].contiguous(), 0.3, 5, True)
    assert mean is not None, "it was asked for"
    scores = (torch.maximum(worst, mean) * value_norms_by_kernel(key, weight)).flatten(1)
    bounds = torch.tensor([0, n], dtype=torch.int32, device=key.device)
    wanted = torch.tensor([4], dtype=torch.int32, device=key.device)
    return scores, *select_top(scores, positions[0], wanted, bounds)


def lived(tensors, key) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Tokens are appended, attended to, and half of them evicted and copied out."""

    def run(query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = key.shape[2]
        index = torch.arange(n, dtype=torch.int32, device=query.device).view(1, n)
        held = [one.clone() for one in tensors]
        append_entries(key, key, index, index, torch.full_like(held[4], n), *held)
        key_pages, value_pages, _, table, lengths, free, counters = held
        output = ragged_decode(query, key_pages, value_pages, table, lengths, 0.3)
        keep = (index % 2 == 0).expand(len(lengths), n).contiguous()
        move_entries(keep, lengths, table, key_pages)
        release_pages(lengths, keep.sum(1, dtype=torch.int32), table, free, counters, 16)
        together = torch.zeros(3, key.shape[3], device=query.device)
        slots = table[0, :1].long() * 16 + torch.arange(3, device=query.device)
        copy_entries([key_pages.flatten(0, 1)], [together], slots, None)
        return output, together, lengths, counters

    return run


@pytest.mark.parametrize("name", ["scores", "pages"])
def test_whole_in_the_graph(name, empty_segments, device, triton_kernels) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, weight = (
        torch.randn(*shape, generator=generator).to(device) for shape in ((1, 2, 2, 8), (1, 1, 37, 8), (2, 8, 7))
    )
    function, inputs, ops = scored, (query, key, weight), ("window_risk", "value_norms", "select_top")
    if name == "pages":
        function, inputs = lived(empty_segments(1, 5, 16, 8, 8).tensors(), key), (query,)
        ops = ("append_entries", "ragged_decode", "move_entries", "release_pages", "copy_entries")
    expected = function(*inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    for one, other in zip(expected, compiled, strict=True):
        assert torch.equal(one, other) and one.any()

    class Model(torch.nn.Module):
        def forward(self, *x: torch.Tensor) -> Any:
            return function(*x)

    exported = torch.export.export(Model(), inputs)
    text = exported.graph_module.print_readable(print_output=False)
    assert all(f"torch.ops.tenure.{op}.default(" in text for op in ops)
    for one, other in zip(expected, exported.module()(*inputs), strict=True):
        assert torch.equal(one, other)
