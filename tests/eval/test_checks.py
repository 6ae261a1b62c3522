"""Refusals of `tenure eval` and its model: one sentence each, before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from tenure.eval.harness.command import check, peek
from tenure.eval.harness.generated_tasks import kinds_of
from tenure.eval.harness.model import model_class
from tenure.retention import RetentionGates
from tenure.scripts import cli

from .harness_tools import instance, write_tasks


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_what_cannot_work_is_told_before_the_model_is_loaded(folder, tmp_path, model):
    for weights in Path(folder).glob("*.safetensors"):
        weights.unlink()  # a load would fail otherwise
    other = RetentionGates.for_model(model, gate_width=8)
    other.save_pretrained(tmp_path / "gates")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"policy": "snapkw"}, "unknown policy 'snapkw'; known: "),
        ({"policy": "snapkv", "budget": 1.5}, r"budget 1\.5 is out of range: give a float in \(0, 1\]"),
        ({"policy": "snapkv", "scope": "heads"}, "unknown scope 'heads'; known: "),
        ({"policy": "snapkv", "prefill_chunk": 0}, "got 0 as prefill_chunk; accepted: a whole number"),
        ({"policy": "snapkv", "question": "late"}, "got 'late' as question; accepted: auto, agnostic, aware"),
        ({"policy": "snapkv", "question": "agnostic", "question_pattern": "("}, "is no regular expression"),
        ({"policy": "snapkv", "question_pattern": "a", "question_field": "b"}, "exclude each other"),
        ({"policy": "snapkv", "max_length": 5000}, "max_length is 5000; the model has 1024 positions"),
        ({"policy": "snapkv", "max_length": "long"}, "max_length is 'long'; a number of tokens is accepted"),
        ({"policy": "snapkv", "question_field": "b"}, "question_field is used with question=agnostic only"),
        ({"policy": "snapkv", "question": "aware", "question_pattern": "b"}, "question_pattern is used with"),
        ({"policy": "snapkv", "sinks": "few"}, "got 'few' as sinks; accepted: a whole number"),
        ({"policy": "snapkv", "prefill_chunk": 0.5}, r"got 0\.5 as prefill_chunk; accepted: a whole number"),
        ({"policy": "snapkv", "floor": "low"}, "got 'low' as floor; accepted: a number or nothing"),
        ({"policy": 7}, "got 7 as policy; accepted: text or a Policy"),
        ({"policy": "snapkv", "dtype": "int8"}, "dtype is 'int8'; auto, float32, bfloat16"),
        ({"policy": "snapkv", "dtype": "floats"}, "dtype is 'floats'; auto, float32, bfloat16"),
        ({"polcy": "snapkv"}, "no option 'polcy'; 'policy' is one"),
        ({"policy": "retention", "budget": "calibrated", "gates": str(tmp_path / "gates")}, "that were calibrated"),
        ({"policy": "snapkv", "parallelize": True}, "eviction needs the model on one device: leave out parallelize"),
        ({"policy": "snapkv", "backend": "seq2seq"}, "takes decoders only"),
        ({"policy": "retention"}, "policy 'retention' needs gates: add gates=FOLDER to --model_args"),
        ({"policy": "retention", "gates": str(tmp_path / "none")}, "no gates at"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model_class()(pretrained=folder, **arguments)
    smaller = json.loads((Path(folder) / "config.json").read_text()) | {"hidden_size": 64, "num_hidden_layers": 2}
    (Path(folder) / "config.json").write_text(json.dumps(smaller))
    with pytest.raises(ValueError, match=r"do not fit this model: hidden_size 32 against 64; layer 2 against 2 layers"):
        model_class()(pretrained=folder, policy="retention", gates=str(tmp_path / "gates"))


def test_a_task_without_the_field_it_needs(model, tokenizer, folder, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    subject = model_class()(pretrained=model, tokenizer=tokenizer, policy="snapkv", question="agnostic")
    with pytest.raises(ValueError, match="task 'probe' has no rule for where its question begins"):
        subject.generate_until([instance("generate_until", ("a b", {"until": []}), {"text": "a b"})])
    arguments = ["--model_args", f"pretrained={folder},policy=snapkv,question=agnostic,question_field=query"]
    asked = peek([*arguments, "--tasks", "local_generate", "--include_path", str(tasks)])
    with pytest.raises(ValueError, match=r"has no field 'query' .* its fields are answer, choices, context, question"):
        check(asked)
    asked.model_args["question_field"] = "question"
    check(asked)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--tasks", "tenure_vt", "--metadata", '{"length": 900}'],
         "contexts of 900 tokens and 256 for question and answer exceed the model's 1024 positions: give "
         "--metadata length=768 or less"),
        (["--tasks", "tenure_v*"], "contexts of 4096 tokens and 256 for question and answer exceed the model's 1024"),
        (["--tasks", "tenure_nothing"], "no task 'tenure_nothing'; known, each also with _aware: tenure_cwe,"),
        (["--tasks", "tenure_vt", "--metadata", "length=60", "texts=pydoc"],
         "a context of 60 tokens is too short for task 'vt': give at least "),
        (["--tasks", "tenure_memory", "--metadata", "length=long"],
         "got 'long' as length; accepted: a whole number of 1 or more"),
        (["--tasks", "tenure_vt", "--metadata", "length=500", "cases=0"],
         "got 0 as cases; accepted: a whole number of 1 or more"),
        (["--tasks", "tenure_vt", "--metadata", "length=500", "texts=no/text"], "no file or folder 'no/text'"),
        (["--tasks", "tenure_vt", "--metadata", "lenght=500"],
         "got lenght in --metadata; the generated tasks accept length, cases, seed, texts, tokenizer"),
        (["--tasks", "tenure_vt", "--metadata", "{length: 500}"],
         "got '{length: 500}' as --metadata; accepted: a=1,b=2 or"),
        (["--tasks", "ruler", "--metadata", '{"max_seq_lengths": [512, 4096]}'],
         "max_seq_lengths has 4096; prompts of that many tokens exceed the model's 1024 positions"),
        (["--tasks", "tenure_vt", "--device", "gpu"], "--device has 'gpu'; cpu, cuda, cuda:1 and so on are accepted"),
        (["--tasks", "tenure_vt", "--device", "cuda:99"], "--device has 'cuda:99'; this machine has "),
        (["--tasks", "tenure_vt", "--model_args", "max_length=300"], "exceed max_length=300: give --metadata length="),
        (["--tasks", "tenure_vt", "--model_args", "device=cpu"], "device is a flag of its own: give --device cpu"),
        (["--tasks", "tenure_vt", "--batch_size", "0"], "--batch_size is '0'; accepted: a number from 1 on, auto"),
        (["--tasks", "tenure_vt", "-b", "auto:0"], "--batch_size is 'auto:0'; accepted: a number from 1 on, auto"),
        (["--tasks", "tenure_vt", "--max_batch_size", "-1"], "--max_batch_size is '-1'; accepted: a number from 1 on"),
        (["--config", "no/file.yaml"], "no file at --config 'no/file.yaml'"),
    ],
)  # fmt: skip
def test_wrong_command_lines_are_one_sentence(rest, message, folder, capsys):
    assert cli.main(["eval", "--model_args", f"pretrained={folder},policy=snapkv", *rest]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tenure eval: ") and message in line


def test_a_command_line_needs_a_model_and_a_settings_file_a_mapping(tmp_path, capsys):
    assert cli.main(["eval", "--tasks", "tenure_vt"]) == 1
    assert "no model: add pretrained=NAME to --model_args" in capsys.readouterr().err
    for text, message in (
        ("a: [", "run.yaml is not YAML: while parsing"),
        ("- a", "run.yaml: got a list as the document; accepted: a mapping of model"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        assert cli.main(["eval", "--config", str(tmp_path / "run.yaml")]) == 1
        assert message in capsys.readouterr().err


def test_kinds_behind_names():
    assert kinds_of(["tenure_vt", "tenure_vt_aware", "other"]) == ["vt"]
    assert len(kinds_of(["tenure_ruler", "tenure_memory_aware"])) == 17
    assert kinds_of(["tenure_niah_single_*"]) == ["niah_single_1", "niah_single_2", "niah_single_3"]
