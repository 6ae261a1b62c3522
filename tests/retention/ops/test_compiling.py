"""Every kernel compiled for A100 and H100 at real shapes, in processes that compile: this one interprets."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tenure.retention.ops.compile_cases import compile_cases
from tenure.retention.ops.compiling import compile_kernel
from tenure.retention.ops.kernel_choice import interpreting

pytestmark = pytest.mark.timeout(900)  # some 60 compilations on a busy machine, if Triton has kept none
COMPILING = os.environ | {"TRITON_INTERPRET": "0"}


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


def test_both_models_and_cards_are_there(report: dict) -> None:
    ours = ("gated attention", "biased attention", "occupancy", "tier copies")
    rows = [row for row in report["rows"] if row["name"].startswith(ours)]
    seen = {(row["name"], row["shape"], row["capability"]) for row in rows}
    names = {f"gated attention {part}" for part in ("forward", "query_grad", "key_grad", "delta")}
    names |= {f"biased attention {part}" for part in ("forward", "query_grad", "key_grad")}
    names |= {f"tier copies, {way}" for way in ("gather", "scatter", "new layout")}
    names |= {f"occupancy {way} {where}" for way in ("forward", "backward") for where in ("everywhere", "at samples")}
    models = ("Qwen3-4B", "Llama-3.1-8B")
    assert seen == {(name, model, card) for name in names for model in models for card in (80, 90)}
    assert all(name in report["output"].replace("\n", " ") for name in ("registers", "spills", "blocks/SM"))


def test_attention_uses_the_tensor_cores(report: dict) -> None:
    parts = ("forward", "query_grad", "key_grad")
    kinds = {f"{kind} attention {part}" for kind in ("gated", "biased") for part in parts}
    for row in report["rows"]:
        if row["name"] in kinds:
            assert row["tensor_cores"] == {80: "mma", 90: "wgmma"}[row["capability"]], row


PROBES = """
from dataclasses import replace
import torch
from tenure.retention.ops.compile_cases import MODELS, ModelShape, attention_cases
from tenure.retention.ops.compiling import Compiled, compile_kernel
case = attention_cases(MODELS[0], 90)[0]
print(*compile_kernel(replace(case, num_warps=4), 90).problems)
print(*Compiled("", "", 80, 32, 164 * 1024, 0, 128, "none").problems)
for wrong, card in ((replace(case, arguments={}), 90), (case, 75)):
    try: compile_kernel(wrong, card)
    except ValueError as error: print(error)
for one in attention_cases(ModelShape("SmolLM2-135M", 30, 9, 3, 64), 90, torch.float16):
    assert not compile_kernel(one, 90).problems, one
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
