"""Gated attention and occupancy: every fast form against its plain twin, outputs and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tenure.retention import Segments, gated_attention, occupancy
from tenure.retention.ops import naive, occupancy_at

BATCH, KV_HEADS, HEAD_DIM = 2, 2, 8


def layouts(seq_len: int) -> dict[str, Segments]:
    left = torch.ones(BATCH, seq_len)
    left[1, : seq_len // 3] = 0
    right = left.flip(-1)
    parts = [seq_len // 5, 1, seq_len - seq_len // 5 - 1]
    packed = torch.cat([torch.arange(n) for n in parts if n])[None].expand(BATCH, -1)
    return {
        "whole": Segments.whole(BATCH, seq_len),
        "left padding": Segments.from_inputs(BATCH, seq_len, left),
        "right padding": Segments.from_inputs(BATCH, seq_len, right),
        "packed": Segments.from_inputs(BATCH, seq_len, position_ids=packed),
    }


LAYOUTS = tuple(layouts(10))


def cases(*lengths: int) -> list[tuple[int, str]]:
    """Lengths with layouts; a padded or packed row needs three tokens."""
    return [(n, layout) for n in lengths for layout in LAYOUTS if n >= 3 or layout == "whole"]


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(seq_len: int, groups: int = 2, dtype: torch.dtype = torch.float64, decay: float = 1.0) -> Inputs:
    """query, key, value, log_beta."""
    generator = torch.Generator().manual_seed(seq_len)

    def normal(heads: int) -> torch.Tensor:
        return torch.randn(BATCH, heads, seq_len, HEAD_DIM, generator=generator, dtype=dtype)

    log_beta = -decay * torch.rand(BATCH, KV_HEADS, seq_len, generator=generator, dtype=dtype)
    query, key, value = normal(groups * KV_HEADS), normal(KV_HEADS), normal(KV_HEADS)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), log_beta.requires_grad_()


def detached(tensors: Inputs) -> Inputs:
    query, key, value, log_beta = (x.detach().clone() for x in tensors)
    return query, key, value, log_beta


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("seq_len", "layout"), cases(1, 5, 37))
def test_channels_equal_naive_with_gradients(seq_len: int, groups: int, layout: str) -> None:
    segments = layouts(seq_len)[layout]
    tensors = inputs(seq_len, groups)
    real = (segments.document >= 0)[:, None, :, None]
    weight = torch.randn(BATCH, groups * KV_HEADS, seq_len, HEAD_DIM, dtype=torch.float64) * real
    outputs, gradients = [], []
    for implementation in ("naive", "channels"):
        output = gated_attention(*tensors, 0.35, segments, implementation)
        outputs.append(output)
        gradients.append(torch.autograd.grad((output * weight).sum(), tensors))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_equals_naive(layout: str) -> None:
    """Outputs only: FlexAttention has no backward on CPU."""
    segments = layouts(37)[layout]
    with torch.no_grad():
        tensors = detached(inputs(37))
        expected = gated_attention(*tensors, 0.35, segments, "naive")
        torch.testing.assert_close(gated_attention(*tensors, 0.35, segments, "flex"), expected)


def test_the_formula_by_hand() -> None:
    """Two tokens, one head: the second token's logit for the first is q·k·scale + 1·log β_0, for itself q·k·scale."""
    query, key = torch.tensor([[[[0.0, 1.0], [1.0, 2.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    value, log_beta = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]), torch.tensor([[[-0.5, -9.0]]])
    output = gated_attention(query, key, value, log_beta, 0.5)
    first = torch.softmax(torch.tensor([0.5 * 1.0 - 0.5, 0.5 * 2.0]), 0)
    torch.testing.assert_close(output, torch.stack([torch.tensor([1.0, 0.0]), first])[None, None])


def test_log_beta_zero_is_ordinary_attention() -> None:
    query, key, value, log_beta = inputs(33)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.35, enable_gqa=True)
    torch.testing.assert_close(gated_attention(query, key, value, log_beta * 0, 0.35), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_in_low_precision_stay_near_the_truth(dtype: torch.dtype) -> None:
    """At T=2048 with strong decay the two products are ~1000 and cancel; fp32 inside keeps the error at rounding."""
    query, key, value, log_beta = tensors = detached(inputs(2048, decay=1.0))
    truth = gated_attention(*tensors, 0.35, implementation="naive")
    low = query.to(dtype), key.to(dtype), value.to(dtype), log_beta.float()
    output = gated_attention(*low, 0.35, implementation="channels")
    assert output.dtype == dtype
    exact = low[0].double(), low[1].double(), low[2].double(), low[3].double()
    rounded = gated_attention(*exact, 0.35, implementation="naive")
    limit = 2e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), rounded, rtol=0, atol=limit)
    torch.testing.assert_close(output.double(), truth, rtol=0, atol=10 * limit)


def test_documents_do_not_see_each_other() -> None:
    segments = layouts(37)["packed"]
    tensors = inputs(37)
    before = gated_attention(*tensors, 0.35, segments)
    changed = detached(tensors)
    for tensor in changed:
        tensor[:, :, :8] += 1.0  # the first two documents
    after = gated_attention(*changed, 0.35, segments)
    assert torch.equal(before[:, :, 8:], after[:, :, 8:])
    assert not torch.allclose(before[:, :, :8], after[:, :, :8])


def test_wrong_arguments_are_named() -> None:
    query, key, value, log_beta = inputs(6)
    with pytest.raises(ValueError, match="implementation is 'fast'; accepted: auto, channels, flex, naive"):
        gated_attention(query, key, value, log_beta, 1.0, implementation="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must agree in"):
        gated_attention(query, key, value, log_beta[..., 1:], 1.0)
    with pytest.raises(ValueError, match="whole sequences"):
        gated_attention(query[:, :, 1:], key, value, log_beta, 1.0)


@pytest.mark.parametrize(("seq_len", "layout"), cases(1, 37, 700))
def test_occupancy_equals_naive_with_gradients(seq_len: int, layout: str) -> None:
    segments = layouts(seq_len)[layout]
    generator = torch.Generator().manual_seed(0)
    log_beta = -(torch.rand(3, BATCH, KV_HEADS, seq_len, generator=generator, dtype=torch.float64) ** 4)
    log_beta.requires_grad_()
    weight = torch.randn(log_beta.shape, generator=generator, dtype=torch.float64)
    exact, reference = occupancy(log_beta, segments), naive.occupancy(log_beta, segments)
    torch.testing.assert_close(exact, reference, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), log_beta)[0] for x in (exact, reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-6)


