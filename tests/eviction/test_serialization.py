"""A cache written to disk goes on as if it had stayed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tenure.eviction import SnapKV, evict, policy_names

from .saved import OPTIONS, filled


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
            report.evictions,
            report.evicted_entries,
            report.peak_bytes,
        )
        for layer in range(3):
            for one, other in zip(cache.kept(layer), loaded.kept(layer), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert torch.equal(continued(tiny_llama, loaded.fork(), mask, prompt), expected)
        if session.observers.accumulated:  # a sum over all tokens: only where a mark was set
            with pytest.raises(ValueError, match=f"cannot go back to 42 columns: {session.observers.accumulated} can"):
                loaded.crop(-3)
            loaded.check()
            return
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


@torch.no_grad()
def test_a_loaded_cache_can_be_compressed_further(tiny_llama, prompt, saved):
    with evict(tiny_llama, "snapkv", 0.4, **OPTIONS) as session:
        cache = session.load_cache(saved)
        assert cache.entries > 2 * 6 * 9
        cache.compress(budget=9)
        assert cache.entries == 2 * 6 * 9
        cache.check()


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
