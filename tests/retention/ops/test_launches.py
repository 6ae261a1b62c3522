"""Launches at real shapes are those that are compiled, wait for no data, and hold nothing quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tenure.retention.ops import gated_attention_triton, occupancy_triton
from tenure.scripts.bench.retention_kernel_cases import MODELS, compile_cases

from ...launches import assert_compiled_as_launched, heads_behind_tokens, meta, record

__all__ = ["record"]
TOKENS, AFTER, SAMPLES = 32768, 1024, 64


def launched(op: Any, *arguments: Any) -> Any:
    """The launcher of an op: called by its name on `meta`, the op would run its fake implementation."""
    return op._init_fn(*arguments)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("capability", [80, 90])
def test_training(model, capability, record) -> None:
    heads, kv_heads, dim = model.heads, model.kv_heads, model.head_dim
    with record(capability) as recorder:
        for length, after in ((TOKENS, AFTER), (TOKENS - 1, AFTER - 1)):
            integers = meta(1, length, dtype=torch.int32)
            bias = meta(1, kv_heads, length, dtype=torch.float32)
            for queries, decays in ((length, True), (after, True), (after, False)):
                shapes = (heads, queries), (kv_heads, length), (kv_heads, length)
                inputs = (*(heads_behind_tokens(1, *shape, dim) for shape in shapes), bias, integers, integers)
                output, lse = launched(gated_attention_triton.forward_op, *inputs, 0.088, decays)
                grad = torch.empty_like(output)
                grads = launched(gated_attention_triton.backward_op, grad, *inputs, output, lse, 0.088, decays, True)
                assert [one.shape for one in grads] == [one.shape for one in inputs[:4]]
            log_beta = meta(model.layers, 1, kv_heads, length, dtype=torch.float32)
            for index in (None, meta(1, SAMPLES, dtype=torch.int64)):
                held = launched(occupancy_triton.forward_op, log_beta, index, integers, integers)
                launched(occupancy_triton.backward_op, held, log_beta, index, integers)
    assert recorder.largest == heads * TOKENS * dim, "no queries by keys"
    assert_compiled_as_launched(recorder.launches, compile_cases(capability, (model,)))
