"""Every way in which `generate` can run: it works inside the block, or is refused by name before it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache, GenerationConfig

from tenure.eviction import RaggedCache, SnapKV, evict

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "do_sample": False},
    "several_beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "beam_sampling": {"num_beams": 4, "do_sample": True},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "assistant": {"do_sample": False},
    "assistant_sampling": {"do_sample": True},
    "in_chunks": {"do_sample": False, "prefill_chunk_size": 9},
    "guided": {"do_sample": False, "guidance_scale": 1.5},
}
DRAFTING = [mode for mode in MODES if mode.startswith(("prompt", "assistant"))]


def generate(model: Any, tiny_model: Any, family: str, mode: str, ids: torch.Tensor, tokens: int = 12) -> Any:
    """The answer of `model` after `ids` in that mode, with a fixed seed; drafts are for one row only."""
    options = dict(MODES[mode])
    if mode in DRAFTING and family == "gemma3" and not hasattr(Cache, "activate_past_recording"):
        pytest.skip("this transformers cannot take tokens back from sliding layers")
    if mode.startswith("assistant"):
        options["assistant_model"] = tiny_model(family, num_hidden_layers=2)
    torch.manual_seed(0)
    ids = ids[:1] if mode in DRAFTING else ids
    return model.generate(
        input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_budget_changes_nothing(any_tiny_model, tiny_model, family, gates_for, prompt, mode):
    model, ids = any_tiny_model, prompt(2, 23)
    expected = generate(model, tiny_model, family, mode, ids)
    with evict(model, "retention", 1.0, gates=gates_for(model)) as session:
        got = generate(model, tiny_model, family, mode, ids)
        assert isinstance(got.past_key_values, RaggedCache)
        got.past_key_values.check()
        assert session.report().kept_share == 1.0
        assert session.report().evictions == 0
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "policy"),
    [("qwen3", "retention"), ("gemma3", "retention"), ("llama", "h2o"), ("llama", "expected_attention"),
     ("llama", SnapKV(window=8))],
    ids=str,
)  # fmt: skip
def test_generation_under_a_budget_ends_with_a_sound_cache(tiny_model, gates_for, prompt, mode, family, policy):
    model, ids = tiny_model(family), prompt(2, 60)
    with evict(model, policy, 0.3, "global", gates=gates_for(model), recent=2, buffer=4):
        first = generate(model, tiny_model, family, mode, ids)
        again = generate(model, tiny_model, family, mode, ids)
        again.past_key_values.check()
        report = again.past_key_values.report()
    assert torch.equal(first.sequences, again.sequences)
    assert report.evictions > 1
    assert report.kept_share < 0.45
    assert report.bytes < 0.5 * report.peak_bytes or mode == "in_chunks"


@pytest.mark.parametrize("policy", ["h2o", "expected_attention", SnapKV(window=8), "knorm"], ids=str)
def test_drafted_tokens_are_those_of_plain_decoding_while_nothing_more_is_evicted(tiny_model, prompt, policy):
    """The context is evicted before, or at the end of a prompt that ends with drafts; then drafts come and go."""
    model, ids = tiny_model("llama"), prompt(1, 60)
    with evict(model, policy, 0.4, recent=2, buffer=60):
        expected = generate(model, tiny_model, "llama", "greedy", ids, 30)
        for mode in ("prompt_lookup", "assistant"):
            got = generate(model, tiny_model, "llama", mode, ids, 30)
            assert torch.equal(got.sequences, expected.sequences)
            caches = got.past_key_values, expected.past_key_values
            assert torch.equal(*(cache.lengths() for cache in caches))
            for layer in range(3):
                assert torch.equal(*(cache.positions(layer) for cache in caches))


@torch.no_grad()
def test_chunks_end_before_the_drafts_do(tiny_model, prompt):
    model, ids = tiny_model("llama"), prompt(1, 60)
    with evict(model, "knorm", 12, recent=2, buffer=4, prefill_chunk=11) as session:
        got = generate(model, tiny_model, "llama", "prompt_lookup", ids)
        got.past_key_values.check()
        assert session.report().peak_entries <= (12 + 4 + 11) * 6
    with evict(model, "knorm", 12, recent=2, buffer=4, prefill_chunk=3) as session:
        cache = session.new_cache()
        cache.activate_past_recording()
        with pytest.raises(ValueError, match="got 3 drafted tokens at once; accepted: at most 2, one less than pref"):
            model(ids, past_key_values=cache, logits_to_keep=4)
        assert cache.columns_seen == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "Contrastive Search requires"),
    "dola": ({"dola_layers": "low", "do_sample": False}, "Dola Generation requires"),
    "groups": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search requires"),
    "constrained": ({"num_beams": 4, "force_words_ids": [[5]]}, "Constrained Beam Search requires"),
    "mtp": ({"use_mtp": True}, "num_mtp_layers"),
    "early_exit": ({"assistant_early_exit": 1, "do_sample": False}, "assistant_early_exit, .* is not supported inside"),
    "static": ({"cache_implementation": "static"}, "a?n? ?.*StaticCache cannot be used"),
    "offloaded": ({"cache_implementation": "offloaded"}, "an offloaded DynamicCache cannot be used"),
}


@pytest.mark.parametrize("mode", REFUSED)
def test_what_cannot_run_is_refused_by_name_and_leaves_the_model_as_it_was(tiny_llama, prompt, mode):
    """The first four are no longer part of transformers, which says so itself."""
    options, message = REFUSED[mode]
    ids, layers = prompt(1, 20), tiny_llama.config.num_hidden_layers
    expected = tiny_llama.generate(ids, max_new_tokens=5, do_sample=False)
    with evict(tiny_llama, "knorm", 0.5):
        with pytest.raises(ValueError, match=message):
            tiny_llama.generate(ids, max_new_tokens=5, **options)
        tiny_llama.generate(ids, max_new_tokens=5, do_sample=False)
    assert tiny_llama.config.num_hidden_layers == layers
    assert torch.equal(tiny_llama.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_continuous_batching_is_refused_by_name(tiny_llama, prompt):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2)
    with evict(tiny_llama, "knorm", 0.5), pytest.raises(ValueError, match="is not supported for continuous batching"):
        tiny_llama.generate_batch([prompt(1, 20)[0].tolist()], generation_config=config)


def test_a_model_in_a_block_drafts_for_another_until_it_evicts(tiny_model, prompt):
    model, ids = tiny_model("llama"), prompt(1, 60)
    assistant = tiny_model("llama", num_hidden_layers=2)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with evict(assistant, SnapKV(window=8), 1.0):
        got = model.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, expected)
    with evict(assistant, "knorm", 0.5), pytest.raises(ValueError, match=r"evicted .* let no model inside evict\(\) "):
        model.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=assistant)
