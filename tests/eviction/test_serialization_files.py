"""A file that does not hold what it should is refused with the reason, under `python -O` too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tenure.eviction import Knorm, SnapKV, evict
from tenure.eviction.serialization import HEADER, CacheFileError
from tenure.retention import RetentionGates

from .saved import OPTIONS, filled


def edited(file: Path, change) -> Path:
    """The file with `change(tensors, header)` applied; the header's text stands in the file's metadata."""
    with safe_open(file, framework="pt") as source:
        tensors = {name: source.get_tensor(name).clone() for name in source.keys()}  # noqa: SIM118
        header = json.loads(source.metadata()[HEADER])
    change(tensors, header)
    save_file(tensors, file, metadata={HEADER: json.dumps(header)})
    return file


def cut(tensors, header, name: str) -> None:
    """Takes the last number of each row of a tensor away, and says so in the header."""
    tensors[name] = tensors[name][..., :-1].clone()
    header["tensors"][name][1][-1] -= 1


def cast(tensors, header, name: str) -> None:
    tensors[name] = tensors[name].double()
    header["tensors"][name][0] = "float64"


def refused(model, file: Path, message: str, policy: Any = "snapkv", **options: Any) -> None:
    with evict(model, policy, **options) as session, pytest.raises(CacheFileError, match=message) as error:
        session.load_cache(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value), "one sentence that names the file"


def test_a_file_that_is_no_cache_is_refused(tiny_llama, saved, tmp_path):
    whole = saved.read_bytes()
    refused(tiny_llama, tmp_path / "absent", "no cache at .*; a file written by cache.save")
    for size in (0, 7, 900, len(whole) - 1):
        saved.write_bytes(whole[:size])
        refused(tiny_llama, saved, rf"\({size} bytes\) is truncated or not a safetensors file")
    saved.write_bytes(whole + b"more")
    refused(tiny_llama, saved, "is truncated or not a safetensors file")
    save_file({"weight": torch.ones(3)}, saved)
    refused(tiny_llama, saved, "is a safetensors file, but not a cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(schema_version=2), "schema version 2; this version of tenure reads up to 1"),
        (lambda t, h: h.pop("schema_version"), r"a header that cannot be read: KeyError\('schema_version'\)"),
        (lambda t, h: t.pop("layers.1.entries.key"), r"missing \['layers.1.entries.key'\], unexpected \[\]"),
        (lambda t, h: t.update(extra=torch.ones(1)), r"missing \[\], unexpected \['extra'\]"),
        (
            lambda t, h: t.update({"layers.0.entries.position": t["layers.0.entries.position"].long()}),
            r"wrong \[\"layers.0.entries.position \['int64', \[\d+\]\] instead of \['int32', \[\d+\]\]\"\]",
        ),
        (lambda t, h: t.update({name: t[name][1:] for name in ["layers.0.entries.value"]}), r"wrong \[.*entries.value"),
        (lambda t, h: h["layers"][2]["lengths"].pop(), "used: the lengths of the segments do not add up"),
        (lambda t, h: h["layers"][0]["lengths"].__setitem__(0, 1), "used: the lengths of the segments do not add up"),
        (lambda t, h: t["layers.0.entries.position"].zero_(), "cannot be used: positions do not ascend in every"),
        (lambda t, h: h["rows"].update(tokens=[3, 3]), "cannot be used: token counts and padding masks disagree"),
        (lambda t, h: h["rows"].pop("tokens"), "cannot be used: 'tokens'"),
        (lambda t, h: h["layers"].pop(), "it has the layers .*, the model's are"),
        (lambda t, h: h["plan"].update(budget="much"), "cannot be used: budget 'much' is not understood"),
        (lambda t, h: h["plan"]["policy"].update(name="mine"), "cannot be used: unknown policy 'mine'; known: "),
        (lambda t, h: h["plan"]["policy"]["options"].update(window=128), "needs a window of 128 queries .recorded: 64"),
        (lambda t, h: h.pop("last_eviction"), "cannot be used: 'last_eviction'"),
        (lambda t, h: h.update(last_eviction=46), "the last eviction is after the last column seen"),
        (lambda t, h: h.update(last_eviction=20), "used: entries of tokens since the last eviction are missing"),
        (lambda t, h: h["rows"].update(tokens=[-1, 31]), "cannot be used: token counts are negative"),
        (lambda t, h: h["rows"].update(runs=[39, 6]), "cannot be used: padding masks are not bool"),
        (lambda t, h: t["rows.window_positions"].add_(1), "cannot be used: recorded queries .* not in their slots"),
        (lambda t, h: cut(t, h, "rows.window_positions"), r"the recorded queries are \(2, 95\), expected \(2, 96\)"),
        (lambda t, h: cut(t, h, "layers.2.window"), r"window of queries are \(2, 4, 96, 7\), expected \(2, 4, 96, 8\)"),
        (lambda t, h: cut(t, h, "layers.2.entries.key"), r"keys are \(\d+, 7\), the model's have 8 numbers a head"),
        (lambda t, h: cast(t, h, "layers.1.entries.value"), r"value is torch.float64 \(\d+, 8\), expected torch.fl"),
        (lambda t, h: h["layers"][1].update(lengths=None), "cannot be used: layer 1 has no entries"),
        (lambda t, h: h["layers"][1].update(scaling=0.0), "cannot be used: scaling is 0.0"),
        (lambda t, h: h["layers"][1].update(scaling=float("nan")), "a header that cannot be read: .*got NaN; acc"),
        (lambda t, h: t["layers.1.entries.key"][3].fill_(float("nan")), "used: keys are not finite numbers of up"),
        (lambda t, h: t["layers.1.entries.value"][3].fill_(1e30), "used: values are not finite numbers of"),
        (lambda t, h: t["layers.2.window"].fill_(float("inf")), "used: recorded queries are not finite numbers"),
        (lambda t, h: h["plan"].update(protect={"rows": [[[5, 1]]], "shared": True}), "sorted and disjoint ones are"),
        (lambda t, h: h["plan"].update(protect={"rows": [[[-3, 1]]], "shared": True}), "sorted and disjoint ones are"),
        (lambda t, h: h["plan"].update(protect={"rows": [], "shared": True}), "protect has ranges for 0 rows"),
        (lambda t, h: h["plan"].update(sinks="2"), "used: .*got '2' as sinks; accepted: a whole number"),
        (lambda t, h: h["counters"].update(evictions=True), "evictions is True, not an integer >= 0"),
        (
            lambda t, h: h["plan"].update(protect={"rows": [[[0, 1]]] * 3, "shared": False}),
            "protect is a mask for 3 rows, the cache has 2",
        ),
    ],
)  # fmt: skip
def test_a_file_with_something_wrong_is_refused_with_the_reason(tiny_llama, saved, change, message):
    refused(tiny_llama, edited(saved, change), message)


def test_statistics_and_other_layers_must_fit_too(tiny_model, prompt, tmp_path):
    model, file = tiny_model("gemma3"), tmp_path / "context"

    def save() -> None:
        with evict(model, "expected_attention", 0.4, **OPTIONS) as session:
            filled(session, model, prompt)[0].save(file)

    for change, message in (
        (lambda t, h: cut(t, h, "layers.1.statistics.mean"), r"statistics.mean are \(2, 4, 7\), expected \(2, 4, 8\)"),
        (lambda t, h: h["layers"][0]["numbers"].update(record_past=1), "does not evict has .*'record_past': 1"),
        (lambda t, h: h["layers"][0]["numbers"].update(cumulative_length=7), "another number of columns than 45"),
        (lambda t, h: h["layers"][0].update(numbers=None), "a layer that does not evict has None, expected"),
    ):
        save()
        refused(model, edited(file, change), message, "expected_attention")


WITHOUT_ASSERTS = """
import sys
from transformers import AutoModelForCausalLM
from tenure.eviction import CacheFileError, evict
assert False, "not run: python -O"
with evict(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "snapkv") as session:
    for file in sys.argv[2:]:
        try:
            session.load_cache(file)
        except CacheFileError as error:
            print(str(error).split("used: ")[1])
        else:
            print("loaded")
