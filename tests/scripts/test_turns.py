"""`tenure turns` from end to end on a tiny model, and one sentence for what cannot work."""

from __future__ import annotations

import json

import pytest

from tenure.scripts import cli
from tenure.scripts.turns import TurnsConfig

from .test_demo import TEXT, tokenizer  # noqa: F401  # a fixture

KV = {"context": '{"a1": "b2"}', "multi_turns": [{"input": 'Key: "a1"', "answer": "b2"}] * 3}


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):  # noqa: F811
    model = tiny_model("llama", vocab_size=512, max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def run(folder, *arguments):
    given = ["--model", str(folder / "model"), "--texts", str(folder / "text.txt"), "--out", str(folder / "out")]
    return cli.main(["turns", *arguments, *given, "--device", "cpu"])


@pytest.mark.parametrize(("source", "turns"), [("kv", 2), ("album", 2), ("sessions", 1)])
def test_generated_conversations_are_run_and_written(folder, capsys, source, turns):
    arguments = ("--policies", "full", "keydiff", "--budgets", "0.5", "--length", "900", "--turns", "2")
    assert run(folder, source, *arguments, "--conversations", "2") == 0
    assert "2 conversations" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "out" / "turns.jsonl").read_text().splitlines()]
    assert [(row["policy"], row["turn"]) for row in rows[: 2 * turns]] == [
        (policy, turn) for policy in ("full", "keydiff") for turn in range(turns)
    ]
    assert all(row["kept_share"] == 1.0 for row in rows if row["policy"] == "full")
    settings = json.loads((folder / "out" / "settings.json").read_text())
    own = source == "album"
    assert settings["protocol"] == {
        "questions": "turns", "history": "own" if own else "gold", "compress": "each" if own else "once",
    }  # fmt: skip
    if own:
        assert rows[1]["kept_share"] == 1.0 and 0.4 < rows[3]["kept_share"] < 0.51, "each end of a turn compresses"


def test_a_released_file_is_run_and_its_answers_are_written_for_its_judge(folder):
    (folder / "scbench_kv.jsonl").write_text((json.dumps(KV) + "\n") * 3)
    arguments = ("--policies", "full", "--conversations", "2", "--turns", "2", "--questions", "shared")
    assert run(folder, str(folder / "scbench_kv.jsonl"), *arguments) == 0
    lines = [json.loads(line) for line in (folder / "out" / "hypotheses-0.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == ["scbench_kv/0"] * 2 + ["scbench_kv/1"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("books",), "got 'books'; accepted: kv, sessions, album, or a file"),
        (("kv", "--questions", "shared", "--compress", "each"), "questions='shared' have no history"),
        (("kv", "--policies", "snapkv:rows"), "unknown scope 'rows'"),
        (
            ("kv", "--policies", "full", "--length", "4000"),
            "contexts of 4000 tokens and 512 for the question exceed the model's 2048",
        ),
    ],
)
def test_mistakes_are_named_before_the_model_is_loaded(folder, arguments, message, capsys):
    assert run(folder, *arguments) != 0
    assert message in capsys.readouterr().err


def test_numbers_are_checked():
    with pytest.raises(ValueError, match="--turns, --conversations and --length take 1 or more"):
        TurnsConfig("kv", turns=0)
