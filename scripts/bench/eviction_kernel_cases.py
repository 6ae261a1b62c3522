"""Every kernel of this package at the shapes of two models, as its launcher launches it, for the compiler's report.

A layer of a row of `TOKENS` tokens, of which `KEPT` are kept. Tests compare the cases with the actual launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...eviction.ops import copy_entries, page_table, paged_attention, radix_select, value_norms, window_risk
from .compiling import Constant, KernelCase, specialised

# Query heads, key/value heads and head dimension are the same in both; the width of the hidden states differs.
MODELS = {"Qwen3-4B": 2560, "Llama-3.1-8B": 4096}
LAYERS = {"Qwen3-4B": 36, "Llama-3.1-8B": 32}
HEADS, KV_HEADS, DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
WINDOW = 32
TOKENS, KEPT = 32768, 6553
ROWS = 32  # of a decoding batch
PAGE = 16  # of the runtime
MULTIPROCESSORS = {80: 108, 90: 132}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
SOFTCAP = 50.0  # Gemma-2's
TF32 = Constant("tf32")
HEAD_STRIDES = {"row": HEADS * DIM, "head": DIM, "token": HEADS * DIM}  # of one token: only divisibility by 16 matters


def compile_cases(capability: int) -> list[KernelCase]:
    """All kernels, once for each distinct launch at these models' shapes."""
    return [case for model in MODELS for case in model_cases(model, capability)]


def model_cases(model: str, capability: int, dtype: torch.dtype = torch.bfloat16) -> list[KernelCase]:
    """The cases of one model on a GPU of this capability."""
    cases = [*_decode_cases(model, MULTIPROCESSORS[capability], dtype), *_page_cases(model, dtype)]
    return [*cases, *_copy_cases(model, dtype), *_select_cases(model), *_defensive_cases(model, dtype)]


def _precision(dtype: torch.dtype) -> Constant:
    return Constant("ieee") if dtype == torch.float32 else TF32


def _case(
    name: str, model: str, kernel: Any, arguments: Mapping[str, Any], sizes: Mapping[str, int], **options: int
) -> KernelCase:
    """A case from the arguments and integers (`sizes`) that the kernel takes, out of these."""
    integers, divisible = specialised({size: sizes[size] for size in kernel.arg_names if size in sizes})
    taken = {argument: arguments[argument] for argument in kernel.arg_names if argument in arguments}
    return KernelCase(name, kernel, {**taken, **integers}, divisible=divisible, shape=model, **options)


def _strides(name: str, *axes: str) -> dict[str, int]:
    return {f"{name}_{axis}": HEAD_STRIDES.get(axis, DIM) for axis in axes}


