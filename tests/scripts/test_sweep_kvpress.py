"""A sweep under kvpress: what its side computes, and what is refused. A whole run takes a Python that has kvpress."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tenure.eval import CaseBuilder, kl_to_full
from tenure.eval.cells import parse_cells
from tenure.eval.sweep import Failure, SweepConfig, Unit
from tenure.scripts.bench.kvpress_answers import Answers
from tenure.scripts.bench.sweep_kvpress import KvpressRunner, check_kvpress
from tenure.scripts.sweep import SweepCommand

CONTEXT, QUESTION, GOLD = list(range(3, 43)), [50, 51, 52, 53], [60, 61, 62]


class FirstEntries:
    """Keeps the first `int(n (1 - compression_ratio))` entries of every head, as presses round, by hooks as theirs."""

    compression_ratio = 0.0

    @contextmanager
    def __call__(self, model):
        hooks = [layer.self_attn.register_forward_hook(self.cut, with_kwargs=True) for layer in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    def cut(self, module, _, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        kept = int(kwargs["hidden_states"].shape[1] * (1 - self.compression_ratio))
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        return output


@pytest.fixture
def answers(tiny_llama):
    """kvpress's side with a press of our own."""
    side = Answers.__new__(Answers)
    side.model, side.cells = tiny_llama, [("first", FirstEntries(), 0.3), ("first", FirstEntries(), 1.0)]
    with torch.no_grad():
        yield side


def test_answers_are_those_of_the_model_over_the_kept_entries(answers, tiny_llama):
    asked = {"context_ids": CONTEXT, "question_ids": QUESTION, "answer_ids": GOLD, "limit": 6, "ending": [-1]}
    full, cut, whole = answers.answer(asked)
    prompt = torch.tensor([CONTEXT + QUESTION])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert full["ids"] == tiny_llama.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
    assert (full["kl"], full["top1"], full["entries"]) == (0.0, 1.0, 3 * 2 * 40)
    assert whole["ids"] == full["ids"] and whole["kl"] < 1e-9 and whole["entries"] == full["entries"]
    assert cut["entries"] == 3 * 2 * 12, "the share is not rounded down to one less"
    assert cut["bytes"] / full["bytes"] == 12 / 40

    rest = torch.tensor([QUESTION + GOLD])
    press = FirstEntries()
    press.compression_ratio = 1 - 12.5 / 40
    with press(tiny_llama):  # the context is read under the press
        cache = tiny_llama(torch.tensor([CONTEXT]), use_cache=True).past_key_values
    assert cache.layers[2].keys.shape[2] == 12
    logits = tiny_llama(rest, past_key_values=cache, position_ids=torch.arange(40, 47)[None]).logits[0]
    reference = tiny_llama(torch.tensor([CONTEXT + QUESTION + GOLD])).logits[0, 40:]
    assert cut["kl"] == pytest.approx(float(kl_to_full(reference, logits).mean()), abs=1e-6) and cut["kl"] > 1e-3
    assert cut["ids"][0] == int(logits[3].argmax())


def test_an_answer_ends_at_a_token_that_ends_it(answers):
    asked = {"context_ids": CONTEXT, "question_ids": QUESTION, "answer_ids": GOLD, "limit": 6, "ending": [-1]}
    ids = answers.answer(asked)[0]["ids"]
    ended = answers.answer(asked | {"ending": [ids[2]]})[0]["ids"]
    assert ended == ids[: ids.index(ids[2]) + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ("retention", "knorm")}, "kvpress has no retention; with --kvpress accepted: snapkv, adakv,"),
        ({"policies": ("snapkv:layer",)}, "leave out that of snapkv:layer"),
        ({"question": "both"}, "question: agnostic is accepted"),
        ({"budgets": (0.5, 64)}, "budgets between 0 and 1 are accepted"),
        ({"recent": 32}, "recent: 0 are accepted, the sweep has 0 and 32"),
        ({"dtype": "bfloat16"}, "dtype: float32 is accepted, the sweep has bfloat16"),
    ],
)
def test_sweeps_that_kvpress_cannot_run_are_refused(changes, message):
    values = {"policies": ("snapkv",), "budgets": (0.5,), "tasks": ("needle",), "sinks": 0, "recent": 0}
    sweep = SweepConfig(**(values | {"dtype": "float32"} | changes))
    with pytest.raises(ValueError, match=message):
        check_kvpress(Path(sys.executable), sweep, sweep.cells())


def test_pythons_that_cannot_run_kvpress_are_refused():
    sweep = SweepConfig(("snapkv",), (0.5,), ("needle",), sinks=0, recent=0, dtype="float32")
    with pytest.raises(ValueError, match="--kvpress /no/python cannot be run"):
        check_kvpress(Path("/no/python"), sweep, sweep.cells())
    with pytest.raises(ValueError, match="--kvpress runs on the CPU; --devices has cuda:0"):
        SweepCommand(Path("sweep.yaml"), devices=["cuda:0"], kvpress=Path("python"))
    builder = partial(CaseBuilder, None, [])
    with pytest.raises(ValueError, match="could not run kvpress: "):
        KvpressRunner(Path(sys.executable), "/no/model", None, parse_cells(["snapkv"], [0.5]), builder, [2])


def test_a_case_that_fails_there_does_not_stop_the_rest(tmp_path):
    """A process that fails at the first case and is gone at the second."""
    python = tmp_path / "python"
    answers = """echo ready; read line; echo '{"error": "ValueError: odd"}'; read line; echo gone >&2"""
    python.write_text(f"#!/bin/sh\n{answers}\n")
    python.chmod(0o755)
    case = SimpleNamespace(context_ids=CONTEXT, question_ids=QUESTION, answer_ids=GOLD, extra_tokens=4)
    builder = SimpleNamespace(case=lambda task, index: case)
    cells = parse_cells(["snapkv"], [0.5])
    runner = KvpressRunner(python, "model", None, cells, lambda length, seed: builder, [2])  # type: ignore[arg-type, return-value]
    (failure,) = runner.run(Unit("needle", 40, 0, 3))
    assert isinstance(failure, Failure) and failure.error == "RuntimeError: kvpress: ValueError: odd"
    assert failure.policy is None and failure.index == 3
    with pytest.raises(ValueError, match="ended at needle, 40 tokens, seed 0, case 4: gone"):
        runner.run(Unit("needle", 40, 0, 4))
