"""lm-eval's model type `tenure`: `hf` exactly with nothing evicted; else what a served model would compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from tenure.eval import tasks_folder
from tenure.eval.harness.command import complete, peek
from tenure.eval.harness.generated_tasks import task_files, task_names
from tenure.eval.harness.model import model_class
from tenure.eval.prompts import chat_frame
from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.scripts import cli
from tenure.scripts.run_lm_eval import LmEvalArguments

from .harness_tools import TASKS, instance, passage, run_tasks, write_tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm-eval's command line sets it for good


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def lm(model, tokenizer, **arguments: Any):
    return model_class()(pretrained=model, tokenizer=tokenizer, batch_size=3, **arguments)


def logged_to_wandb(results: dict[str, Any]) -> dict[str, Any]:
    """The command line's settings as lm-eval's W&B logger takes them from the results, without a run."""
    from lm_eval.loggers import WandbLogger

    logger = object.__new__(WandbLogger)
    logger.post_init(results)
    return logger._get_config()["cli_configs"]


def answers(results: dict[str, Any]) -> dict[str, Any]:
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


def test_the_full_cache_gives_the_numbers_of_hf_exactly_and_results_say_what_was_kept(folder, tasks):
    plain = run_tasks("hf", {"pretrained": folder, "dtype": "float32"}, tasks)
    ours = run_tasks("tenure", {"pretrained": folder, "dtype": "float32", "policy": "full"}, tasks)
    assert answers(ours) == answers(plain)
    for task in TASKS:
        assert ours["results"][task] == plain["results"][task]
    arguments = {"pretrained": folder, "policy": "snapkv(window=8)", "budget": 0.25, "scope": "layer", "sinks": 2}
    compressed = run_tasks("tenure", arguments, tasks)
    assert all(one != other for one, other in zip(answers(compressed).values(), answers(plain).values(), strict=True))
    found, full = compressed["config"]["tenure"], ours["config"]["tenure"]
    assert (found["policy"], found["budget"], found["scope"], found["sinks"]) == ("snapkv(window=8)", 0.25, "layer", 2)
    assert (full["policy"], full["budget"], full["scope"]) == ("full", 1.0, "none")
    json.dumps([found, full])
    assert logged_to_wandb(compressed)["tenure"] == found
    assert found["contexts"] == 15 and full["contexts"] == 25  # one for each document here, for each request there
    assert found["kept_share"] == pytest.approx(0.25, abs=0.02) and full["kept_share"] == 1.0
    assert 0 < found["entries"] < full["entries"] and 0 < found["bytes"] < 0.5 * full["bytes"]
    assert 1.0 <= full["bytes"] / full["entries"] / (2 * 8 * 4 + 4) < 1.1  # key, value and position, and free room
    assert found["peak_bytes"] > found["bytes"]


def test_the_full_cache_is_hf_with_a_chat_template_too(folder, tasks):
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "tasks": TASKS[:2]}
    plain = run_tasks("hf", {"pretrained": folder, "dtype": "float32"}, tasks, **options)
    share = run_tasks("tenure", {"pretrained": folder, "policy": "snapkv", "budget": 1.0}, tasks, **options)
    assert answers(share) == answers(plain), "a budget of 1.0 evicts nothing"


@pytest.mark.parametrize("chat", [False, True])
def test_generated_tasks_end_their_context_before_the_question_also_in_a_chat_template(chat, folder, texts, tokenizer):
    import lm_eval
    from lm_eval.tasks import TaskManager

    document = {"length": 500, "cases": 2, "texts": texts, "tokenizer": folder}
    before = len(chat_frame(tokenizer, "").before) if chat else 0
    held = {}
    for task in ("tenure_niah_single_2", "tenure_niah_single_2_aware"):
        manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, metadata=document)
        evaluate: Any = lm_eval.simple_evaluate
        arguments = {"pretrained": folder, "policy": "streaming_llm", "budget": 0.3}
        results = evaluate(
            model="tenure", model_args=arguments, tasks=[task], task_manager=manager, apply_chat_template=chat,
            batch_size=2, device="cpu", bootstrap_iters=0,
        )  # fmt: skip
        held[task] = results["config"]["tenure"]["context_tokens"]
    agnostic, aware = held.values()
    assert agnostic == pytest.approx(before + 500, abs=1) and aware > agnostic + 10


def decode_one_by_one(model, context: list[int], following: list[int], **options: Any) -> list[torch.Tensor]:
    """Logits before each token of `following`, read one at a time as generation writes them."""
    logits = []
    with torch.no_grad(), evict(model, **options) as session:
        cache = session.new_cache()
        logits.append(model(torch.tensor([context]), past_key_values=cache).logits[0, -1])
        for token in following[:-1]:
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return logits


@pytest.mark.parametrize("continuation", [" day", " " + passage(7, 30)])
def test_continuations_are_scored_as_a_served_model_would_write_them(continuation, model, tokenizer):
    """Also over evictions: the continuation is longer than the buffer."""
    options = {"policy": "streaming_llm", "budget": 40, "sinks": 2, "recent": 8, "buffer": 6, "schedule": "bounded"}
    context = passage(1, 80)
    ids = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(context)["input_ids"]
    following = ids[len(before) :]
    expected = sum(
        float(torch.log_softmax(logits, -1)[token])
        for logits, token in zip(decode_one_by_one(model, before, following, **options), following, strict=True)
    )
    subject = lm(model, tokenizer, **options)
    ((found, greedy),) = subject.loglikelihood([instance("loglikelihood", (context, continuation))])
    assert found == pytest.approx(expected, abs=1e-3) and not greedy
    full = lm(model, tokenizer, policy="full").loglikelihood([instance("loglikelihood", (context, continuation))])
    if len(following) > 1:  # the first token is predicted before anything is evicted
        assert abs(full[0][0] - found) > 1e-2
    else:
        assert full[0][0] == pytest.approx(found, abs=1e-4)


def test_rolling_is_reading_a_document_from_its_first_token_on(model, tokenizer):
    options = {"policy": "streaming_llm", "budget": 30, "sinks": 2, "recent": 8, "buffer": 9, "schedule": "bounded"}
    text = passage(3, 90)
    following = tokenizer(text)["input_ids"]
    logits = decode_one_by_one(model, [tokenizer.bos_token_id], following, **options)
    expected = sum(float(torch.log_softmax(one, -1)[token]) for one, token in zip(logits, following, strict=True))
    subject = lm(model, tokenizer, **options)
    (found,) = subject.loglikelihood_rolling([instance("loglikelihood_rolling", (text,))])
    assert found == pytest.approx(expected, abs=2e-3)
    (full,) = lm(model, tokenizer, policy="full").loglikelihood_rolling([instance("loglikelihood_rolling", (text,))])
    assert abs(full - found) > 1e-2


def generations(subject, docs: list[dict[str, Any]], **gen: Any) -> list[str]:
    settings = {"until": [], "max_gen_toks": 10, "do_sample": False} | gen
    return subject.generate_until(
        [instance("generate_until", (doc["context"] + doc["question"], settings), doc) for doc in docs]
    )


def documents(aware: bool) -> list[dict[str, Any]]:
    return [
        {"context": passage(n, 50 + 20 * n), "question": f"\n\nWhat did crew {n} {'ever ' * n}write?", "aware": aware}
        for n in range(4)
    ]


@pytest.mark.parametrize("policy", ["snapkv(window=8)", "retention"])
def test_a_context_is_compressed_before_its_question(policy, model, tokenizer):
    options: dict[str, Any] = {"policy": policy, "budget": 0.3, "sinks": 2, "recent": 4, "buffer": 64}
    if policy == "retention":
        torch.manual_seed(1)
        options["gates"] = RetentionGates.for_model(model, gate_width=8, initial_bias=2.0)
        with torch.no_grad():
            for parameter in options["gates"].parameters():
                parameter.normal_(std=0.5)
    expected = {}
    with torch.no_grad(), evict(model, **options) as session:
        for doc in documents(False):
            ids = tokenizer(doc["context"] + doc["question"], return_tensors="pt")["input_ids"]
            context = len(tokenizer(doc["context"])["input_ids"])
            for aware in (False, True):
                cache = session.new_cache()
                if not aware:
                    model(ids[:, :context], past_key_values=cache)
                mask = torch.ones_like(ids)
                output = model.generate(
                    ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False, pad_token_id=0
                )
                text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                expected[doc["context"], aware] = text
    subject = lm(model, tokenizer, **options)
    # Both kinds in one call, and the same prompts in both.
    docs = documents(False) + documents(True)
    assert generations(subject, docs) == [expected[doc["context"], doc["aware"]] for doc in docs]
    assert any(expected[doc["context"], False] != expected[doc["context"], True] for doc in docs)
    assert subject.meter.contexts == 8
    forced = lm(model, tokenizer, question="agnostic", **options)
    assert generations(forced, documents(True)) == [expected[doc["context"], False] for doc in documents(True)]
    forced = lm(model, tokenizer, question="aware", **options)
    assert generations(forced, documents(False)) == [expected[doc["context"], True] for doc in documents(False)]


def test_choices_behind_a_compressed_context(model, tokenizer):
    """The question and the choice are read after the compression; the context is read once for all choices."""
    options = {"policy": "snapkv(window=8)", "budget": 0.3, "sinks": 2, "recent": 4, "buffer": 64}
    doc = documents(False)[2]
    prompt, choices = doc["context"] + doc["question"], [" day", " nothing else was", " ship"]
    expected = []
    for choice in choices:
        ids = tokenizer(prompt + choice, return_tensors="pt")["input_ids"]
        start, cut = len(tokenizer(prompt)["input_ids"]), len(tokenizer(doc["context"])["input_ids"])
        with torch.no_grad(), evict(model, **options) as session:
            cache = session.new_cache()
            model(ids[:, :cut], past_key_values=cache)
            logits = model(ids[:, cut:-1], past_key_values=cache).logits[0, start - cut - 1 :]
        expected.append(float(torch.log_softmax(logits, -1).gather(1, ids[0, start:, None]).sum()))
    subject = lm(model, tokenizer, **options)
    found = subject.loglikelihood([instance("loglikelihood", (prompt, choice), doc) for choice in choices])
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-3)
    assert subject.meter.contexts == 1


def test_rows_of_a_batch_are_independent_and_chunks_bound_the_peak(model, tokenizer):
    options = {"policy": "streaming_llm", "budget": 40, "recent": 8, "buffer": 16, "schedule": "bounded"}
    docs = documents(False) + documents(True)
    together, chunked = lm(model, tokenizer, **options), lm(model, tokenizer, prefill_chunk=16, **options)
    alone = model_class()(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    assert generations(together, docs) == generations(alone, docs)
    requests = [instance("loglikelihood", (doc["context"], doc["question"] + " nothing"), {}) for doc in docs[:4]]
    first, second = together.loglikelihood(requests), alone.loglikelihood(requests)
    assert [value for value, _ in first] == pytest.approx([value for value, _ in second], abs=1e-3)
    assert len(generations(chunked, docs)) == len(docs)
    assert chunked.meter.peak_bytes < together.meter.peak_bytes
    assert chunked.meter.contexts == 8 and chunked.meter.entries == 8 * 40 * 6


def test_gates_of_other_weights_are_refused(tiny_model, tokenizer, tmp_path):
    from tenure.retention import CheckpointInfo

    model = tiny_model("llama", vocab_size=512)
    gates = RetentionGates.for_model(model, gate_width=8)
    gates.save_pretrained(tmp_path / "gates", CheckpointInfo.for_model(model))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(ValueError, match="the gates were trained on"):
        lm(model, tokenizer, policy="retention", gates=str(tmp_path / "gates"))


def test_the_command_line_is_lm_evals(folder, tokenizer, texts, tmp_path, capsys, monkeypatch):
    data = tmp_path / "text.txt"
    data.write_text("\n\n".join(texts))
    out = tmp_path / "out"
    code = cli.main([
        "eval", "--model_args", f"pretrained={folder},policy=streaming_llm,budget=0.3,dtype=float32",
        "--tasks", "tenure_niah_single_2,tenure_vt_aware",
        "--metadata", json.dumps({"length": 500, "cases": 2, "texts": str(data)}),
        "--device", "cpu", "--batch_size", "2", "--output_path", str(out), "--log_samples",
    ])  # fmt: skip
    assert code == 0
    assert "tenure_niah_single_2" in capsys.readouterr().out
    (written,) = out.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert set(results["results"]) == {"tenure_niah_single_2", "tenure_vt_aware"}
    assert 0.0 <= results["results"]["tenure_vt_aware"]["accuracy,none"] <= 1.0
    found = results["config"]["tenure"]
    assert found["policy"] == "streaming_llm" and found["contexts"] == 4 and found["bytes"] > 0
    (samples,) = out.rglob("samples_tenure_niah_single_2_*.jsonl")
    doc = json.loads(samples.read_text().splitlines()[0])["doc"]
    assert len(tokenizer(doc["context"], add_special_tokens=False)["input_ids"]) == 500


def test_command_lines_are_completed(tmp_path):
    asked = peek(["--tasks", "tenure_vt,other", "-a", "policy=full", "pretrained=x"])
    assert asked.model_args == {"policy": "full", "pretrained": "x"} and asked.tasks == ["tenure_vt", "other"]
    assert complete(["--tasks", "tenure_vt"], asked)[-4:-1] == ["--model", "tenure", "--include_path"]
    mine = peek(["--model", "hf", "--tasks", "tenure_ruler,other", "--include_path", str(tmp_path)])
    done = complete(["--model", "hf", "--tasks", "tenure_ruler,other", "--include_path", str(tmp_path)], mine)
    files = done[3].split(",")
    assert files[-1] == "other" and len(files) == 14 and all(Path(file).is_file() for file in files[:-1])
    assert done.count("--include_path") == 1
    settings = tmp_path / "run.yaml"
    settings.write_text("model_args: {pretrained: y}\ntasks: [tenure_cwe]\nmodel: tenure\n")
    stored = peek(["--config", str(settings)])
    assert (stored.model, stored.model_args, stored.tasks) == ("tenure", {"pretrained": "y"}, ["tenure_cwe"])
    assert len(task_names()) == 2 * (17 + 2) + 5 + 1 and len(task_files("tenure_memory_aware")) == 4
    assert LmEvalArguments(("a",)).arguments == ("a",)


def test_importing_registers_in_either_order_and_imports_nothing(tmp_path):
    code = (
        "import sys\n"
        "import tenure.eval\n"
        "assert 'lm_eval' not in sys.modules\n"
        "from lm_eval.api.registry import MODEL_REGISTRY\n"
        "assert 'tenure' not in MODEL_REGISTRY, 'not filled yet, and hf must be there when it is'\n"
        "import lm_eval.models\n"
        "assert {'tenure', 'hf'} <= set(MODEL_REGISTRY)\n"
        "assert 'lm_eval.models.huggingface' not in sys.modules\n"
        "tenure.eval.register(); tenure.eval.register()\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__name__ == '_Waiting']\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1500:]
