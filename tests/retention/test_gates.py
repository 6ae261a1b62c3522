"""log β by one function: of one layer as written in the papers, and of all layers at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from tenure.retention import RetentionGates
from tenure.retention.gates import gate_log_beta, stacked_steps

PROJECTIONS = ("shared", "per_layer", "shared_heads")


@pytest.fixture(params=PROJECTIONS)
def gates(request: pytest.FixtureRequest, tiny_llama: PreTrainedModel) -> RetentionGates:
    torch.manual_seed(0)
    gates = RetentionGates.for_model(tiny_llama, gate_width=8, projection=request.param)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.normal_()
    return gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_is_the_formula_to_the_bit(gates: RetentionGates, dtype: torch.dtype) -> None:
    hidden_states = torch.randn(2, 7, 32, dtype=dtype)
    for row, layer in enumerate(gates.layer_indices):
        features = gates.bodies[str(layer)](hidden_states.float())
        if gates.config.projection == "shared_heads":
            logits = features.unflatten(-1, (2, 8)) @ gates.weight[0] + gates.bias
        elif gates.config.projection == "per_layer":
            logits = F.linear(features, gates.weight[row], gates.bias[row])
        else:
            logits = F.linear(features, gates.weight, gates.bias)
        with torch.autocast("cpu", torch.bfloat16):
            found = gates.log_beta(layer, hidden_states)
        assert found.dtype == torch.float32 and torch.equal(found, F.logsigmoid(logits).transpose(1, 2))


def test_all_layers_at_once_equal_each_one(gates: RetentionGates) -> None:
    hidden_states = torch.randn(3, 5, 32)
    steps = stacked_steps(gates)
    found = gate_log_beta(gates.config, hidden_states, steps, gates.weight, gates.bias)
    assert found.shape == (3, 5, 2) and found.dtype == torch.float32
    for row, layer in enumerate(gates.layer_indices):
        expected = gates.log_beta(layer, hidden_states[row][None])[0].T
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_stacked_weights_are_a_copy(gates: RetentionGates) -> None:
    steps = stacked_steps(gates)
    before = [step[0].clone() for step in steps if isinstance(step, tuple)]
    with torch.no_grad():
        for parameter in gates.bodies.parameters():
            parameter.zero_()
    after = [step[0] for step in steps if isinstance(step, tuple)]
    assert len(after) in (1, 2) and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert not any(weight.requires_grad for weight in after)


def test_learned_activations_are_not_shared_with_the_gates() -> None:
    """Apertus' xIELU has parameters, in bf16."""
    from tenure.scripts.bench.tiny_models import TEXT_ARCHITECTURES

    model = TEXT_ARCHITECTURES["apertus"].build()
    gates = RetentionGates.for_model(model, gate_width=8)
    assert gates.config.activation == "silu"
    assert {parameter.dtype for parameter in gates.parameters()} == {torch.float32}
    gates.check_model(model)
