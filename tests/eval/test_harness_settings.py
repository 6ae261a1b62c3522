"""Settings of lm-eval runs: cached answers, batch sizes, beams, schedules, and the table that is printed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from tenure.eval.harness.model import CPU_BATCH, created_models, model_class, settings_digest
from tenure.eviction import RaggedCache
from tenure.scripts import cli

from .harness_tools import instance, passage, run_tasks, write_tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def lm(model, tokenizer, **arguments: Any):
    return model_class()(pretrained=model, tokenizer=tokenizer, **{"batch_size": 2} | arguments)


def test_cached_answers_of_other_settings_are_refused(folder, tmp_path):
    tasks, path = write_tasks(tmp_path / "tasks"), str(tmp_path / "answers")
    options = {"tasks": ["local_choose"], "use_cache": path}
    arguments = {"pretrained": folder, "policy": "streaming_llm", "budget": 40}
    first = run_tasks("tenure", arguments, tasks, **options)
    again = run_tasks("tenure", arguments, tasks, **options)
    assert first["results"] == again["results"] and again["config"]["tenure"]["contexts"] == 0, "nothing was computed"
    for changed, message in (
        ({"policy": "knorm"}, r"policy='streaming_llm' \(now 'knorm'\)"),
        ({"budget": 0.5}, r"budget=40 \(now 0.5\)"),
        ({"dtype": "bfloat16"}, r"dtype=None \(now 'bfloat16'\)"),
        ({"schedule": "bounded"}, r"schedule='once' \(now 'bounded'\)"),
    ):
        with pytest.raises(ValueError, match=r"--use_cache with answers of .*" + message):
            run_tasks("tenure", arguments | changed, tasks, **options)


def test_a_cache_of_another_model_type_is_refused(folder, tmp_path):
    tasks, path = write_tasks(tmp_path / "tasks"), str(tmp_path / "answers")
    options = {"tasks": ["local_choose"], "use_cache": path}
    run_tasks("hf", {"pretrained": folder}, tasks, **options)
    with pytest.raises(ValueError, match=r"answers of unknown settings; accepted: a cache of these settings, or a pat"):
        run_tasks("tenure", {"pretrained": folder, "policy": "knorm"}, tasks, **options)


def test_the_command_gives_each_setting_a_cache_of_its_own_and_prints_what_was_kept(folder, tmp_path, capsys):
    tasks = write_tasks(tmp_path / "tasks")
    shown = {}
    for policy in ("knorm", "streaming_llm", "knorm"):
        code = cli.main([
            "eval", "--model_args", f"pretrained={folder},policy={policy},budget=0.3,dtype=float32", "--tasks",
            "local_choose", "--include_path", str(tasks), "--device", "cpu", "--use_cache", str(tmp_path / "answers"),
        ])  # fmt: skip
        assert code == 0
        shown[policy, len(shown)] = capsys.readouterr().out
    assert len(list(tmp_path.glob("answers-*.db"))) == 2
    first, second, third = shown.values()
    assert "|policy              |knorm (head), budget 0.3, once|" in first
    assert "|kept of the contexts|29." in first or "|kept of the contexts|30." in first
    assert "MB, at most" in first and "streaming_llm" in second
    assert "kept of the contexts" not in third, "all answers were cached"


def test_digests_differ_where_a_setting_does(folder):
    def digest(**options: Any) -> str:
        return settings_digest(model_class()(pretrained=folder, dtype="float32", **options).settings)

    plain = {"policy": "snapkv", "budget": 0.2}
    assert digest(**plain) == digest(**plain, batch_size=4)
    others = ({"sinks": 1}, {"recent": 1}, {"buffer": 1}, {"floor": 0.1}, {"scope": "layer"}, {"prefill_chunk": 64},
              {"preset": "kvpress"}, {"question": "aware"}, {"max_length": 500})  # fmt: skip
    assert len({digest(**plain | other) for other in others} | {digest(**plain)}) == 1 + len(others)


def test_automatic_batches_try_the_longest_request_and_nothing_on_a_cpu(model, tokenizer, monkeypatch):
    subject = lm(model, tokenizer, policy="streaming_llm", budget=40, batch_size="auto")
    calls: list[tuple[int, ...]] = []
    forward = type(subject)._model_call
    monkeypatch.setattr(type(subject), "_model_call", lambda self, ids: calls.append(ids.shape) or forward(self, ids))
    requests = [instance("loglikelihood", (passage(n, 20 + 10 * n), " day")) for n in range(3)]
    found = subject.loglikelihood(requests)
    assert len(found) == 3 and not calls and subject._detect_batch_size() == CPU_BATCH
    subject.max_batch_size = 4
    assert subject._detect_batch_size() == 4
    monkeypatch.setattr(type(subject), "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(type(subject), "_model_call", lambda self, ids, **rest: calls.append(tuple(ids.shape)) or _no())
    longest = len(tokenizer(passage(2, 40) + " day")["input_ids"])
    with pytest.raises(_Stop):
        subject._detect_batch_size()
    assert calls == [(4, longest)] and subject.max_length > longest


class _Stop(Exception):
    pass


def _no() -> None:
    raise _Stop


def test_beams_continue_a_compressed_context(model, tokenizer):
    """With nothing evicted the answers are those of transformers' own beam search."""
    docs = [
        {"context": passage(n, 40 + 9 * n), "question": f"\n\nWhat did crew {n} write?", "aware": False}
        for n in range(3)
    ]
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False, "num_beams": 3}
    requests = [instance("generate_until", (doc["context"] + doc["question"], settings), doc) for doc in docs]
    expected = lm(model, tokenizer, policy="full").generate_until(requests)
    subject = lm(model, tokenizer, policy="streaming_llm", budget="100000 entries")
    assert subject.generate_until(requests) == expected
    assert subject.meter.contexts == 3
    few = lm(model, tokenizer, policy="streaming_llm", budget=12)
    assert few.generate_until(requests) != expected


def test_nothing_is_evicted_while_the_answer_is_written(model, tokenizer, monkeypatch):
    doc = {"context": passage(1, 60), "question": "\n\nWhat did the crew write?", "aware": False}
    settings = {"until": [], "max_gen_toks": 30, "do_sample": False}
    request = instance("generate_until", (doc["context"] + doc["question"], settings), doc)
    evictions: list[str] = []
    evict = RaggedCache._evict
    monkeypatch.setattr(RaggedCache, "_evict", lambda self, *args: evictions.append("") or evict(self, *args))
    counts = []
    for schedule in (None, "bounded"):
        with created_models() as models:
            subject = lm(model, tokenizer, policy="streaming_llm", budget=20, buffer=4, schedule=schedule)
        assert models == [subject]
        evictions.clear()
        subject.generate_until([request])
        counts.append(len(evictions))
        assert subject.measured["schedule"] == (schedule or "once") and json.dumps(subject.measured)
    assert counts[0] == 1 and counts[1] > 5


def test_a_model_without_room_for_a_question_is_refused(tiny_model, tokenizer, tmp_path, capsys):
    from .harness_tools import save_model

    small = save_model(tmp_path / "small", tiny_model("llama", vocab_size=512, max_position_embeddings=256), tokenizer)
    assert cli.main(["eval", "--model_args", f"pretrained={small},policy=snapkv", "--tasks", "tenure_vt"]) == 1
    assert "exceed the model's 256 positions; accepted: a model with more than 256 positions" in capsys.readouterr().err
