"""Prompts read without gates: what comes after them against the whole sequence, and soft eviction against the real."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from tenure.eviction import evict
from tenure.retention import RetentionGates, SoftEviction, attach, attach_after, read_prompt
from tenure.retention.decoder_layers import text_decoder
from tenure.retention.ops import biased_attention, gated_attention, gated_attention_after

TOKENS = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(1))
PROMPT = 45


def decaying_gates(model: PreTrainedModel) -> RetentionGates:
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=0.0, init_std=0.5)


def after(
    model: PreTrainedModel, gates: RetentionGates, eviction: SoftEviction | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the tokens after the prompt, and log β of all."""
    prompt = read_prompt(model, TOKENS[:, :PROMPT])
    with torch.no_grad(), attach_after(model, gates, prompt, eviction) as attached:
        hidden_states = text_decoder(model)(input_ids=TOKENS[:, PROMPT:]).last_hidden_state
        head = model.get_output_embeddings()
        assert head is not None
        return head(hidden_states), attached.log_beta()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_last_queries_are_those_of_the_whole(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, 37, 8, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = normal(2 * groups), normal(2), normal(2)
    log_beta = (-torch.rand(2, 2, 37, generator=generator, dtype=torch.float64)).requires_grad_()
    tensors = query, key, value, log_beta
    whole = gated_attention(*tensors, 0.35, implementation="naive")[:, :, 30:]
    last = gated_attention_after(query[:, :, 30:], key, value, log_beta, 0.35)
    torch.testing.assert_close(last, whole)
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), tensors)
    for ours, reference in zip(torch.autograd.grad((last * weight).sum(), tensors), expected, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("q_len", [1, 7, 37])
def test_biased_attention_is_the_formula_with_gradients(groups: int, q_len: int) -> None:
    generator = torch.Generator().manual_seed(q_len)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = normal(2 * groups, q_len, 8), normal(2, 37, 8), normal(2, 37, 6), normal(2, 37)
    query, key, value, bias = tensors
    wide_key, wide_value, wide_bias = (x.repeat_interleave(groups, 1) for x in (key, value, bias))
    logits = query @ wide_key.mT * 0.35 + wide_bias[:, :, None]
    future = torch.ones(q_len, 37, dtype=torch.bool).triu(37 - q_len + 1)
    expected = logits.masked_fill(future, -math.inf).softmax(-1) @ wide_value
    output = biased_attention(*tensors, 0.35)
    torch.testing.assert_close(output, expected)
    weight = torch.randn_like(expected)
    references = torch.autograd.grad((expected * weight).sum(), tensors)
    for ours, reference in zip(torch.autograd.grad((output * weight).sum(), tensors), references, strict=True):
        torch.testing.assert_close(ours, reference)


def test_gates_at_one_continue_the_plain_model(any_tiny_model: PreTrainedModel) -> None:
    gates = RetentionGates.for_model(any_tiny_model, gate_width=16, initial_bias=50.0)
    with torch.no_grad():
        expected = any_tiny_model(TOKENS).logits[:, PROMPT:]
    torch.testing.assert_close(after(any_tiny_model, gates)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after(any_tiny_model, gates, SoftEviction(1.0))[0], expected, rtol=1e-4, atol=1e-4)


def test_in_one_layer_decays_are_those_of_the_whole_sequence(tiny_model) -> None:
    """A single layer's keys and values do not depend on the gates, so reading the prompt without them is no change."""
    model = tiny_model("llama", num_hidden_layers=1)
    gates = decaying_gates(model)
    with torch.no_grad(), attach(model, gates) as attached:
        expected = model(TOKENS, use_cache=False).logits[:, PROMPT:]
        log_beta = attached.log_beta()
    logits, ours = after(model, gates)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, log_beta)


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_at_temperature_zero_it_is_the_runtime(any_tiny_model: PreTrainedModel, budget: float) -> None:
    gates = decaying_gates(any_tiny_model)
    with torch.no_grad(), evict(any_tiny_model, "retention", budget, gates=gates, sinks=4, recent=8) as session:
        cache = session.new_cache()
        any_tiny_model(TOKENS[:, :PROMPT], past_key_values=cache)
        expected = any_tiny_model(TOKENS[:, PROMPT:], past_key_values=cache).logits
        assert session.report().evictions == 1
    logits, _ = after(any_tiny_model, gates, SoftEviction(budget, 1e-5, sinks=4, recent=8))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    plain = any_tiny_model(TOKENS).logits[:, PROMPT:]
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_soft_eviction_by_hand() -> None:
    """One head, four tokens, none protected: scores (T+1-i)·log β are -5, -8, -1.5, -4; half stays, so θ = -√20."""
    log_beta = torch.tensor([-1.0, -2.0, -0.5, -2.0]).view(1, 1, 1, 4)
    weight = SoftEviction(0.5, sinks=0, recent=0).log_weight(log_beta).exp().flatten()
    expected = torch.tensor([1 / (1 + s**2 / 20) for s in (5, 8, 1.5, 4)])
    torch.testing.assert_close(weight, expected)


