"""Arguments that change an attention, and masks that are not causal, are refused; all others pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tenure.eviction import evict
from tenure.retention import RetentionGates, UnsupportedModelError, attach
from tenure.retention.attention_arguments import (
    is_causal,
    padding_mask,
    refuse_dropout,
    refuse_unknown,
    softmax_of,
)
from tenure.scripts.bench.tiny_vision_models import VISION_MODELS

TOKENS = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "given", [{"sliding_window": 8}, {"position_bias": torch.zeros(1)}, {"sinks": torch.zeros(4)},
              {"output_attentions": True}, {"is_causal": False}, {"invented": 1}]
)  # fmt: skip
def test_arguments_that_change_the_attention_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match=f"Linear passes {next(iter(given))} to its attention .*accepted: cache_posit"):
        refuse_unknown(nn.Linear(1, 1), given | {"scaling": 1.0})


def test_arguments_that_change_nothing_pass() -> None:
    refuse_unknown(nn.Linear(1, 1), {"softcap": None, "output_attentions": False, "is_causal": True, "scaling": 0.1,
                                     "position_ids": TOKENS, "use_cache": True, "invented": None})  # fmt: skip
    refuse_dropout({"dropout": 0.0})
    with pytest.raises(ValueError, match=r"got attention dropout 0.1; accepted: 0"):
        refuse_dropout({"dropout": 0.1})


def test_variants_of_the_softmax() -> None:
    sinks = torch.zeros(4)
    given = softmax_of({"softcap": 30.0, "s_aux": sinks, "scaling": 1.0})
    assert given.softcap == 30.0 and given.sinks is sinks
    assert softmax_of({"softcap": None, "scaling": 1.0}).ordinary


def test_a_softmax_that_the_configuration_does_not_announce_is_refused(tiny_llama) -> None:
    with evict(tiny_llama, "knorm"), pytest.raises(UnsupportedModelError, match="which its configuration does not ann"):
        tiny_llama(TOKENS, softcap=30.0)


def test_unknown_arguments_are_refused_before_any_layer_is_done(tiny_llama) -> None:
    gates = RetentionGates.for_model(tiny_llama, gate_width=8)
    with attach(tiny_llama, gates), pytest.raises(ValueError, match="LlamaAttention passes invented"):
        tiny_llama(TOKENS, use_cache=False, invented=3)
    with evict(tiny_llama, "knorm") as session:
        cache = session.new_cache()
        with pytest.raises(ValueError, match="LlamaAttention passes invented"):
            tiny_llama(TOKENS, past_key_values=cache, invented=3)
        assert cache.columns_seen == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks(dtype: torch.dtype) -> None:
    def mask(visible: torch.Tensor) -> torch.Tensor:
        if dtype == torch.bool:
            return visible
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

    causal = torch.ones(2, 1, 4, 9, dtype=torch.bool).tril(5)
    assert is_causal(mask(causal), 4)
    padded = causal.clone()
    padded[1, :, :, :3] = False
    assert is_causal(mask(padded), 4)
    both_ways = causal.clone()
    both_ways[0, 0, 1, 8] = True
    assert not is_causal(mask(both_ways), 4)
    assert is_causal(None, 4) and is_causal(torch.ones(2, 9), 4) and is_causal(mask(both_ways)[:, :, :1], 1)
    assert padding_mask({"full_attention": both_ways}, TOKENS) is TOKENS
    assert padding_mask(TOKENS, None) is TOKENS


def test_images_that_attend_both_ways_are_refused_under_gates() -> None:
    model, inputs = VISION_MODELS["gemma3"]()
    gates = RetentionGates.for_model(model, gate_width=8)
    words = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    words["attention_mask"][1, :5] = 0
    with torch.no_grad(), attach(model, gates) as attached:
        model(**words, use_cache=False)
        assert attached.segments is not None and attached.segments.spans == ((0, 0, 23), (1, 5, 23))
        with pytest.raises(ValueError, match="Gemma3Attention was given a mask by which tokens see later ones"):
            model(**inputs, use_cache=False)
