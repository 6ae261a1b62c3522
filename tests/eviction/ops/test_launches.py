"""Launches at real shapes are those that are compiled, ask the device for nothing, and hold no intermediate in full."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction.ops import copy_entries, page_table, paged_attention, radix_select, value_norms, window_risk
from tenure.scripts.bench.eviction_kernel_cases import (
    DIM,
    HEADS,
    KEPT,
    KV_HEADS,
    LAYERS,
    MODELS,
    MULTIPROCESSORS,
    ROWS,
    SOFTCAP,
    TOKENS,
    WINDOW,
    model_cases,
)

from ...launches import Recorder, assert_compiled_as_launched, heads_behind_tokens, meta, record

__all__ = ["record"]
INT = torch.int32


def launch_decode(
    q_len: int, size: int, padded: bool = False, segments: int = KV_HEADS, softcap: float = 0.0
) -> None:
    rows, width = segments // KV_HEADS, TOKENS // size
    key_pages, value_pages = meta(segments * width, size, DIM), meta(segments * width, size, DIM)
    hidden = meta(rows, q_len, dtype=INT) if padded else None
    query, table = heads_behind_tokens(rows, HEADS, q_len, DIM), meta(segments, width, dtype=INT)
    sinks, lengths = meta(HEADS) if softcap else None, meta(segments, dtype=INT)
    paged_attention._launch(query, key_pages, value_pages, table, lengths, hidden, 0.088, sinks, softcap)


def launch_pages(n: int) -> None:
    count, width = KV_HEADS * TOKENS // 16, TOKENS // 16
    key_pages, value_pages = (meta(count, 16, DIM) for _ in range(2))
    positions, table = meta(count, 16, dtype=INT), meta(KV_HEADS, width, dtype=INT)
    lengths, free, counters = meta(KV_HEADS, dtype=INT), meta(count, dtype=INT), meta(2, dtype=INT)
    key, value = (heads_behind_tokens(1, KV_HEADS, n, DIM) for _ in range(2))
    new, added = meta(1, n, dtype=INT), meta(KV_HEADS, dtype=INT)
    held = key_pages, value_pages, positions, table, lengths, free, counters
    plan = page_table.append_entries._init_fn(key, value, new, new, added, *held)
    state, states = meta(1, KV_HEADS, n, dtype=torch.float32), meta(count, 16, dtype=torch.float32)
    page_table.write_state._init_fn(state, new, plan, table, states)
    if n > 1:
        keep = meta(KV_HEADS, n, dtype=torch.bool)
        for buffer in (key_pages, value_pages, positions, states):
            page_table.move_entries._init_fn(keep, lengths, table, buffer)
        page_table.release_pages._init_fn(lengths, added, table, free, counters, 16)


def launch_copies() -> None:
    kinds = {"key": torch.bfloat16, "value": torch.bfloat16, "position": INT, "log_beta": torch.float32}
    slots = KV_HEADS * TOKENS
    layer = [meta(slots, *([DIM] if name in ("key", "value") else []), dtype=dtype) for name, dtype in kinds.items()]
    chosen = meta(KV_HEADS * KEPT, dtype=torch.int64)
    for source, target in ((chosen, None), (None, chosen), (chosen, chosen)):
        copy_entries._launch(layer, layer, source, target, len(chosen))


def launch_selection(model: str) -> None:
    n = LAYERS[model] * KV_HEADS * TOKENS
    bounds = meta(LAYERS[model] * KV_HEADS + 1, dtype=INT)
    radix_select._launch(meta(1, n, dtype=torch.float32), meta(1, n, dtype=INT), meta(1, dtype=INT), bounds)


def launch_scoring(model: str, window: int = WINDOW) -> None:
    query, key = heads_behind_tokens(1, HEADS, window, DIM), heads_behind_tokens(1, KV_HEADS, TOKENS, DIM)
    positions, asked, limit = meta(1, KV_HEADS, TOKENS, dtype=INT), meta(1, window, dtype=INT), meta(1, dtype=INT)
    for mean in (False, True):
        window_risk._launch(query, key, positions, asked, limit, 0.088, 5, mean)
    projection = meta(MODELS[model], HEADS * DIM)
    value_norms._launch(key, projection.T.unflatten(0, (HEADS, DIM)))  # as `LayerView.output_weight` gives it


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_runtime(model, capability, record, monkeypatch) -> None:
    monkeypatch.setattr(page_table, "chosen_kernels", lambda device: "triton")
    monkeypatch.setattr(paged_attention, "PROGRAMS", paged_attention.WAVES * MULTIPROCESSORS[capability])
    with record(capability) as recorder:
        for size in page_table.PAGE_SIZES:
            launch_decode(1, size)
        for padded in (False, True):
            launch_decode(16, 16, padded)
        launch_decode(1, 16, segments=ROWS * KV_HEADS)
        launch_decode(1, 16, softcap=SOFTCAP)
        launch_pages(1)
        launch_pages(TOKENS)
        launch_copies()
        launch_selection(model)
        launch_scoring(model)
    assert_compiled_as_launched(recorder.launches, model_cases(model, capability))


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_made_that_grows_with_window_and_entries(model, record) -> None:
    """Neither the attention of a window, wide here, nor `v W_O` of one query head: no more than the inputs hold."""
    recorder: Recorder
    with record(90) as recorder:
        launch_scoring(model, window=2 * DIM)
    inputs = max(KV_HEADS * TOKENS * DIM, HEADS * DIM * MODELS[model])
    assert recorder.largest == inputs < min(HEADS * 2 * DIM * TOKENS, TOKENS * MODELS[model])
