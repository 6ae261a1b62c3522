"""Every kernel of this package as its launcher launches it at the shapes of two models, for the compiler's report."""

from __future__ import annotations

from typing import Any

from ...retention.ops.compiling import Constant, KernelCase
from . import copies, decode, decode_kernels, defensive, defensive_kernels, pages, pages_kernels, select, value_norms

# Query heads, key/value heads and numbers of a head are the same in both; the width of the hidden states differs.
MODELS = {"Qwen3-4B": 2560, "Llama-3.1-8B": 4096}
LAYERS = {"Qwen3-4B": 36, "Llama-3.1-8B": 32}
HEADS, KV_HEADS, DIM = 32, 8, 128
GROUP = HEADS // KV_HEADS
WINDOW = 32
MULTIPROCESSORS = {80: 108, 90: 132}
MODEL_DTYPE = "*bf16"


def compile_cases() -> list[KernelCase]:
    """All kernels, once for each way in which a launch at these models' shapes differs from another."""
    cases: list[KernelCase] = []
    for model in MODELS:
        cases += _decode_cases(model)
        cases += _page_cases(model)
        cases += _copy_cases(model)
        cases += _select_cases(model)
        cases += _defensive_cases(model)
    return cases


def _strides(name: str, *axes: str) -> dict[str, str]:
    return {f"{name}_{axis}": "i32" for axis in axes}


def _decode_cases(model: str) -> list[KernelCase]:
    cases = []
    for q_len, page in ((1, 16), (1, 128), (16, 16)):
        sizes: dict[str, Any] = decode.tile_sizes(GROUP, q_len, DIM, DIM, 2)
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        shared = {
            "GROUP": GROUP, "VALUE_DIM": DIM, "VALUE_BLOCK": DIM, "PROGRAMS": decode.WAVES * MULTIPROCESSORS[90],
            "SEGMENTS": 16, "segments": "i32", "heads": "i32", "q_len": "i32", **sizes,
        }  # fmt: skip
        attend = {
            "query": MODEL_DTYPE, "key_pages": MODEL_DTYPE, "value_pages": MODEL_DTYPE, "table": "*i32",
            "lengths": "*i32", "hidden": None, "partial": "*fp32", "log_sum": "*fp32", "scale": "fp32", "width": "i32",
            **_strides("query", "row", "head", "token"), "KEY_DIM": DIM, "KEY_BLOCK": DIM, "PAGE": page,
            "PRECISION": Constant("tf32"), **shared,
        }  # fmt: skip
        divisible = ("width", "query_row", "query_head", "query_token")
        name = f"ragged decode, q={q_len}, pages of {page}"
        cases.append(KernelCase(name, decode_kernels.attend_piece, attend, divisible=divisible, shape=model, **options))
        if page == 16:
            merge = {"partial": "*fp32", "log_sum": "*fp32", "lengths": "*i32", "out": MODEL_DTYPE, "tiles": "i32",
                     "MERGED": decode.MERGED, **shared}  # fmt: skip
            cases.append(KernelCase(f"ragged decode merge, q={q_len}", decode_kernels.merge_pieces, merge, shape=model))
    return cases


def _page_cases(model: str) -> list[KernelCase]:
    page, lane = {"PAGE": 16}, {"BLOCK": 16}
    table = {"table": "*i32", "n": "i32", "width": "i32"}
    planned = {"lengths": "*i32", "counters": "*i32", "plan": "*i32", "segments": "i32"}
    written = {"rank": "*i32", "plan": "*i32", "heads": "i32", **table, **page}
    strides = {**_strides("key", "row", "head", "token"), **_strides("value", "row", "head", "token")}
    new = {
        "key": MODEL_DTYPE, "value": MODEL_DTYPE, "position": "*i32", "free": "*i32", "key_pages": MODEL_DTYPE,
        "value_pages": MODEL_DTYPE, "position_pages": "*i32", "segments": "i32", **strides, "KEY_DIM": DIM,
        "VALUE_DIM": DIM, "KEY_BLOCK": DIM, "VALUE_BLOCK": DIM, **written,
    }  # fmt: skip
    moved = {"keep": "*i8", "lengths": "*i32", "BLOCK": pages.ENTRIES, **table, **page}
    whole = {"pages": MODEL_DTYPE, "DIM": DIM, "WIDTH": pages.WIDTH}
    single = {"pages": "*fp32", "DIM": 1, "WIDTH": 1}
    back = {"plan": "*i32", "table": "*i32", "free": "*i32", "segments": "i32", "width": "i32", "BLOCK": pages.OWNED}
    numbers = {"numbers": "*fp32", "pages": "*fp32", **written}
    kernels = [
        ("append, plan", pages_kernels.plan_append, {"added": "*i32", **planned, **page, **lane}, ()),
        ("append one token", pages_kernels.write_new, {"BLOCK": 1, **new}, (*strides, "width")),
        ("append a prompt", pages_kernels.write_new, {"BLOCK": pages.COLUMNS, **new}, (*strides, "width", "n")),
        ("append one state", pages_kernels.write_numbers, {"BLOCK": 1, **numbers}, ("width",)),
        ("append a prompt's states", pages_kernels.write_numbers, {"BLOCK": 64, **numbers}, ("width", "n")),
        ("compaction, keys or values", pages_kernels.move_kept, {**moved, **whole}, ("width", "n")),
        ("compaction, positions or states", pages_kernels.move_kept, {**moved, **single}, ("width", "n")),
        ("release, plan", pages_kernels.plan_release, {"shorter": "*i32", **planned, **page, **lane}, ()),
        ("release", pages_kernels.give_back, back, ("width",)),
    ]
    return [KernelCase(name, kernel, given, divisible=even, shape=model) for name, kernel, given, even in kernels]