def test_soft_eviction_keeps_the_budget_and_the_protected() -> None:
    log_beta = -(torch.rand(3, 2, 4, 50, generator=torch.Generator().manual_seed(0)) ** 3)
    weight = SoftEviction(0.4, sinks=2, recent=5).log_weight(log_beta).exp()
    assert (weight[..., :2] == 1).all() and (weight[..., -5:] == 1).all()
    assert (weight > 0.5).sum(dim=(0, 2, 3)).tolist() == [20 * 12] * 2
    assert torch.equal(SoftEviction(1.0).log_weight(log_beta), torch.zeros_like(log_beta))
    tight = SoftEviction(0.1, sinks=2, recent=9).log_weight(log_beta).exp()  # 5 of 50: two first and three last
    assert (tight[..., :2] == 1).all() and (tight[..., -3:] == 1).all() and (tight[..., 2:-3] <= 0.5).all()
    scaled = SoftEviction(0.4, sinks=2, recent=5).log_weight(7 * log_beta).exp()
    torch.testing.assert_close(scaled, weight)  # the gates' scale does not count, ratios do


def test_the_gradient_keeps_the_budget_and_ignores_the_scale() -> None:
    """No direction of the gradient changes the sum of the weights, and scaling all scores changes nothing."""
    generator = torch.Generator().manual_seed(0)
    log_beta = (-torch.rand(2, 2, 3, 40, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = SoftEviction(0.4, sinks=2, recent=5).log_weight(log_beta)
    total = torch.autograd.grad(weight.exp().sum(), log_beta, retain_graph=True)[0]
    torch.testing.assert_close(total, torch.zeros_like(total))
    anything = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    gradient = torch.autograd.grad((weight * anything).sum(), log_beta)[0]
    assert gradient.abs().max() > 0.1
    along_scale = (gradient * log_beta).sum(dim=(0, 2, 3))
    torch.testing.assert_close(along_scale, torch.zeros_like(along_scale))


def test_soft_eviction_of_gates_that_saturate() -> None:
    """log β = 0 cannot be told apart from its equals, but must give no NaN."""
    log_beta = torch.zeros(1, 1, 2, 30, requires_grad=True)
    weight = SoftEviction(0.2, sinks=1, recent=1).log_weight(log_beta)
    weight.sum().backward()
    assert weight.isfinite().all() and log_beta.grad is not None and log_beta.grad.isfinite().all()


@pytest.mark.parametrize(("budget", "temperature"), [(0.0, 0.5), (1.1, 0.5), (0.5, 0.0)])
def test_wrong_budgets_are_named(budget: float, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"budget {budget} and temperature {temperature}"):
        SoftEviction(budget, temperature)
