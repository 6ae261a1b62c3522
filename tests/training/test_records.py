"""Data as users bring it: formats, splits, cloned and saved data sets, faulty records, windows, mixtures."""

from __future__ import annotations

import bz2
import gzip
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tenure.training.data import MixtureSource, load_examples
from tenure.training.digests import data_digest
from tenure.training.records import RecordError, load_records, plain_record

TEXTS = [f"document {number} " + "work time " * number for number in range(1, 6)]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def lines(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return str(path)


def decoded(source: Any, tokenizer: Any) -> list[str]:
    return sorted(tokenizer.decode(source[place].input_ids) for place in range(len(source)))


def test_every_format_gives_the_same_examples(tmp_path: Path, plain_tokenizer: Any) -> None:
    import pandas
    import zstandard
    from datasets import Dataset, DatasetDict

    records = [{"text": text} for text in TEXTS]
    jsonl = "".join(json.dumps(record) + "\n" for record in records).encode()
    lines(tmp_path / "a.jsonl", records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl))
    frame = pandas.DataFrame({"text": TEXTS})
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_csv(tmp_path / "d.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "e.parquet")
    Dataset.from_pandas(frame).save_to_disk(tmp_path / "saved")
    DatasetDict({"train": Dataset.from_pandas(frame)}).save_to_disk(tmp_path / "both")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for number in range(2):
        lines(tmp_path / "parts" / f"{number}.jsonl", records[number::2])
    repository = tmp_path / "cloned"
    lines(repository / "data" / "train-00000.jsonl", records)
    lines(repository / "data" / "test-00000.jsonl", [{"text": "secret"}])
    (repository / "README.md").write_text("# A data set")
    (repository / ".git").mkdir()
    (repository / ".git" / "HEAD").write_text("ref")
    names = ["a.jsonl", "a.json", "b.jsonl.gz", "c.jsonl.zst", "d.csv", "d.tsv", "e.parquet", "saved", "both", "parts",
             "parts/*.jsonl", "cloned", str(arrow)]  # fmt: skip
    for name in names:
        source = load_examples(str(tmp_path / name), plain_tokenizer, max_length=99)
        assert decoded(source, plain_tokenizer) == sorted(TEXTS), name


def test_splits_of_folders(tmp_path: Path, plain_tokenizer: Any) -> None:
    tmp_path /= "data"
    for name in ("train", "test", "dev"):
        lines(tmp_path / name / "part.jsonl", [{"text": f"{name} work"}])
    for split, text in (("train", "train"), ("test", "test"), ("validation", "dev"), ("dev", "dev")):
        source = load_examples(str(tmp_path), plain_tokenizer, max_length=99, split=split)
        assert decoded(source, plain_tokenizer) == [f"{text} work"]
    with pytest.raises(ValueError, match="holds the splits test, train, validation; got split 'other'"):
        load_examples(str(tmp_path), plain_tokenizer, max_length=99, split="other")
    with pytest.raises(ValueError, match="holds no files named after splits; got split 'test'"):
        load_examples(str(tmp_path / "dev"), plain_tokenizer, max_length=99, split="test")


def test_faulty_records_are_named_or_counted(tmp_path: Path, chat_tokenizer: Any, caplog: Any) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "work"}]}
    path = lines(tmp_path / "x.jsonl", [good, "{broken", {"messages": None}, "[1]", good])
    with pytest.raises(ValueError, match=r"3 records of .*x\.jsonl cannot be used, the first is record 2: it is"):
        load_examples(path, chat_tokenizer, max_length=99)
    source = load_examples(path, chat_tokenizer, max_length=99, bad_records=3)
    assert len(source) == 2 and source.name(0).startswith(f"{path} record ")
    assert "record 3 left out: it has no messages (null or empty)" in caplog.text
    assert "record 4 left out: it is a list, not a JSON object" in caplog.text


def test_columns_are_mapped_and_sharegpt_is_read(tmp_path: Path, chat_tokenizer: Any) -> None:
    turns = [{"from": "human", "value": "What is work?"}, {"from": "gpt", "value": "Time."}]
    messages = [{"role": "user", "content": "What is work?"}, {"role": "assistant", "content": "Time."}]
    shared = lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    named = lines(tmp_path / "b.jsonl", [{"dialog": messages}])
    first = load_examples(shared, chat_tokenizer, max_length=99)[0]
    assert first == load_examples(named, chat_tokenizer, max_length=99, columns=["messages=dialog"])[0]
    with pytest.raises(ValueError, match="got 'messages' as a column; accepted: NAME=COLUMN"):
        load_examples(named, chat_tokenizer, max_length=99, columns=["messages"])


def test_arrows_nulls_are_not_a_message_s(tmp_path: Path, chat_tokenizer: Any) -> None:
    row = {"messages": [{"role": "user", "content": "a", "tool_calls": None}], "tools": None}
    assert plain_record(row, {}) == {"messages": [{"role": "user", "content": "a"}], "tools": None}
    with pytest.raises(RecordError, match="it is not JSON"):
        plain_record({"line": "x"}, {})


