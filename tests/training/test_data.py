"""User data to examples: tiny files through the real `datasets`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tenure.training.batching import PackedSource
from tenure.training.conversations import encode_messages
from tenure.training.data import DatasetSource, Example, load_examples

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is work?"},
    {"role": "assistant", "content": "Work is time."},
    {"role": "user", "content": "And money?"},
    {"role": "assistant", "content": "Money is work.\nWork is time."},
]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def raw_file(tmp_path: Path, count: int = 12) -> str:
    records = [{"text": f"document {number} " + "work time " * number} for number in range(1, count + 1)]
    return write_jsonl(tmp_path / "raw.jsonl", records)


def targets(example: Example, tokenizer: Any) -> str:
    chosen = [token for token, target in zip(example.input_ids, example.loss_mask, strict=True) if target]
    return tokenizer.decode(chosen)


def test_chat_targets_are_the_assistants_words_and_turn_ends(tmp_path: Path, chat_tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    example = load_examples(path, chat_tokenizer, max_length=200)[0]
    assert example.kind == "chat"
    assert chat_tokenizer.decode(example.input_ids) == chat_tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert targets(example, chat_tokenizer) == "Work is time.<|im_end|>Money is work.\nWork is time.<|im_end|>"
    everything = load_examples(path, chat_tokenizer, max_length=200, loss_on="all")[0]
    assert everything.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


def test_prompt_and_completion_as_strings_and_as_messages(tmp_path: Path, chat_tokenizer: Any) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "What is work?", "completion": "Work is time."}])
    lists = write_jsonl(
        tmp_path / "b.jsonl",
        [{"prompt": [{"role": "user", "content": "What is work?"}],
          "completion": [{"role": "assistant", "content": "Work is time."}]}],
    )  # fmt: skip
    first, second = (load_examples(path, chat_tokenizer, max_length=99, format="chat")[0] for path in (text, lists))
    assert first == second
    assert targets(first, chat_tokenizer) == "Work is time.<|im_end|>"


def test_answer_is_found_after_the_question_it_repeats(chat_tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Say time"}, {"role": "assistant", "content": "time"}]
    ids, mask = encode_messages(messages, chat_tokenizer)
    assert targets(Example(ids, mask, "chat"), chat_tokenizer) == "time<|im_end|>"
    assert mask[-3:] == [True, True, False]


def test_template_that_drops_thoughts(chat_tokenizer: Any) -> None:
    thoughtful = [
        {"role": "user", "content": "What is work?"},
        {"role": "assistant", "content": "<think>hard</think>\nWork is time."},
    ]
    original = chat_tokenizer.chat_template
    shown = "message['content'].split('</think>')[-1].strip()"
    chat_tokenizer.chat_template = original.replace("message['content']", shown)
    try:
        ids, mask = encode_messages(thoughtful, chat_tokenizer)
        chat_tokenizer.chat_template = original.replace("message['content']", "'hidden'")
        with pytest.raises(ValueError, match="does not repeat an assistant's message"):
            encode_messages(thoughtful, chat_tokenizer)
    finally:
        chat_tokenizer.chat_template = original
    assert targets(Example(ids, mask, "chat"), chat_tokenizer) == "Work is time.<|im_end|>"


def test_raw_formats_agree(tmp_path: Path, plain_tokenizer: Any) -> None:
    import pandas

    text = "The startup makes money.\n\nThe founder is happy."
    jsonl = write_jsonl(tmp_path / "x.jsonl", [{"text": text, "other": 1}])
    parquet = tmp_path / "x.parquet"
    pandas.DataFrame({"text": [text]}).to_parquet(parquet)
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "deeper" / "x.txt").write_text(text)
    examples = [load_examples(str(p), plain_tokenizer, max_length=99)[0] for p in (jsonl, parquet, folder)]
    assert plain_tokenizer.decode(examples[0].input_ids) == text
    assert examples[0] == examples[1] == examples[2]
    assert examples[0].loss_mask == [False] + [True] * (len(examples[0].input_ids) - 1)


def test_truncation_and_minimum(tmp_path: Path, plain_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = raw_file(tmp_path)
    every = load_examples(path, plain_tokenizer, max_length=500)
    lengths = sorted(every.epoch_lengths(0))
    cut = load_examples(path, plain_tokenizer, max_length=lengths[6], min_length=lengths[3])
    assert len(every) == 12 and len(cut) == 9
    assert sorted(cut.epoch_lengths(0)) == [*lengths[3:6], *[lengths[6]] * 6]
    assert f"3 of 12 documents left out: shorter than {lengths[3]} tokens" in caplog.text
    assert all(len(cut[i].input_ids) == len(cut[i].loss_mask) == cut.epoch_lengths(0)[i] for i in range(9))


def test_documents_cut_before_any_answer_are_left_out(tmp_path: Path, chat_tokenizer: Any) -> None:
    long = {"prompt": "work " * 60, "completion": "time"}
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "work?", "completion": "time"}, long])
    assert len(load_examples(path, chat_tokenizer, max_length=40)) == 1
    only = write_jsonl(tmp_path / "y.jsonl", [long])
    with pytest.raises(ValueError, match=r"none of the 1 documents .* and a token to predict \(loss_on='completion'"):
        load_examples(only, chat_tokenizer, max_length=40)


def test_order_is_a_new_permutation_every_epoch_and_depends_on_seed_only(tmp_path: Path, plain_tokenizer: Any) -> None:
    path = raw_file(tmp_path)
    source = load_examples(path, plain_tokenizer, max_length=500, seed=3)
    epochs = [[tuple(source[12 * epoch + place].input_ids) for place in range(12)] for epoch in range(3)]
    assert len({frozenset(epoch) for epoch in epochs}) == 1 and len(set(epochs[0])) == 12
    assert epochs[0] != epochs[1] != epochs[2]
    again = load_examples(path, plain_tokenizer, max_length=500, seed=3)
    assert [tuple(again[index].input_ids) for index in (30, 5, 17)] == [epochs[2][6], epochs[0][5], epochs[1][5]]
    other = load_examples(path, plain_tokenizer, max_length=500, seed=4)
    assert [tuple(other[place].input_ids) for place in range(12)] != epochs[0]


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"body": "x", "title": "y"}], {}, "has the columns body, title; needed: messages, or prompt and completion"),
        ([{"body": "x"}], {"format": "raw"}, "format='raw' needs a column text; .* has the columns body"),
        ([{"text": "x"}], {"format": "chat"}, "format='chat' needs a column messages, .* has the columns text"),
        ([{"text": "x"}], {"format": "csv"}, "format must be auto, chat or raw, got 'csv'"),
        ([{"text": "work time"}], {"min_length": 50}, "none of the 1 documents of .* has 50 tokens or more"),
        ([{"text": "work"}], {"max_length": 5, "min_length": 9}, "2 <= min_length <= max_length"),
        ([], {}, "holds no records"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(
    tmp_path: Path, chat_tokenizer: Any, records: list[dict[str, str]], options: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", records)
    with pytest.raises(ValueError, match=message):
        load_examples(path, chat_tokenizer, **{"max_length": 100, **options})


def test_what_is_wrong_with_the_place_is_said(tmp_path: Path, chat_tokenizer: Any, plain_tokenizer: Any) -> None:
    (tmp_path / "x.docx").write_text("work")
    for place in (tmp_path / "x.docx", tmp_path):
        with pytest.raises(ValueError, match=r"holds \.docx; accepted: files of one kind out of \.jsonl"):
            load_examples(str(place), chat_tokenizer, max_length=100)
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_examples(str(tmp_path / "absent.jsonl"), chat_tokenizer, max_length=100)
    with pytest.raises(ValueError, match="no file matches"):
        load_examples(str(tmp_path / "*.jsonl"), chat_tokenizer, max_length=100)
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CONVERSATION}])
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        load_examples(path, plain_tokenizer, max_length=100)


def test_unreachable_hub_id_is_one_sentence(chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str, config: str | None, split: str, streaming: bool) -> None:
        raise ConnectionError(f"no network for {name} {config} {split}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot load split 'validation' of 'owner/name:en' .*no network"):
        load_examples("owner/name:en", chat_tokenizer, max_length=100, split="validation")


def test_packing_over_a_data_set(tmp_path: Path, plain_tokenizer: Any) -> None:
    source = load_examples(raw_file(tmp_path, 40), plain_tokenizer, max_length=200)
    assert isinstance(source, DatasetSource)
    packed = PackedSource(source, 200)
    rows = [packed[row] for row in range(packed.rows(0))]
    assert sum(len(row.input_ids) for row in rows) == sum(source.epoch_lengths(0))
    assert all(len(row.input_ids) <= 200 for row in rows) and len(rows) < 40
    assert packed.rows(0) + packed.rows(1) > 0 and packed[packed.rows(0)] != packed[0]
