"""torch.compile and export take gated attention and occupancy into their graphs whole, gradients too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tenure.retention import Segments, gated_attention, occupancy
from tenure.retention.ops import biased_attention, gated_attention_after, occupancy_at

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
LENGTH = 5
Function = Callable[..., torch.Tensor]


def functions(device: str) -> dict[str, tuple[Function, str]]:
    """By name, and the op that stands in the graph."""
    segments, index = Segments.whole(1, LENGTH, device), torch.tensor([[0, 3]], device=device)
    return {
        "gated attention": (lambda q, k, v, b: gated_attention(q, k, v, b, 0.3, segments), "gated_attention"),
        "after a prompt": (lambda q, k, v, b: gated_attention_after(q[:, :, 2:], k, v, b, 0.3), "gated_attention"),
        "one bias a key": (lambda q, k, v, b: biased_attention(q[:, :, 2:], k, v, b, 0.3), "gated_attention"),
        "occupancy": (lambda q, k, v, b: occupancy(b[None], segments), "occupancy"),
        "occupancy at samples": (lambda q, k, v, b: occupancy_at(b[None], index, segments), "occupancy"),
    }


@pytest.mark.parametrize("name", functions("cpu"))
def test_whole_in_the_graph(name, device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENURE_KERNELS", "triton")
    function, op = functions(device)[name]
    generator = torch.Generator().manual_seed(0)
    query, key, value, bias = (torch.randn(1, n, LENGTH, 8, generator=generator).to(device) for n in (2, 1, 1, 1))
    inputs = [x.contiguous().requires_grad_() for x in (query, key, value, -bias[..., 0].abs())]
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        output = run(*inputs)
        grads = torch.autograd.grad(output.sin().sum(), inputs, allow_unused=True)
        results.append([output.detach(), *(one for one in grads if one is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

    class Model(torch.nn.Module):
        def forward(self, *x: torch.Tensor) -> torch.Tensor:
            return function(*x)

    exported = torch.export.export(Model(), tuple(x.detach() for x in inputs))
    assert f"torch.ops.tenure.{op}.default(" in exported.graph_module.print_readable(print_output=False)
    torch.testing.assert_close(exported.module()(*inputs), results[0][0], rtol=0, atol=0)
