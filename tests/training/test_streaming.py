"""Streamed data: the examples of a read data set, by number, without a copy on the disk."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tenure.scripts.train_gates import build_source
from tenure.training import TrainConfig
from tenure.training.data import load_examples
from tenure.training.streaming import StreamedSource, stream_examples

TEXTS = [f"document {number} " + "work time " * (number % 7) for number in range(1, 31)]
LONGEST = 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def lines(path: Path, records: list[Any]) -> str:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])


def ids(source: Any, numbers: Any) -> list[list[int]]:
    return [source[number].input_ids for number in numbers]


def test_an_epoch_has_the_examples_of_the_whole_data_set(tmp_path: Path, data: str, plain_tokenizer: Any) -> None:
    import pandas
    from datasets import Dataset

    frame = pandas.DataFrame({"text": TEXTS})
    frame.to_parquet(tmp_path / "b.parquet")
    frame.to_csv(tmp_path / "c.csv", index=False)
    Dataset.from_pandas(frame).save_to_disk(tmp_path / "saved")
    lines(tmp_path / "d.jsonl.gz", [{"text": text} for text in TEXTS])
    (tmp_path / "e.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    (tmp_path / "prose").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "prose" / f"{number:02d}.txt").write_text(text)
    whole = load_examples(data, plain_tokenizer, max_length=LONGEST)
    expected = sorted(ids(whole, range(len(whole))))
    for name in (data, "b.parquet", "c.csv", "d.jsonl.gz", "e.json", "prose", "saved"):
        stream = stream_examples(str(tmp_path / name), plain_tokenizer, max_length=LONGEST, buffer=7)
        for epoch in range(2):
            numbers = range(epoch * len(TEXTS), (epoch + 1) * len(TEXTS))
            assert sorted(ids(stream, numbers)) == expected, name


def test_an_example_depends_on_its_number_alone(data: str, plain_tokenizer: Any) -> None:
    def fresh(**values: Any) -> StreamedSource:
        return stream_examples(data, plain_tokenizer, max_length=LONGEST, **{"buffer": 8, **values})

    stream = fresh()
    expected = ids(stream, range(100))
    assert fresh()[77].input_ids == expected[77]  # as a resumed run asks
    assert ids(stream, (99, 3, 50, 0)) == [expected[place] for place in (99, 3, 50, 0)]  # back, and on again
    assert stream.digest() == fresh().digest() != fresh(seed=1).digest()
    assert expected != ids(fresh(seed=1), range(100))
    numbers = [int(stream.name(place).rpartition(" ")[2]) for place in range(8)]
    assert sorted(numbers) == list(range(1, 9)) != numbers  # the data's order, shuffled within a block
    for number, place in zip(numbers, range(8), strict=True):
        assert plain_tokenizer.decode(stream[place].input_ids) == TEXTS[number - 1]


def test_data_is_read_as_it_is_needed_and_copied_nowhere(tmp_path: Path, cache: Path, plain_tokenizer: Any) -> None:
    """100 MB of records in a small file, whose end is damaged: its first examples come all the same."""
    record = json.dumps({"text": "work time " * 1000}).encode() + b"\n"
    packed = gzip.compress(record * 10_000, 1)
    path = tmp_path / "large.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    before = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    stream = stream_examples(str(path), plain_tokenizer, max_length=64, buffer=16)
    assert [len(one) for one in ids(stream, range(64))] == [64] * 64
    after = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert after - before < 100_000 < len(record) * 10_000 // 100
    assert not list(cache.rglob("*.arrow"))


def test_packed_rows_hold_every_document_of_their_block(data: str, plain_tokenizer: Any) -> None:
    plain = stream_examples(data, plain_tokenizer, max_length=LONGEST, buffer=10)
    packed = stream_examples(data, plain_tokenizer, max_length=LONGEST, buffer=10, pack=True)
    found: Counter[str] = Counter()
    number = 0
    while sum(found.values()) < 30:
        row = packed[number]
        assert len(row.input_ids) <= LONGEST and row.position_ids is not None
        starts = [place for place, position in enumerate(row.position_ids) if position == 0]
        parts = [row.input_ids[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert packed.name(number).count("record") == len(parts)
        found.update(plain_tokenizer.decode(part) for part in parts)
        number += 1
    assert number < 20 and found == Counter(plain_tokenizer.decode(one) for one in ids(plain, range(30)))


def test_held_out_records_are_in_no_epoch(data: str, plain_tokenizer: Any) -> None:
    stream, held = stream_examples(data, plain_tokenizer, max_length=LONGEST, buffer=8).held_out(3)
    assert [plain_tokenizer.decode(one.input_ids) for one in held] == TEXTS[:3]
    names = [stream.name(place) for place in range(54)]
    assert sorted(names[:27]) == sorted(names[27:]) and not {f"{data} record {n}" for n in (1, 2, 3)} & set(names)
    with pytest.raises(ValueError, match="got held_out 31 of the 30 examples of"):
        stream_examples(data, plain_tokenizer, max_length=LONGEST).held_out(31)


def test_faulty_records_end_the_reading_when_they_are_too_many(tmp_path: Path, plain_tokenizer: Any, caplog) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": TEXTS[0]}, "{broken", {"text": TEXTS[1]}, {"text": 3}])
    with pytest.raises(ValueError, match=r"a\.jsonl: record 2: it is not JSON: .*; accepted: up to bad_records"):
        stream_examples(path, plain_tokenizer, max_length=LONGEST)[0]
    stream = stream_examples(path, plain_tokenizer, max_length=LONGEST, bad_records=2, buffer=2)
    assert len(ids(stream, range(6))) == 6  # three epochs, whose faults are the same two
    assert caplog.text.count("left out") == 2
    with pytest.raises(ValueError, match="has no document of 39 tokens or more with a token to predict"):
        stream_examples(path, plain_tokenizer, max_length=LONGEST, min_length=39, bad_records=2)[0]


def test_a_damaged_file_is_one_sentence(tmp_path: Path, plain_tokenizer: Any) -> None:
    path = lines(tmp_path / "a.jsonl.gz", [{"text": f"{number} {number * 7919 % 1000}"} for number in range(2000)])
    Path(path).write_bytes(Path(path).read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz cannot be read beyond record \d+: EOFError"):
        stream_examples(path, plain_tokenizer, max_length=LONGEST, buffer=64)[2000]


def test_mixtures_are_streamed_and_wrong_settings_named(data: str, tmp_path: Path, plain_tokenizer: Any) -> None:
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text(TEXTS[5] * 50)
    entries = (f"3:{data}", f"1:{tmp_path}/prose")
    config = TrainConfig(mixture=entries, lengths=(64,), stream=True, overlong="windows", held_out=1, eval_every=1)
    source, held_out = build_source(config, plain_tokenizer)
    assert len(held_out) == 2 and all(source[place].kind == "raw" for place in range(40))
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"concatenate": ("a", "b")}, "got stream with concatenate; accepted: one of them"),
        ({"data": "a", "images": True}, "got stream with images"),
        ({"data": "a", "data_workers": 2}, "got stream and data_workers 2; accepted: 1"),
        ({}, "got stream with synthetic documents"),
    )
    for values, message in refused:
        with pytest.raises(ValueError, match=message):
            TrainConfig(stream=True, **values)