def test_occupancy_at_chosen_positions_is_a_part_of_the_whole() -> None:
    segments = layouts(60)["left padding"]
    log_beta = -torch.rand(2, BATCH, KV_HEADS, 60, dtype=torch.float64)
    index = torch.tensor([[0, 7, 59], [19, 20, 41]])
    whole = occupancy(log_beta, segments)
    chosen = whole.gather(-1, index[None, :, None].expand(2, BATCH, KV_HEADS, 3))
    torch.testing.assert_close(occupancy_at(log_beta, index, segments), chosen)


def test_occupancy_skips_tiles_below_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """With β = e^-1 only tiles near the diagonal count; far ones are not even computed."""
    import sys

    module = sys.modules["tenure.retention.ops.occupancy"]
    computed = []
    terms = module._terms
    monkeypatch.setattr(module, "_terms", lambda *a: computed.append(1) or terms(*a))
    log_beta = -torch.ones(1, 1, 1, 4096)
    held = occupancy(log_beta, Segments.whole(1, 4096))
    assert held.max() < 1.6
    assert len(computed) < 2 * 4096 / 128  # of 144 tiles on and below the diagonal


def test_holes_in_a_mask_are_refused() -> None:
    mask = torch.tensor([[1, 0, 1, 1]])
    with pytest.raises(ValueError, match="hole between real tokens"):
        Segments.from_inputs(1, 4, mask)
    with pytest.raises(ValueError, match="2-D mask of shape"):
        Segments.from_inputs(1, 4, torch.ones(1, 1, 4, 4))