def _copy_cases(model: str) -> list[KernelCase]:
    """Keys, values, positions and log β of a layer: out of pages, into pages, and from pages to pages."""
    widths = (DIM // 2, DIM // 2, 1, 1)  # words of 4 bytes
    fixed = {"sources": ("*i32",) * 4, "targets": ("*i32",) * 4, "count": "i32", "WIDTHS": widths}
    fixed |= copies.tile_sizes(widths)
    slots = {"gather": ("*i64", None), "scatter": (None, "*i64"), "new layout": ("*i64", "*i64")}
    return [
        KernelCase(f"tier copies, {name}", copies.move_words, {**fixed, "source_slots": source, "target_slots": target},
                   num_stages=3, shape=model)
        for name, (source, target) in slots.items()
    ]  # fmt: skip


def _select_cases(model: str) -> list[KernelCase]:
    read = {"scores": "*fp32", "positions": "*i32", "bounds": "*i32", "state": "*i32", "stride": "i32"}
    cases = []
    for word, name in enumerate(("scores", "positions", "segments")):
        count = {**read, "histogram": "*i32", "shift": "i32", "WORD": word, "BLOCK": select.BLOCK}
        pick = {"state": "*i32", "histogram": "*i32", "shift": "i32", "WORD": word}
        cases.append(
            KernelCase(f"selection, digits of {name}", select.count_digits, count, 8, 3, ("stride",), shape=model)
        )
        cases.append(KernelCase(f"selection, pick in {name}", select.pick_digit, pick, 4, 3, shape=model))
    mark = {**read, "keep": "*i8", "counts": "*i32", "BLOCK": select.BLOCK}
    return [*cases, KernelCase("selection, mark", select.mark, mark, 8, 3, ("stride",), shape=model)]


def _defensive_cases(model: str) -> list[KernelCase]:
    strides = {**_strides("query", "row", "head", "token"), **_strides("key", "row", "head", "token")}
    common = {
        "queries": MODEL_DTYPE, "keys": MODEL_DTYPE, "positions": "*i32", "query_positions": "*i32", "counted": "*i32",
        "scale": "fp32", "heads": "i32", "window": "i32", "n": "i32", "reach": "i32", **strides, "GROUP": GROUP,
        "DIM": DIM, "DIM_BLOCK": DIM, "BLOCK": defensive.BLOCK, "PRECISION": Constant("tf32"),
    }  # fmt: skip
    even = (*strides, "window", "n", "padded")
    options = defensive.window_options(2 * DIM)
    first = {"sums": "*fp32", "ROWS": defensive.ROWS, **common}
    worst = {"present": "*i32", "scales": "*fp32", "worst": "*fp32", "padded": "i32", "ROWS": defensive.POOLED_ROWS}
    worst |= {"BAND": Constant("tf32"), **common}
    weights = value_norms.norm_options(2)
    columns = weights.pop("COLUMNS")
    strides = {**_strides("value", "row", "head", "token"), **_strides("weight", "head", "dim")}
    norms = {
        "values": MODEL_DTYPE, "weight": MODEL_DTYPE, "norms": "*fp32", "heads": "i32", "n": "i32", "hidden": "i32",
        **strides, "GROUP": GROUP, "DIM": DIM, "DIM_BLOCK": DIM, "BLOCK": value_norms.BLOCK, "COLUMNS": columns,
        "PRECISION": Constant("tf32"),
    }  # fmt: skip
    finish = {"sums": "*fp32", "scales": "*fp32", "splits": "i32", "ROWS": defensive.ROWS}
    kernels = [
        ("defensive, first pass", defensive_kernels.sum_rows, first, options, even),
        ("defensive, merge", defensive_kernels.finish_rows, finish, {"num_warps": 4, "num_stages": 3}, ()),
        ("defensive, worst case", defensive_kernels.take_worst, {"mean": None, **worst}, options, even),
        ("defensive, worst case and mean", defensive_kernels.take_worst, {"mean": "*fp32", **worst}, options, even),
        ("value norms", value_norms.project_norms, norms, weights, (*strides, "n", "hidden")),
    ]
    return [
        KernelCase(name, kernel, given, divisible=even, shape=model, **sizes)
        for name, kernel, given, sizes, even in kernels
    ]
