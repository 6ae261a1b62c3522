"""lmms-eval's model type: without eviction its answers are transformers' own; budgets, counts and refusals."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tenure.eval.harness import lmms_model
from tenure.eval.harness.lmms_model import EvictingChat
from tenure.eval.tasks.drawings import draw
from tenure.scripts.soak.tiny_served import IMAGE_TOKENS, image_processor

from ..tiny_vision import save_with_gates, tiny_model

SETTINGS = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lmms")
    save_with_gates(root)
    return root


def chat(folder: Path, **options: Any) -> EvictingChat:
    return EvictingChat(pretrained=str(folder / "model"), device="cpu", batch_size=1, **options)


def messages(question: str = "Which colour?") -> list[dict[str, Any]]:
    image = draw(random.Random(3)).image
    before = [{"type": "text", "text": "A picture. " * 6}, {"type": "image", "url": image}]
    return [{"role": "user", "content": [*before, {"type": "text", "text": question}]}]


def plainly(folder: Path) -> str:
    processor, model = image_processor(), tiny_model(image_processor())
    image = messages()[0]["content"][1]["url"]
    parts = [{"type": "text", "text": "A picture. " * 6}, {"type": "image"}, {"type": "text", "text": "Which colour?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[image]], return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("question", ["aware", "agnostic"])
def test_answers_without_eviction_are_the_models_own(folder: Path, question: str) -> None:
    """Through the requests that lmms-eval makes."""
    model = chat(folder, policy="knorm", budget=1.0, question=question)
    model.task_dict = {"colours": {"test": [{"asked": "Which colour?"}]}}  # type: ignore[attr-defined]
    made = lambda doc: messages(doc["asked"])  # noqa: E731
    request = SimpleNamespace(args=("", made, SETTINGS, 0, "colours", "test"))
    assert model.generate_until([request, request]) == [plainly(folder).partition("\n\n")[0]] * 2
    measured = model.measured
    assert measured["contexts"] == 2 and measured["kept_share"] == measured["kept_share/image"] == 1.0


@pytest.mark.parametrize("question", ["aware", "agnostic"])
@torch.no_grad()
def test_a_budget_counts_text_and_images(folder: Path, question: str) -> None:
    options = {"policy": "retention", "gates": str(folder / "gates"), "budget": 0.3, "sinks": 0, "recent": 2}
    model = chat(folder, question=question, **options)
    model.answer(messages(), SETTINGS)
    measured = model.measured
    assert measured["contexts"] == 1 and measured["kept_share"] == pytest.approx(0.3, abs=0.03)
    kept, full = model.kept["image"]
    assert full == IMAGE_TOKENS * 3 * 2 and 0 <= kept <= full
    assert model.kept["text"][1] + full == round(measured["context_tokens"] * 3 * 2)
    asked = len(model.processor.tokenizer("Which colour?")["input_ids"])
    if question == "aware":
        assert model.meter.tokens > chat_context(model) + asked
    else:
        assert model.meter.tokens == chat_context(model)
    text = [{"role": "user", "content": [{"type": "text", "text": "No picture at all, but words. " * 4}]}]
    model.answer(text, SETTINGS)
    assert model.meter.contexts == 2 and model.kept["image"] == (kept, full)


def chat_context(model: EvictingChat) -> int:
    """Tokens before the question."""
    from tenure.eval.image_prompts import image_prompt

    parts = ["A picture. " * 6, messages()[0]["content"][1]["url"]]
    return len(image_prompt(model.processor, parts, "Which colour?").context_ids)


def test_answers_end_where_the_task_says(folder: Path) -> None:
    model = chat(folder, policy="full")
    whole = model.answer(messages(), {"max_new_tokens": 6})
    assert len(whole) > 2
    stop = whole[len(whole) // 2]
    assert model.answer(messages(), {"max_new_tokens": 6, "until": stop}) == whole.partition(stop)[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policy": "knorm", "batch_size": 4}, "got batch_size 4; accepted: 1"),
        ({"polcy": "knorm"}, "no option 'polcy'; 'policy' is one"),
        ({"policy": "knorm", "max_num_frames": 8}, "no option 'max_num_frames'; accepted: pretrained, device, dtype"),
        ({"policy": "retention"}, "policy 'retention' needs gates: add gates=FOLDER to --model_args"),
        ({"policy": "knorm", "question": "agnostic", "question_field": "x"}, "accepted here: question=agnostic alone"),
        ({"policy": "knorm", "dtype": "int4"}, "dtype is 'int4'; auto, float32, bfloat16"),
    ],
)
def test_what_is_refused(folder: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EvictingChat(str(folder / "model"), **options)


def test_parts_and_tasks_that_are_not_answered(folder: Path) -> None:
    model = chat(folder, policy="full")
    with pytest.raises(ValueError, match="got a part of type 'video'; accepted: text and image"):
        model.answer([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], SETTINGS)
    with pytest.raises(NotImplementedError, match="tasks of lmms-eval that generate, not 'loglikelihood'"):
        model.loglikelihood([])


def test_lmms_eval_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api", None)
    lmms_model.model_class.cache_clear()
    with pytest.raises(ImportError, match="the model type 'tenure' needs lmms-eval: pip install lmms-eval"):
        _ = lmms_model.TenureChat


def test_lmms_eval_finds_the_model_type() -> None:
    """Where lmms-eval is installed, beside the package's own entry point."""
    pytest.importorskip("lmms_eval.models", reason="lmms-eval is not installed")
    lmms_model.model_class.cache_clear()
    found: Any = lmms_model.manifest()
    assert found.model_id == "tenure" and found.chat_class_path == "tenure.eval.harness.lmms_model.TenureChat"
    assert issubclass(lmms_model.TenureChat, EvictingChat) and not lmms_model.TenureChat.is_simple
