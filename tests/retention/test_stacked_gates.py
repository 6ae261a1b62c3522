"""Gates of all layers at once against the gates themselves."""

from __future__ import annotations

import pytest
import torch

from tenure.retention import RetentionGates
from tenure.retention.gates import gate_log_beta, stacked_steps


@pytest.mark.parametrize("projection", ["shared", "per_layer", "shared_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacked_gates_equal_the_gates(tiny_llama, projection, dtype):
    torch.manual_seed(0)
    gates = RetentionGates.for_model(tiny_llama, gate_width=8, projection=projection)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_()
    hidden_states = [torch.randn(2, 1, 32, dtype=dtype) for _ in gates.layer_indices]
    tokens = torch.cat(hidden_states, dim=1).transpose(0, 1)
    stacked = gate_log_beta(gates.config, tokens, stacked_steps(gates), gates.weight, gates.bias).flatten(1)
    assert stacked.shape == (3, 2 * 2) and stacked.dtype == torch.float32
    for layer, (hidden, got) in enumerate(zip(hidden_states, stacked, strict=True)):
        torch.testing.assert_close(got.view(2, 2, 1), gates.log_beta(layer, hidden), atol=1e-5, rtol=1e-5)
