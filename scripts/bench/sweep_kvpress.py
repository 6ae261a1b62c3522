"""`tenure sweep YAML --kvpress PYTHON`: run the cases of a sweep under kvpress, in a separate Python."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sweep_checks import load_texts, make_builder

if TYPE_CHECKING:
    from ...eval import Case, Cell
    from ...eval.cases import Record
    from ...eval.sweep import Failure, SweepConfig, Unit
    from ...eval.sweep.units import Builder

# Policies that are a press of kvpress with its defaults; who competes is then decided by the press.
PRESSES = (
    "snapkv", "adakv", "criticalkv", "ada_criticalkv", "pyramidkv", "expected_attention", "keydiff", "lagkv", "knorm",
    "tova", "streaming_llm",
)  # fmt: skip


def check_kvpress(python: Path, sweep: SweepConfig, cells: Sequence[Cell]) -> dict[str, str]:
    """The versions of kvpress and what it builds on; ValueError if it is absent or cannot run the sweep as it is."""
    others = sorted({cell.name for cell in cells if cell.evicts and cell.name not in PRESSES})
    if others:
        raise ValueError(f"kvpress has no {', '.join(others)}; with --kvpress accepted: {', '.join(PRESSES)}")
    scopes = sorted({f"{cell.name}:{cell.scope}" for cell in cells if cell.evicts and cell.scope != _default(cell)})
    if scopes:
        raise ValueError(f"a press has a scope of its own; leave out that of {', '.join(scopes)}")
    if any(cell.aware for cell in cells):
        raise ValueError("with --kvpress prompts are compressed before the question; question: agnostic is accepted")
    if any(isinstance(cell.budget, int) for cell in cells):
        raise ValueError("kvpress takes shares of a prompt; with --kvpress budgets between 0 and 1 are accepted")
    if (sweep.sinks, sweep.recent) != (0, 0):
        raise ValueError(
            f"kvpress protects no tokens by itself; sinks: 0 and recent: 0 are accepted, the sweep has {sweep.sinks} "
            f"and {sweep.recent}"
        )
    if sweep.dtype != "float32":
        raise ValueError(f"kvpress runs in float32 here; dtype: float32 is accepted, the sweep has {sweep.dtype}")
    names = ("kvpress", "torch", "transformers")
    asked = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    try:
        done = subprocess.run([str(python), "-I", "-c", asked], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--kvpress {python} cannot be run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"--kvpress {python} has no kvpress: {last}")
    return json.loads(done.stdout)


def prepare_kvpress(python: Path, sweep: SweepConfig, threads: int | None, device: str) -> KvpressRunner:
    """Starts a process of kvpress's Python; ValueError if it cannot load the model."""
    from transformers import AutoTokenizer, GenerationConfig

    from ...training.assets import resolve_model

    source = str(resolve_model(sweep.model))
    tokenizer = AutoTokenizer.from_pretrained(source, revision=sweep.revision)
    ending = GenerationConfig.from_pretrained(source, revision=sweep.revision or "main").eos_token_id
    texts = load_texts(sweep)
    builder = partial(make_builder, tokenizer, texts)
    ends = [ending] if isinstance(ending, int) else list(ending or [])
    return KvpressRunner(python, source, tokenizer, sweep.cells(), builder, ends, threads or 1)


def _default(cell: Cell) -> str:
    return cell.policy.default_scope


@dataclass
class KvpressRunner:
    """Runs units in a process of kvpress's Python, with the model in fp32 on the CPU.

    Attributes:
        python: of an environment that has kvpress.
        model: a local folder.
        cells: all are measured on every unit.
        ending: tokens that end a generation.
    """

    python: Path
    model: str
    tokenizer: Any
    cells: Sequence[Cell]
    builder: Callable[[int, int], Builder]
    ending: Sequence[int]
    threads: int = 1

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        job, self._errors = Path(self._folder.name, "job.json"), Path(self._folder.name, "stderr")
        asked = [(cell.name, cell.budget) for cell in self.cells if cell.evicts]
        job.write_text(json.dumps({"model": self.model, "threads": self.threads, "cells": asked}))
        command = [str(self.python), "-I", str(Path(__file__).with_name("kvpress_answers.py")), str(job)]
        try:
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
        except OSError as error:
            raise ValueError(f"--kvpress {self.python} cannot be run: {error}") from None
        self._line("could not run kvpress")

    def _line(self, failed: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = (self._errors.read_text().strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"--kvpress {self.python} {failed}: {last}")
        return line

    def run(self, unit: Unit) -> list[Record | Failure]:
        """One result for each cell, or one failure of the whole unit; ValueError if the process is gone."""
        from ...eval.sweep import Failure

        case = self.builder(unit.length, unit.seed).case(unit.task, unit.index)
        asked = {
            "context_ids": case.context_ids, "question_ids": case.question_ids, "answer_ids": case.answer_ids,
            "limit": len(case.answer_ids) + case.extra_tokens, "ending": list(self.ending),
        }  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the line that does not come says why
        answer = json.loads(self._line(f"ended at {unit.name}"))
        if isinstance(answer, dict):
            return [Failure.of(unit, None, RuntimeError(f"kvpress: {answer['error']}"))]
        whole, *found = answer
        rest = iter(found)
        return [self._record(case, cell, next(rest) if cell.evicts else whole, whole["entries"]) for cell in self.cells]

    def _record(self, case: Case, cell: Cell, found: dict[str, Any], entries: int) -> Record:
        from ...eval.cases import Record

        prediction = self.tokenizer.decode(found["ids"], skip_special_tokens=True)
        score = case.score(prediction)
        return Record(
            task=case.task, length=case.length, index=case.index, seed=case.seed, depth=case.depth,
            policy=cell.name, scope=cell.scope, budget=cell.budget, correct=score == 1.0, answer=case.answer,
            prediction=prediction, kl=found["kl"], top1=found["top1"], entries=found["entries"], bytes=found["bytes"],
            kept_share=found["entries"] / entries, seconds=found["seconds"], compress_seconds=found["seconds"],
            read_seconds=0.0, score=score, aware=False,
        )  # fmt: skip
