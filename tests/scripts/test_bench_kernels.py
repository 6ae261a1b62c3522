"""Every kernel compiled for A100 and H100 at real shapes, in processes that compile: this one interprets."""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module

import pytest

from tenure.eviction import ops as eviction_ops
from tenure.retention import ops as retention_ops
from tenure.retention.ops.kernel_choice import interpreting
from tenure.scripts.bench import eviction_kernel_cases as of_eviction
from tenure.scripts.bench.compiling import compile_kernel
from tenure.scripts.bench.retention_kernel_cases import compile_cases

pytestmark = pytest.mark.timeout(900)  # some 250 compilations on a busy machine, if Triton has kept none
COMPILING = os.environ | {"TRITON_INTERPRET": "0"}
CARDS, SHAPES = (80, 90), ("Qwen3-4B", "Llama-3.1-8B")
KERNELS = (
    "gated attention forward", "gated attention query_grad", "gated attention key_grad", "gated attention delta",
    "biased attention forward", "biased attention query_grad", "biased attention key_grad",
    "occupancy forward everywhere", "occupancy backward everywhere", "occupancy forward at samples",
    "occupancy backward at samples", "ragged decode, q=1, pages of 16", "ragged decode, q=1, pages of 32",
    "ragged decode, q=1, pages of 64", "ragged decode, q=1, pages of 128", "ragged decode, q=16, pages of 16",
    "ragged decode, q=1, pages of 16, sinks and cap",
    "ragged decode merge, q=1, pages of 16", "ragged decode merge, q=16, pages of 16", "append, plan",
    "append one token", "append a prompt", "append one state", "append a prompt's states",
    "compaction, keys or values", "compaction, positions", "compaction, states", "release, plan", "release",
    "selection, mark", "defensive, first pass", "defensive, merge", "defensive, worst case",
    "defensive, worst case and mean", "value norms", "tier copies, gather", "tier copies, scatter",
    "tier copies, new layout",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """`tenure bench kernels`: its rows, output and exit code."""
    path = tmp_path_factory.mktemp("kernels") / "rows.json"
    command = [sys.executable, "-m", "tenure.scripts.cli", "bench", "kernels", "--json", str(path)]
    done = subprocess.run(command, env=COMPILING, capture_output=True, text=True)
    assert path.exists(), done.stderr[-2000:]
    return {"rows": json.loads(path.read_text()), "output": done.stdout, "code": done.returncode}


def test_no_kernel_spills_and_all_fit(report: dict) -> None:
    assert report["code"] == 0
    for row in report["rows"]:
        assert not row["problems"], row
        assert row["spills"] == 0
        assert row["shared"] <= {80: 163, 90: 227}[row["capability"]] * 1024
        assert 0 < row["registers"] <= 255


def test_every_kernel_is_there_for_both_models_and_cards(report: dict) -> None:
    seen = {(row["name"], row["shape"], row["capability"]) for row in report["rows"]}
    assert len(seen) == len(report["rows"])
    listed = {card: [*compile_cases(card), *of_eviction.compile_cases(card)] for card in CARDS}
    assert seen == {(case.name, case.shape, card) for card, cases in listed.items() for case in cases}
    assert {(name, shape, card) for name in KERNELS for shape in SHAPES for card in CARDS} <= seen
    assert all(name in report["output"].replace("\n", " ") for name in ("registers", "spills", "blocks/SM"))


def test_no_kernel_is_left_out() -> None:
    """Every function that a launcher gives a grid is compiled."""
    compiled = {case.kernel for case in (*compile_cases(90), *of_eviction.compile_cases(90))}
    launched = set()
    for package in (retention_ops, eviction_ops):
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = import_module(found.name)
            names = set(re.findall(r"^ +(\w+)\[\(", inspect.getsource(module), re.MULTILINE))
            # The launcher of occupancy gets its kernels as an argument.
            names |= {"forward_kernel", "backward_kernel"} if "kernel[grid]" in inspect.getsource(module) else set()
            names |= set(re.findall(r"^ +(\w+_kernel)\[grid\]", inspect.getsource(module), re.MULTILINE))
            launched |= {getattr(module, name) for name in names if hasattr(module, name)}
    assert launched == compiled


def test_attention_uses_the_tensor_cores(report: dict) -> None:
    parts = ("forward", "query_grad", "key_grad")
    kinds = {f"{kind} attention {part}" for kind in ("gated", "biased") for part in parts}
    for row in report["rows"]:
        if row["name"].removesuffix(", odd length") in kinds:
            assert row["tensor_cores"] == {80: "mma", 90: "wgmma"}[row["capability"]], row


PROBES = """
from dataclasses import replace
import torch
from tenure.scripts.bench.eviction_kernel_cases import model_cases
from tenure.scripts.bench.retention_kernel_cases import MODELS, ModelShape, attention_cases
from tenure.scripts.bench.compiling import Compiled, compile_kernel
case = attention_cases(MODELS[0], 90)[0]
print(*compile_kernel(replace(case, num_warps=4), 90).problems)
print(*Compiled("", "", 80, 32, 164 * 1024, 0, 128, "none").problems)
for wrong, card in ((replace(case, arguments={}), 90), (case, 75)):
    try: compile_kernel(wrong, card)
    except ValueError as error: print(error)
for one in attention_cases(ModelShape("SmolLM2-135M", 30, 9, 3, 64), 90, torch.float16):
    assert not compile_kernel(one, 90).problems, one
for card in (80, 90):
    for one in model_cases("Qwen3-4B", card, torch.float32):
        assert not compile_kernel(one, card).problems, one
"""


def test_the_report_sees_spills_and_wrong_cases() -> None:
    """Half the threads for the same tile cannot hold it."""
    done = subprocess.run([sys.executable, "-c", PROBES], env=COMPILING, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    spills, shared, arguments, capability = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ bytes a thread are spilled", spills)
    assert shared == "164.0 KiB of shared memory exceed the card's 163 KiB"
    assert arguments.startswith("gated attention forward: the case and the kernel differ in the arguments BLOCK_D, ")
    assert capability == "capability is 75; accepted: 80, 90"


def test_a_process_that_interprets_does_not_compile() -> None:
    if not interpreting():
        pytest.skip("this run compiles")
    with pytest.raises(RuntimeError, match="process that interprets them"):
        compile_kernel(compile_cases(90)[0], 90)
