"""A training step of a tiny model with the Triton kernels forced, against the CPU paths: losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tenure.retention import RetentionGates, SoftEviction
from tenure.retention.ops import gated_attention_triton, occupancy_triton
from tenure.training import Batch, GateObjective

from ...launches import running

__all__ = ["running"]
ATTENTION = {"forward_kernel", "delta_kernel", "key_grad_kernel", "query_grad_kernel"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
LENGTH = 21


def batch(packed: bool, device: str) -> Batch:
    """Two rows: packed documents, or one document a row of which the second is padded on the left."""
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 128, (2, LENGTH), generator=generator)
    position_ids, mask = torch.arange(LENGTH).expand(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    if packed:
        position_ids = torch.cat([torch.arange(8), torch.arange(LENGTH - 8)]).expand(2, LENGTH)
    else:
        mask[1, :6] = 0
    targets = (torch.rand(2, LENGTH, generator=generator) < 0.5) & (position_ids > 0) & (mask.cumsum(-1) > 1)
    return Batch(input_ids, position_ids, None if packed else mask, targets).to(device)


@pytest.mark.parametrize(("packed", "samples"), [(True, 5), (False, None)])
def test_a_step_is_the_same(packed, samples, tiny_model, device, running, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for module in (gated_attention_triton, occupancy_triton):
        launch = next(name for name in ("gated_attention", "occupancy") if hasattr(module, name))
        real = getattr(module, launch)
        monkeypatch.setattr(module, launch, lambda *a, real=real, name=launch: launched.append(name) or real(*a))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model("qwen3", **sizes).to(device)
    found = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("TENURE_KERNELS", kernels)
        torch.manual_seed(3)
        gates = RetentionGates.for_model(model, gate_width=16, initial_bias=1.0, init_std=0.4).to(device)
        losses = GateObjective(model, gates, budget=3, samples=samples)(batch(packed, device))
        losses.total.backward()
        gradients = [p.grad for p in gates.parameters()]
        found[kernels] = [losses.total, losses.ntp, losses.kl, losses.capacity, losses.occupancy, *gradients]
        assert set(running) == (set() if kernels == "reference" else ATTENTION | {"backward_kernel"})
        attentions = 2 * 2 if packed else 2  # of two layers; packed, the teacher needs the kernel as well
        launches = ["gated_attention"] * attentions + ["occupancy"]
        assert sorted(launched) == ([] if kernels == "reference" else launches)
    assert found["triton"][3] > 0
    for ours, reference in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-6)
        assert reference.abs().sum() > 0


@pytest.mark.parametrize("evictions", [(), (SoftEviction(0.4, sinks=1, recent=2),)])
def test_a_step_after_prompts_is_the_same(evictions, tiny_model, device, running, monkeypatch) -> None:
    """Rows whose prompts are read once and decay, or are evicted: no other attention runs under gates."""
    launched: list[bool] = []
    real = gated_attention_triton.attention_after
    counting = lambda *a, **k: launched.append(True) or real(*a, **k)  # noqa: E731
    monkeypatch.setattr(gated_attention_triton, "attention_after", counting)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_model("qwen3", **sizes).to(device)
    rows = batch(False, device)
    rows.loss_mask[:, :14] = False
    rows = replace(rows, prompt_tokens=(13, 7))
    found = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("TENURE_KERNELS", kernels)
        torch.manual_seed(3)
        gates = RetentionGates.for_model(model, gate_width=16, initial_bias=1.0, init_std=0.4).to(device)
        losses = GateObjective(model, gates, budget=3, samples=None, evictions=evictions)(rows)
        losses.total.backward()
        found[kernels] = [losses.total, losses.ntp, losses.kl, *(p.grad for p in gates.parameters())]
        assert set(running) >= (set() if kernels == "reference" else ATTENTION)
        assert len(launched) == (0 if kernels == "reference" else 4)
    for ours, reference in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-4, atol=2e-6)
        assert reference.abs().sum() > 0
