"""A cache written to disk goes on as if it had stayed; a file that is not what it should be is refused by name."""

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

from tenure.eviction import Knorm, SnapKV, evict, policy_names
from tenure.eviction.persist import HEADER, CacheFileError
from tenure.retention import RetentionGates

OPTIONS: dict[str, Any] = {"sinks": 2, "recent": 4, "buffer": 3, "floor": 0.3, "protect": [(5, 8)]}


@torch.no_grad()
def filled(session, model, prompt):
    """A cache of two rows, one of them padded in the prompt and in a question, and its mask with the next column."""
    mask = torch.ones(2, 46, dtype=torch.long)
    mask[1, :11] = mask[0, 40:42] = 0
    cache = session.new_cache()
    model(prompt(2, 40), attention_mask=mask[:, :40], past_key_values=cache)
    model(prompt(2, 5, seed=1), attention_mask=mask[:, :45], past_key_values=cache)
    return cache, mask


@torch.no_grad()
def continued(model, cache, mask, prompt) -> torch.Tensor:
    """Logits of a few more tokens, evictions among them."""
    logits = []
    for step in range(9):
        logits.append(model(prompt(2, 1, seed=step + 5), attention_mask=mask, past_key_values=cache).logits)
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
    cache.check()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("policy", [name for name in policy_names() if name != "full"])
def test_every_policy_goes_on_as_if_its_cache_had_stayed(tiny_llama, gates_for, prompt, tmp_path, policy):
    file, options = tmp_path / "context.safetensors", OPTIONS | {"gates": gates_for(tiny_llama)}
    with evict(tiny_llama, policy, 0.4, **options) as session:
        cache, mask = filled(session, tiny_llama, prompt)
        cache.save(file)
        expected, plan, report = continued(tiny_llama, cache.fork(), mask, prompt), cache.plan, cache.report()
    with evict(tiny_llama, policy, 9, **options) as session:
        loaded = session.load_cache(file)
        loaded.check()
        assert session.last_cache is loaded
        assert loaded.plan == plan, "its own plan, not the new session's"
        got = loaded.report()
        assert torch.equal(got.lengths, report.lengths) and got.kept_bytes == report.kept_bytes == got.bytes
        assert (got.evictions, got.evicted_entries, got.peak_bytes) == (
            report.evictions, report.evicted_entries, report.peak_bytes
        )
        for layer in range(3):
            for one, other in zip(cache.kept(layer), loaded.kept(layer), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(continued(tiny_llama, loaded.fork(), mask, prompt), expected)
        loaded.crop(-3)
        loaded.check()
        loaded.save(file)  # over the file it came from
        assert session.load_cache(file).tokens_seen.tolist() == loaded.tokens_seen.tolist() == [40, 31]


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_layers_with_a_sliding_window_are_saved_too(tiny_model, prompt, tmp_path, family):
    model = tiny_model(family)
    with evict(model, SnapKV(window=4), 0.4, **OPTIONS) as session:
        cache, mask = filled(session, model, prompt)
        cache.save(tmp_path / "context")
        loaded = session.load_cache(tmp_path / "context")
        assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
        assert torch.equal(continued(model, loaded, mask, prompt), continued(model, cache, mask, prompt))


SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM
from tenure.eviction import evict
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with evict(model, "retention", gates=sys.argv[2], observe=["snapkv"]) as session:
    cache = session.load_cache(sys.argv[3])
    ids = torch.tensor([[int(word) for word in sys.argv[4].split()]])
    print(model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)[0].tolist())
"""


def test_another_process_generates_the_same_tokens(tiny_llama, gates_for, prompt, tmp_path):
    gates, file, context, question = gates_for(tiny_llama), tmp_path / "c", prompt(1, 60), prompt(1, 6, seed=3)
    tiny_llama.save_pretrained(tmp_path / "model")
    gates.save_pretrained(tmp_path / "gates")
    whole = torch.cat([context, question], dim=1)
    options: Any = {"gates": gates, "observe": ["snapkv"], "recent": 3, "buffer": 5}
    with torch.no_grad(), evict(tiny_llama, "retention", 12, **options) as session:
        cache = session.new_cache()
        tiny_llama(context, past_key_values=cache)
        cache.save(file)
        expected = tiny_llama.generate(whole, past_key_values=cache, max_new_tokens=24, do_sample=False)[0].tolist()
        assert session.report().evictions > 2
    assert len(set(expected[66:])) > 3, "not one token over and over"
    words = " ".join(map(str, whole[0].tolist()))
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "gates"), str(file), words]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == expected


@pytest.fixture
def saved(tiny_llama, prompt, tmp_path) -> Path:
    file = tmp_path / "context.safetensors"
    with evict(tiny_llama, "snapkv", 0.4, **OPTIONS) as session:
        filled(session, tiny_llama, prompt)[0].save(file)
    return file


def edited(file: Path, change) -> Path:
    """The file with `change(tensors, header)` applied; the header's text stands in the file's metadata."""
    with safe_open(file, framework="pt") as source:
        tensors = {name: source.get_tensor(name).clone() for name in source.keys()}  # noqa: SIM118
        header = json.loads(source.metadata()[HEADER])
    change(tensors, header)
    save_file(tensors, file, metadata={HEADER: json.dumps(header)})
    return file


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
        (lambda t, h: h["layers"][2]["lengths"].pop(), "cannot be used: one length a segment"),
        (lambda t, h: h["layers"][0]["lengths"].__setitem__(0, 1), "cannot be used: one length a segment"),
        (lambda t, h: t["layers.0.entries.position"].zero_(), "cannot be used: positions ascend in every segment"),
        (lambda t, h: h["rows"].update(tokens=[3, 3]), "cannot be used: positions are of tokens seen"),
        (lambda t, h: h["rows"].pop("tokens"), "cannot be used: 'tokens'"),
        (lambda t, h: h["layers"].pop(), "it has the layers .*, the model's are"),
        (lambda t, h: h["plan"].update(budget="much"), "cannot be used: budget 'much' is not understood"),
        (lambda t, h: h["plan"]["policy"].update(name="mine"), "cannot be used: unknown policy 'mine'; known: "),
        (lambda t, h: h["plan"]["policy"]["options"].update(window=128), "needs a window of 128 queries .recorded: 64"),
    ],
)  # fmt: skip
def test_a_file_with_something_wrong_is_refused_with_the_reason(tiny_llama, saved, change, message):
    refused(tiny_llama, edited(saved, change), message)


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


def test_an_empty_cache_is_not_saved_and_a_file_is_whole_or_old(tiny_llama, prompt, saved, monkeypatch):
    before = saved.read_bytes()
    with evict(tiny_llama, "knorm") as session:
        with pytest.raises(ValueError, match="the cache is empty"):
            session.new_cache().save(saved)
        cache, _ = filled(session, tiny_llama, prompt)

        def full_disk(handle: int) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr("os.fsync", full_disk)
        with pytest.raises(OSError, match="no space left"):
            cache.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name], "no temporary file stays"