def test_long_texts_are_cut_and_counted_or_become_windows(tmp_path: Path, plain_tokenizer: Any, caplog: Any) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": "work time " * 100}])
    every = load_examples(path, plain_tokenizer, max_length=5000)[0].input_ids
    cut = load_examples(path, plain_tokenizer, max_length=64)
    assert cut[0].input_ids == every[:64]
    assert f"1 of 1 documents are longer than 64 tokens and are cut: {len(every) - 64} tokens lost" in caplog.text
    windows = load_examples(path, plain_tokenizer, max_length=64, overlong="windows")
    rows = [windows[place].input_ids for place in range(len(windows))]
    assert sorted(rows) == sorted(every[start : start + 64] for start in range(0, len(every), 64))
    assert all(not windows[place].loss_mask[0] for place in range(len(windows)))
    with pytest.raises(ValueError, match="none of the 1 documents"):
        load_examples(path, plain_tokenizer, max_length=64, overlong="drop")


def test_digests_see_the_content_and_nothing_else(tmp_path: Path, plain_tokenizer: Any) -> None:
    records = [{"text": text} for text in TEXTS]
    first = load_examples(lines(tmp_path / "a.jsonl", records), plain_tokenizer, max_length=99)
    again = load_examples(lines(tmp_path / "b.jsonl", records), plain_tokenizer, max_length=99, seed=3)
    assert first.digest() == again.digest() == data_digest(first)
    changed = [*records[:3], {"text": TEXTS[3].replace("4", "5")}, records[4]]
    other = load_examples(lines(tmp_path / "c.jsonl", changed), plain_tokenizer, max_length=99)
    assert other.digest() != first.digest()


def test_held_out_examples_are_not_trained_on(tmp_path: Path, plain_tokenizer: Any) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    source = load_examples(path, plain_tokenizer, max_length=99)
    rest, held = source.held_out(2)
    assert len(rest) == 3 and len(held) == 2
    found = decoded(rest, plain_tokenizer) + [plain_tokenizer.decode(one.input_ids) for one in held]
    assert sorted(found) == sorted(TEXTS)
    with pytest.raises(ValueError, match="got held_out 5 of the 5 examples"):
        source.held_out(5)


def test_a_mixture_holds_its_shares_and_loses_no_example(tmp_path: Path, plain_tokenizer: Any) -> None:
    small = load_examples(lines(tmp_path / "a.jsonl", [{"text": "a work"}]), plain_tokenizer, max_length=99)
    large = load_examples(
        lines(tmp_path / "b.jsonl", [{"text": f"b {number}"} for number in range(300)]), plain_tokenizer, max_length=99
    )
    source = MixtureSource({"a": small, "b": large}, {"a": 1.0, "b": 3.0}, seed=1)
    names = [source.name(index).split("/")[-1].split(" ")[0] for index in range(1024)]
    assert Counter(names) == {"a.jsonl": 256, "b.jsonl": 768}
    assert 50 < Counter(names[:256])["a.jsonl"] < 80
    read = [tuple(source[index].input_ids) for index in range(1024) if names[index] == "b.jsonl"]
    assert len(set(read[:300])) == 300 and len(set(read[300:600])) == 300  # epochs of their own
    again = MixtureSource({"a": small, "b": large}, {"a": 1.0, "b": 3.0}, seed=1)
    assert [again[index] for index in (2000, 3)] == [source[index] for index in (2000, 3)]
    assert source.digest() == again.digest() != MixtureSource({"a": small, "b": large}, {"a": 1.0, "b": 1.0}).digest()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 broken PAR1", "cannot be read as parquet: "),
        ("a.arrow", b"ARROW1 broken", "cannot be read as arrow: "),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd broken", "cannot be read as text: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}', mtime=0)[:-5], "cannot be read as text: "),
        ("a.jsonl", b'{"text": "\xff"}\n', "cannot be read as text: "),
        ("saved/dataset_info.json", b"{}", "the saved data set .* cannot be used: "),
    ],
)
def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_records(str(tmp_path / name.partition("/")[0]), "train")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 600


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.bz2"])
def test_a_compressed_file_that_holds_far_more_than_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tenure.training.records.FREE_EXPANSION", 2 << 20)
    packer = bz2 if name.endswith("bz2") else gzip
    for size, refused in (((1 << 20), False), ((5 << 20), True)):
        (tmp_path / name).write_bytes(packer.compress(b'text\n["' + b"x" * size + b'"]\n'))
        said = pytest.raises(ValueError, match=r"holds more than 2 MiB in .* accepted: up to 2 MiB or 200 times")
        with said if refused else nullcontext():
            load_records(str(tmp_path / name), "train")
