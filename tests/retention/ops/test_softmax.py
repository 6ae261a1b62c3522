"""Capped logits and learned sinks in every form of gated attention: outputs and gradients against the plain twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.retention import Segments, gated_attention
from tenure.retention.ops import naive
from tenure.retention.ops.after_prompt import biased_attention, gated_attention_after
from tenure.retention.ops.softmax import ORDINARY, Softmax

# Their first four arguments come as one tuple.
gated: Any = gated_attention
gated_twin: Any = naive.gated_attention

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.35
Inputs = tuple[torch.Tensor, ...]


def inputs(seq_len: int, dtype: torch.dtype = torch.float64) -> tuple[Inputs, torch.Tensor]:
    """query, key, value, log_beta; and sinks."""
    generator = torch.Generator().manual_seed(seq_len)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    log_beta = (-torch.rand(2, KV_HEADS, seq_len, generator=generator, dtype=torch.float64)).requires_grad_()
    tensors = normal(2, HEADS, seq_len, DIM), normal(2, KV_HEADS, seq_len, DIM), normal(2, KV_HEADS, seq_len, DIM)
    return (*tensors, log_beta if dtype == torch.float64 else log_beta.detach().float().requires_grad_()), normal(HEADS)


def segments(seq_len: int, layout: str) -> Segments:
    if layout == "whole":
        return Segments.whole(2, seq_len)
    if layout == "padded":
        mask = torch.ones(2, seq_len)
        mask[1, : seq_len // 3] = 0
        return Segments.from_inputs(2, seq_len, mask)
    cut = seq_len // 3
    positions = torch.cat([torch.arange(cut), torch.arange(seq_len - cut)])[None].expand(2, -1)
    return Segments.from_inputs(2, seq_len, position_ids=positions)


def test_the_twin_is_a_further_entry_of_value_zero() -> None:
    """Against ordinary attention over one more key, whose logit is the sink whatever the query."""
    (query, key, value, _), sinks = inputs(9)
    ours = naive.biased_attention(query, key, value, torch.zeros(2, KV_HEADS, 9), SCALE, Softmax(sinks=sinks))
    for head in range(HEADS):
        for t in range(9):
            logits = (key[:, head // 2, : t + 1] @ query[:, head, t, :, None]).squeeze(-1) * SCALE
            weights = torch.cat([logits, sinks[head].expand(2, 1)], dim=-1).softmax(-1)[:, :-1]
            torch.testing.assert_close(ours[:, head, t], (weights.unsqueeze(-1) * value[:, head // 2, : t + 1]).sum(1))


def test_a_cap_is_a_tanh() -> None:
    logits = torch.tensor([-100.0, 0.0, 1.0, 100.0])
    assert Softmax(softcap=2.0).capped(logits).abs().max() <= 2.0
    torch.testing.assert_close(Softmax(softcap=1e4).capped(logits), logits, rtol=1e-4, atol=1e-4)
    assert ORDINARY.ordinary and not Softmax(softcap=1.0).ordinary and ORDINARY.capped(logits) is logits


@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
@pytest.mark.parametrize("seq_len", [4, 37])
def test_sinks_in_channels(seq_len: int, layout: str) -> None:
    tensors, sinks = inputs(seq_len)
    rows, results = segments(seq_len, layout), []
    for implementation in ("naive", "channels"):
        output = gated(*tensors, SCALE, rows, implementation, Softmax(sinks=sinks))
        results.append((output, *torch.autograd.grad(output.square().sum(), (*tensors, sinks))))
    for ours, twin in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("q_len", [1, 11])
@pytest.mark.parametrize("function", [gated_attention_after, biased_attention])
def test_sinks_after_a_prompt(function, q_len: int) -> None:
    (query, key, value, bias), sinks = inputs(29)
    twin, results = getattr(naive, function.__name__), []
    for call in (twin, function):
        output = call(query[:, :, -q_len:], key, value, bias, SCALE, softmax=Softmax(sinks=sinks))
        results.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value, bias, sinks))))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


KINDS = {"sinks": (None, True), "cap": (0.7, False), "sinks and cap": (0.7, True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
@pytest.mark.parametrize("seq_len", [5, 67])
def test_triton(seq_len: int, layout: str, kind: str, nan_outputs) -> None:
    tensors, sinks = inputs(seq_len, torch.float32)
    cap, with_sinks = KINDS[kind]
    rows, results = segments(seq_len, layout), []
    real = (rows.document >= 0)[:, None, :, None]
    wanted = (*tensors, sinks) if with_sinks else tensors
    for implementation in ("naive", "triton"):
        softmax = Softmax(cap, sinks if with_sinks else None)
        output = gated(*tensors, SCALE, rows, implementation, softmax)
        results.append((output, *torch.autograd.grad((output * real).square().sum(), wanted)))
    for ours, twin in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [gated_attention_after, biased_attention])
def test_triton_after_a_prompt(function, kind: str, nan_outputs) -> None:
    (query, key, value, bias), sinks = inputs(45, torch.float32)
    cap, with_sinks = KINDS[kind]
    wanted = (query, key, value, bias, sinks) if with_sinks else (query, key, value, bias)
    results = []
    for kernels in ("reference", "triton"):
        softmax = Softmax(cap, sinks if with_sinks else None)
        output = function(query[:, :, -13:], key, value, bias, SCALE, kernels, softmax)
        results.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_large_logits_in_triton_stay_finite() -> None:
    """The cap's exponential overflows and vanishes where tanh is 1 and -1."""
    (query, key, value, log_beta), _ = inputs(20, torch.float32)
    given = (query.detach() * 1e3).requires_grad_(), key, value, log_beta
    output = gated(*given, SCALE, None, "triton", Softmax(softcap=2.0))
    twin = gated(*given, SCALE, None, "naive", Softmax(softcap=2.0))
    torch.testing.assert_close(output, twin, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), given))


def test_caps_run_where_they_can() -> None:
    tensors, sinks = inputs(19)
    capped = Softmax(softcap=0.5)
    with torch.no_grad():
        twin = gated_twin(*tensors, SCALE, Segments.whole(2, 19), capped)
        assert not torch.allclose(twin, gated(*tensors, SCALE), atol=1e-3)
        assert torch.equal(gated(*tensors, SCALE, softmax=capped), twin)
        flex = gated(*(x.detach() for x in tensors), SCALE, None, "flex", capped)
        torch.testing.assert_close(flex, twin, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="a cap on logits for implementation 'channels'; accepted with a cap: flex"):
        gated(*tensors, SCALE, None, "channels", capped)
    with pytest.raises(ValueError, match="got sinks for implementation 'flex'; accepted with sinks: channels"):
        gated(*tensors, SCALE, None, "flex", Softmax(sinks=sinks))
