"""`tenure preview` and the mixtures of `tenure train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tenure.scripts.preview import main, marked
from tenure.scripts.train_gates import build_source, parse_mixture
from tenure.training import Example, TrainConfig
from tenure.training.data import MixtureSource


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_tokenizer: Any) -> Path:
    """A tokenizer's folder, a chat and prose."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    chat_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    chat = [{"messages": [{"role": "user", "content": "work?"}, {"role": "assistant", "content": f"time {number}"}]}
            for number in range(20)]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text("The founder makes money. " * 100)
    return tmp_path


def test_a_previewed_mixture(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = TrainConfig(
        model=str(folder / "model"), mixture=(f"3:{folder}/chat.jsonl", f"1:{folder}/prose"), lengths=(64,), pack=True,
        overlong="windows", held_out=1, eval_every=1,
    )  # fmt: skip
    assert main(config) == 0
    out = capsys.readouterr().out
    assert f"{folder}/chat.jsonl: examples, tokens an epoch" in out and "19, " in out
    assert "packed rows an epoch, their fill" in out and "held-out examples" in out
    assert "example 0: " in out and "record " in out and "⸻" in out


def test_targets_are_marked(chat_tokenizer: Any) -> None:
    ids = chat_tokenizer("work time money", add_special_tokens=False)["input_ids"]
    text = marked(Example(ids, [False, True, *[False] * (len(ids) - 2)], "raw"), chat_tokenizer)
    assert text.plain == chat_tokenizer.decode(ids)
    (span,) = [span for span in text.spans if "green" in str(span.style)]
    assert text.plain[span.start : span.end] == chat_tokenizer.decode(ids[1:2])
    assert "more tokens" in marked(Example(ids, [False] * len(ids), "raw"), chat_tokenizer, tokens=2).plain


def test_mixtures_are_built_and_wrong_ones_named(folder: Path, chat_tokenizer: Any) -> None:
    config = TrainConfig(mixture=(f"1:{folder}/chat.jsonl", f"1:{folder}/prose"), lengths=(64,))
    source, held_out = build_source(config, chat_tokenizer)
    assert isinstance(source, MixtureSource) and not held_out
    assert {source[index].kind for index in range(20)} == {"chat", "raw"}
    for entry in ("chat.jsonl", "0:chat.jsonl", "x:chat.jsonl", "nan:a", "1:"):
        with pytest.raises(ValueError, match="accepted: WEIGHT:DATA"):
            parse_mixture([entry])
    with pytest.raises(ValueError, match=r"got a\.txt twice"):
        parse_mixture(["1:a.txt", "2:a.txt"])
    with pytest.raises(ValueError, match="got data x and a mixture; accepted: one of them"):
        TrainConfig(data="x", mixture=("1:a",))
    with pytest.raises(ValueError, match="an eval_every above 0 with held_out"):
        TrainConfig(data="x", held_out=1)


def test_a_chat_template_of_ones_own(folder: Path, chat_tokenizer: Any, caplog: Any) -> None:
    """One that shows tools and their calls, for a tokenizer whose own does not."""
    call = {"function": {"name": "search", "arguments": "{}"}}
    record = {"messages": [{"role": "user", "content": "work?"}, {"role": "assistant", "tool_calls": [call]}],
              "tools": [{"function": {"name": "search"}}]}  # fmt: skip
    (folder / "agent.jsonl").write_text(json.dumps(record) + "\n")
    template = folder / "template.jinja"
    template.write_text(
        "{{ tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    own = chat_tokenizer.chat_template
    config = TrainConfig(data=f"{folder}/agent.jsonl", lengths=(512,))
    try:
        with pytest.raises(ValueError, match="record 1: the chat template leaves out an assistant's tool calls"):
            build_source(config, chat_tokenizer)
        assert "has a column tools, which the chat template does not show" in caplog.text
        example = build_source(replace(config, chat_template=str(template)), chat_tokenizer)[0][0]
        said = [token for token, target in zip(example.input_ids, example.loss_mask, strict=True) if target]
        assert "search" in chat_tokenizer.decode(said)
        with pytest.raises(ValueError, match="no chat template at 'nowhere'"):
            build_source(replace(config, chat_template="nowhere"), chat_tokenizer)
    finally:
        chat_tokenizer.chat_template = own


@pytest.mark.parametrize("pack", [False, True])
def test_concatenated_data_sets_are_one(folder: Path, chat_tokenizer: Any, pack: bool) -> None:
    names = (f"{folder}/chat.jsonl", f"{folder}/prose")
    config = TrainConfig(concatenate=names, lengths=(64,), overlong="windows", pack=pack)
    source: Any = build_source(config, chat_tokenizer)[0]
    inner = source.source if pack else source
    alone = [build_source(TrainConfig(data=name, lengths=(64,), overlong="windows"), chat_tokenizer)[0]
             for name in names]  # fmt: skip
    count = sum(len(one) for one in alone)  # type: ignore[arg-type]
    assert len(inner) == count > 20
    for epoch in range(2):
        numbers = range(epoch * count, (epoch + 1) * count)
        found = sorted((inner.name(number), inner[number].input_ids) for number in numbers)
        assert found == sorted((one.name(n), one[n].input_ids) for one in alone for n in range(len(one)))  # type: ignore
        assert inner.epoch_lengths(epoch) == [len(inner[number].input_ids) for number in numbers]
    assert [inner.name(n) for n in range(count)] != [inner.name(n) for n in range(count, 2 * count)]
    if pack:
        assert max(len(source[row].input_ids) for row in range(source.rows(0))) <= 64
    with pytest.raises(ValueError, match="accepted: different data sets, without synthetic"):
        build_source(TrainConfig(concatenate=("synthetic", "a")), chat_tokenizer)
    with pytest.raises(ValueError, match="got a mixture and data sets to concatenate"):
        TrainConfig(concatenate=("a",), mixture=("1:a",))