def _decode_cases(model: str, multiprocessors: int, dtype: torch.dtype) -> list[KernelCase]:
    cases, stored = [], POINTERS[dtype]
    for q_len, page, rows, hidden, ordinary in (
        (1, 16, 1, None, True), (1, 32, 1, None, True), (1, 64, 1, None, True), (1, 128, 1, None, True),
        (16, 16, 1, None, True), (16, 16, 1, "*i32", True), (1, 16, ROWS, None, True), (1, 16, 1, None, False),
    ):  # fmt: skip
        tile: dict[str, Any] = paged_attention.tile_sizes(GROUP, q_len, DIM, DIM, dtype.itemsize)
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
        segments = rows * KV_HEADS
        given = {
            "query": stored, "key_pages": stored, "value_pages": stored, "table": "*i32",
            "lengths": "*i32", "hidden": hidden, "sinks": None if ordinary else stored, "partial": "*fp32",
            "log_sum": "*fp32", "out": stored, "log_total": "*fp32", "scale": "fp32", "GROUP": GROUP,
            "KEY_DIM": DIM, "VALUE_DIM": DIM, "KEY_BLOCK": DIM, "VALUE_BLOCK": DIM,
            "PAGE": page, "PROGRAMS": paged_attention.WAVES * multiprocessors, "SEGMENTS": max(16, segments),
            "MERGED": paged_attention.MERGED, "PRECISION": _precision(dtype),
            "SOFTCAP": 0.0 if ordinary else SOFTCAP * paged_attention.LOG2E, **tile,
        }  # fmt: skip
        tiles = -(-GROUP * q_len // tile["ROWS"])
        sizes = {"segments": segments, "heads": KV_HEADS, "q_len": q_len, "width": TOKENS // page, "tiles": tiles}
        sizes |= _strides("query", "row", "head", "token")
        name = f"q={q_len}, pages of {page}{f', {rows} rows' if rows > 1 else ''}{', padding' if hidden else ''}"
        name += "" if ordinary else ", sinks and cap"
        cases.append(_case(f"ragged decode, {name}", model, paged_attention.attend_piece, given, sizes, **options))
        if page == 16 and hidden is None:
            cases.append(_case(f"ragged decode merge, {name}", model, paged_attention.merge_pieces, given, sizes))
    return cases


def _page_cases(model: str, dtype: torch.dtype) -> list[KernelCase]:
    stored = POINTERS[dtype]
    given = {
        "key": stored, "value": stored, "position": "*i32", "rank": "*i32", "added": "*i32", "plan": "*i32",
        "key_pages": stored, "value_pages": stored, "position_pages": "*i32", "table": "*i32",
        "lengths": "*i32", "free": "*i32", "counters": "*i32", "numbers": "*fp32", "keep": "*i8", "shorter": "*i32",
        "KEY_DIM": DIM, "VALUE_DIM": DIM, "KEY_BLOCK": DIM, "VALUE_BLOCK": DIM, "PAGE": PAGE,
    }  # fmt: skip
    sizes = {"segments": KV_HEADS, "heads": KV_HEADS, "width": TOKENS // PAGE, "n": TOKENS}
    sizes |= _strides("key", "row", "head", "token") | _strides("value", "row", "head", "token")
    lanes = {"BLOCK": 16}
    whole = {"pages": stored, "DIM": DIM, "WIDTH": page_table.WIDTH, "BLOCK": page_table.ENTRIES}
    single = {"DIM": 1, "WIDTH": 1, "BLOCK": page_table.ENTRIES}
    one = {"n": 1}
    kernels: list[tuple[str, Any, dict[str, Any], dict[str, int]]] = [
        ("append, plan", page_table.plan_append, lanes, {}),
        ("append one token", page_table.write_new, {"BLOCK": 1}, one),
        ("append a prompt", page_table.write_new, {"BLOCK": page_table.COLUMNS}, {}),
        ("append one state", page_table.write_numbers, {"pages": "*fp32", "BLOCK": 1}, one),
        ("append a prompt's states", page_table.write_numbers, {"pages": "*fp32", "BLOCK": 64}, {}),
        ("compaction, keys or values", page_table.move_kept, whole, {}),
        ("compaction, positions", page_table.move_kept, {"pages": "*i32", **single}, {}),
        ("compaction, states", page_table.move_kept, {"pages": "*fp32", **single}, {}),
        ("release, plan", page_table.plan_release, lanes, {}),
        ("release", page_table.push_free, {"BLOCK": page_table.OWNED}, {}),
    ]
    warps = {page_table.move_kept: page_table.MOVING_WARPS}
    return [
        _case(name, model, kernel, given | more, sizes | others, num_warps=warps.get(kernel, 4))
        for name, kernel, more, others in kernels
    ]


def _copy_cases(model: str, dtype: torch.dtype) -> list[KernelCase]:
    """Keys, values, positions and log β of a layer: out of pages, into pages, and from pages to pages."""
    words = DIM * dtype.itemsize // 4
    widths = (words, words, 1, 1)
    given = {"sources": ("*i32",) * 4, "targets": ("*i32",) * 4, "WIDTHS": widths, **copy_entries.tile_sizes(widths)}
    slots = {"gather": ("*i64", None), "scatter": (None, "*i64"), "new layout": ("*i64", "*i64")}
    sizes = {"count": KV_HEADS * KEPT}
    return [
        _case(f"tier copies, {name}", model, copy_entries.move_words,
              given | {"source_slots": source, "target_slots": target}, sizes)
        for name, (source, target) in slots.items()
    ]  # fmt: skip


def _select_cases(model: str) -> list[KernelCase]:
    given = {
        "scores": "*fp32", "positions": "*i32", "bounds": "*i32", "state": "*i32", "histogram": "*i32", "keep": "*i8",
        "counts": "*i32", "BLOCK": radix_select.BLOCK,
    }  # fmt: skip
    sizes = {"stride": LAYERS[model] * KV_HEADS * TOKENS}
    cases = []
    for word, name in enumerate(("scores", "positions", "segments")):
        for shift in (8, 16):  # and 24 is as 8 is, 0 as 16
            if word == 2 and shift == 16:
                shift = 0  # segments have two digits
            exact = given | {"WORD": word}
            digit, all_sizes = f"{name}, bits {shift} on", sizes | {"shift": shift}
            cases.append(_case(f"selection, digits of {digit}", model, radix_select.count_digits, exact, all_sizes,
                               num_warps=8))  # fmt: skip
            cases.append(_case(f"selection, pick in {digit}", model, radix_select.pick_digit, exact, all_sizes))
    return [*cases, _case("selection, mark", model, radix_select.mark, given, sizes, num_warps=8)]


def _defensive_cases(model: str, dtype: torch.dtype) -> list[KernelCase]:
    tile, stored, precision = window_risk.tile_sizes(DIM, dtype.itemsize), POINTERS[dtype], _precision(dtype)
    splits = window_risk.SPLITS
    given = {
        "queries": stored, "keys": stored, "positions": "*i32", "query_positions": "*i32", "counted": "*i32",
        "present": "*i32", "sums": "*fp32", "scales": "*fp32", "worst": "*fp32", "mean": None, "scale": "fp32",
        "GROUP": GROUP, "DIM": DIM, "DIM_BLOCK": DIM, "ROWS": tile.rows, "BLOCK": window_risk.BLOCK,
        "PRECISION": precision, "BAND": TF32,
    }  # fmt: skip
    padded = -(-GROUP * WINDOW // tile.rows) * tile.rows
    sizes = {"heads": KV_HEADS, "window": WINDOW, "n": TOKENS, "reach": 2, "padded": padded, "splits": splits}
    sizes |= _strides("query", "row", "head", "token") | _strides("key", "row", "head", "token")
    pooled = {"ROWS": tile.pooled_rows}
    weights = value_norms.tile_sizes(DIM, dtype.itemsize)
    norms = {
        "values": stored, "weight": stored, "norms": "*fp32", "GROUP": GROUP, "DIM": DIM, "DIM_BLOCK": DIM,
        "BLOCK": weights.pop("BLOCK"), "COLUMNS": weights.pop("COLUMNS"), "PRECISION": precision,
    }  # fmt: skip
    of_values = {"heads": KV_HEADS, "n": TOKENS, "hidden": MODELS[model]} | _strides("value", "row", "head", "token")
    of_values |= _strides("weight", "head", "dim")
    kernels: list[tuple[str, Any, dict[str, Any], dict[str, int], dict[str, int]]] = [
        ("defensive, first pass", window_risk.sum_rows, given, sizes, tile.options),
        ("defensive, merge", window_risk.finish_rows, given, sizes, {}),
        ("defensive, worst case", window_risk.take_worst, given | pooled, sizes, tile.options),
        ("defensive, worst case and mean", window_risk.take_worst, given | pooled | {"mean": "*fp32"}, sizes,
         tile.options),
        ("value norms", value_norms.project_norms, norms, of_values, weights),
    ]  # fmt: skip
    return [_case(name, model, kernel, taken, integers, **more) for name, kernel, taken, integers, more in kernels]
