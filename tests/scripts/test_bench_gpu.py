"""`bench_gpu`: as a script where nothing but torch and Triton is, its checks, its bounds, and what it leaves out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tenure.retention.ops.kernel_choice import interpreting
from tenure.scripts.bench import bench_gpu
from tenure.scripts.bench.gpu import decoding
from tenure.scripts.bench.gpu.after_prompt_cases import AfterPrompt
from tenure.scripts.bench.gpu.all_cases import all_cases
from tenure.scripts.bench.gpu.case import H100, KernelBenchCase, Sides, Work
from tenure.scripts.bench.gpu.decoding import Append, RaggedDecode
from tenure.scripts.bench.gpu.evicting import Compaction, DefensiveScores, Selection, ValueNorms
from tenure.scripts.bench.gpu.moving import TierCopies
from tenure.scripts.bench.gpu.running import GIB, KernelRow, KernelTimer, check_all
from tenure.scripts.bench.gpu.stopwatch import Stopwatch
from tenure.scripts.bench.gpu.table import rows_text
from tenure.scripts.bench.gpu.training import GatedAttention, Occupancy

SCRIPT = Path(bench_gpu.__file__).resolve()
# The dependencies of tenure that the script must do without, and an installed tenure is not used either.
BLOCKED = ["transformers", "accelerate", "safetensors", "huggingface_hub", "rich", "tyro", "platformdirs", "datasets"]
WITHOUT = f"""
import runpy, sys
for name in {BLOCKED!r}: sys.modules[name] = None
sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') + repr(f)]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_interpreted_every_kernel_agrees_and_every_row_is_set_up(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run_script("--interpret", "--json", str(path), TENURE_KERNELS="reference", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(path.read_text())
    assert next(iter(report)) == "ceilings" and report["interpreted"]
    assert done.stdout.startswith("Ceilings of no card: interpreted, times say nothing")
    kernels = {case.kernel for case in all_cases(quick=False)}
    assert {check["kernel"] for check in report["checks"]} == kernels
    assert not [check for check in report["checks"] if check["problem"]]
    assert f"{len(report['checks'])} of {len(report['checks'])} agree with their twins" in done.stdout
    assert {row["kernel"] for row in report["rows"]} == kernels
    for row in report["rows"]:
        assert row["us"] > 0 and row["runs"] == 1 and not row["skipped"], row
        assert row["peers"].get("twin") or row["shape"].endswith("offload"), row
        # FlexAttention has no backward on a CPU; nothing else may be missing because it failed.
        assert not [why for why in row["absent"].values() if "Error:" in why and "FlexAttention does not" not in why]


def test_without_a_card_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_script()
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.strip() == (
        "bench_gpu: there is no CUDA device here; --interpret runs the checks without one, and times nothing"
    )


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (GatedAttention(32768), 8890),
        (GatedAttention(131072), 142200),
        (GatedAttention(32768, backward=True), 8890 + 31100),
        (Occupancy("Qwen3-4B", 32768), 40000),
        (Occupancy("Llama-3.1-8B", 131072, samples=64), 556),
        (RaggedDecode(32768, 0.1), 4.0),
        (RaggedDecode(131072, 0.5), 80),
        (Compaction(131072), 65),
        (DefensiveScores(32768), 40),
        (ValueNorms("Qwen3-4B", 32768), 695),
        (ValueNorms("Llama-3.1-8B", 131072), 4450),
        (TierCopies(4096, "gather"), 10),
        (Selection("Qwen3-4B", 32768), 70),
        (Selection("Llama-3.1-8B", 131072), 250),
        (Append(32768, 1), 0.0024),
        (AfterPrompt(32768, bias=True), 2460),
    ],
)
def test_bounds_are_those_of_the_documentation(case: KernelBenchCase, bound: float) -> None:
    assert case.work().bound_us(H100) == pytest.approx(bound, rel=0.02)


def test_a_wrong_kernel_is_found_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreting():
        pytest.skip("this run compiles")
    monkeypatch.setenv("TENURE_KERNELS", "triton")
    real = decoding.ragged_decode
    monkeypatch.setattr(decoding, "ragged_decode", lambda *inputs: real(*inputs) * 1.1)
    case = RaggedDecode(4096, 0.2)
    (check,) = check_all([case, RaggedDecode(32768, 0.5)], "cpu", interpreted=True)
    assert check.problem == "it differs from its twin by 0.093; up to 0.015 is accepted"
    row = replace(timer(), wrong=frozenset({check.kernel})).row(case)
    assert row.us is None and row.failed and row.skipped == "its check failed"


@dataclass(frozen=True)
class Doubling(KernelBenchCase):
    """A case without a kernel, some of whose sides fail."""

    size: int = 4
    fails: bool = False
    kernel = "doubling"

    @property
    def shape(self) -> str:
        return f"n={self.size}"

    def work(self) -> Work:
        return Work(8.0 * self.size)

    def memory(self) -> float:
        return float(self.size)

    def sides(self, device: str) -> Sides:
        number = torch.ones(1, device=device)

        def ours() -> torch.Tensor:
            if self.fails:
                raise RuntimeError("no such instruction\nand more")
            return number.mul_(2)

        def peer() -> None:
            raise NotImplementedError("not on this card")

        def reset() -> None:
            number.fill_(1)

        return Sides(ours, {"twin": lambda: number.add_(number), "peer": peer}, {"other": "is slow"}, reset)

    def small(self, interpreted: bool) -> Doubling:
        return replace(self, size=2)

    def error(self, device: str) -> float:
        return float("nan")


def timer(free: float = GIB, ends: float = float("inf")) -> KernelTimer:
    return KernelTimer("cpu", Stopwatch("cpu", 0.1), H100, frozenset(), ends, lambda device: free)


def test_rows_say_what_is_missing_and_why() -> None:
    row = timer().row(Doubling())
    assert row.us and row.runs == 1 and row.peers["twin"] > 0 and not row.failed
    assert row.absent == {"other": "is slow", "peer": "NotImplementedError: not on this card"}
    assert row.of_h100 == pytest.approx(row.bound_us / row.us)
    large = timer().row(Doubling(3 * GIB))
    assert (large.us, large.failed) == (None, False)
    assert large.skipped == "it takes about 3.0 GiB, and 1.0 GiB are free"
    assert timer(ends=0.0).row(Doubling()).skipped == "the time is up"
    broken = timer().row(Doubling(fails=True))
    assert broken.failed and broken.skipped == "RuntimeError: no such instruction"
    text = rows_text([row, large, broken])
    assert "doubling, n=4: RuntimeError: no such instruction" in text
    assert "doubling, other: is slow (n=4)" in text and "3.0 GiB" in text


def test_an_error_that_is_no_number_is_a_problem() -> None:
    (check,) = check_all([Doubling()], "cpu", interpreted=True)
    assert check.shape == "n=2" and check.problem == "it differs from its twin by nan; up to 0 is accepted"


def test_the_shapes_that_are_timed() -> None:
    cases = all_cases(quick=False)
    assert len(set(cases)) == len(cases)
    assert set(all_cases(quick=True)) < set(cases)
    assert not [case for case in all_cases(quick=True) if "131072" in case.shape]
    for case in cases:
        assert case.memory() < 75 * GIB, "an H100 times every row"
        assert case.small(interpreted=False).memory() < GIB
    assert rows_text([KernelRow("a", "b", 1.0)]).splitlines()[0].split()[0] == "kernel"