"""


def test_files_are_refused_without_asserts_too(tiny_llama, saved, tmp_path):
    changes = {
        "zero": (lambda t, h: t["layers.0.entries.position"].zero_(), "positions do not ascend in every segment"),
        "negative": (lambda t, h: t["layers.0.entries.position"].sub_(50), "positions are negative"),
        "later": (lambda t, h: t["layers.0.entries.position"].add_(50), "a position exceeds the tokens seen"),
        "tokens": (lambda t, h: h["rows"].update(tokens=[3, 3]), "token counts and padding masks disagree"),
        "eviction": (lambda t, h: h.update(last_eviction=99), "the last eviction is after the last column seen"),
        "sound": (lambda t, h: None, "loaded"),
    }
    for name, (change, _) in changes.items():
        (tmp_path / name).write_bytes(saved.read_bytes())
        edited(tmp_path / name, change)
    tiny_llama.save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / name) for name in ("model", *changes)]
    run = subprocess.run(
        [sys.executable, "-O", "-c", WITHOUT_ASSERTS, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [message for _, message in changes.values()]


def test_a_cache_of_another_model_or_dtype_is_refused(tiny_llama, tiny_model, saved):
    refused(tiny_model("qwen2"), saved, r"saved from LlamaForCausalLM \(float32, fingerprint \w+\), this is Qwen2ForC")
    refused(tiny_llama.bfloat16(), saved, r"\(float32, fingerprint \w+\), this is LlamaForCausalLM \(bfloat16")


def test_a_session_that_records_something_else_is_refused(tiny_llama, gates_for, prompt, saved):
    refused(tiny_llama, saved, r"a window of 64 queries, this session records a window of 8 .* observe=", SnapKV(8))
    gates = gates_for(tiny_llama)
    refused(tiny_llama, saved, "come from no gates, this session has gates", "retention", gates=gates, observe="snapkv")
    refused(tiny_llama, saved, "this session records .*worst", "snapkv", observe=["defensive"])
    with evict(tiny_llama, "retention", 0.4, gates=gates) as session:
        filled(session, tiny_llama, prompt)[0].save(saved)
    torch.manual_seed(7)
    others = RetentionGates.for_model(tiny_llama, gate_width=8)
    refused(tiny_llama, saved, r"come from gates \w+, this session has gates", "retention", gates=others)


def test_a_policy_of_the_users_own_is_found_in_the_session(tiny_llama, prompt, saved):
    class Mine(Knorm):
        name = "mine"

    with evict(tiny_llama, Mine(), 0.4) as session:
        filled(session, tiny_llama, prompt)[0].save(saved)
        assert session.load_cache(saved).plan.policy == Mine()
    refused(tiny_llama, saved, "unknown policy 'mine'", "knorm")
    with evict(tiny_llama, "knorm", observe=[Mine()]) as session:
        assert type(session.load_cache(saved).plan.policy) is Mine
