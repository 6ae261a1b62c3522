"""Options refused before work starts, caches refused by name, and forwards that raise."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tenure.eviction import Random, SnapKV, evict
from tenure.eviction.forward_state import RollbackConfig
from tenure.retention import RetentionGates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget 0.0 is out of range"),
        ({"budget": 1.5}, "budget 1.5 is out of range"),
        ({"budget": 0}, "budget 0 is out of range"),
        ({"budget": True}, "budget True is out of range"),
        ({"budget": "lots"}, "budget 'lots' is not understood: give a float .* '65536 entries', .* '512MiB'"),
        ({"budget": "5 entries"}, "'5 entries' is less than one entry for each of a row's 6 heads in 3 layers"),
        ({"budget": "64B"}, "'64B' is less than one entry"),
        ({"scope": "row"}, "unknown scope 'row'; known: global, layer, head, pyramid, preference"),
        ({"policy": "lru"}, "unknown policy 'lru'; known: ada_criticalkv, adakv"),
        ({"policy": "retention"}, "needs gates"),
        ({"observe": ["retention"]}, "needs gates"),
        ({"sinks": -1}, "got -1 as sinks; accepted: a whole number from 0"),
        ({"buffer": -2}, "got -2 as buffer; accepted: a whole number from 0"),
        ({"floor": 1.5}, "got 1.5 as floor; accepted: a number from 0 to 1"),
        ({"prefill_chunk": 0}, "got 0 as prefill_chunk; accepted: a whole number from 1"),
        ({"protect": [(3, 1)]}, r"protect has the range \(3, 1\): 0 <= start <= stop"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_hooked(tiny_llama, options, message):
    with pytest.raises(ValueError, match=message), evict(tiny_llama, **{"policy": "knorm"} | options):
        pass
    assert not any(module._forward_pre_hooks for module in tiny_llama.modules())


def test_gates_of_another_model_are_refused(tiny_model):
    gates = RetentionGates.for_model(tiny_model("llama", num_hidden_layers=2), gate_width=8)
    with pytest.raises(ValueError, match="do not fit"), evict(tiny_model("llama"), gates=gates):
        pass


def test_gates_are_loaded_from_a_folder(tiny_llama, gates_for, prompt, tmp_path):
    gates_for(tiny_llama).save_pretrained(tmp_path)
    with evict(tiny_llama, gates=tmp_path, recent=4) as session:
        tiny_llama(prompt(1, 50))
    assert session.report().entries == 10 * 6


def test_two_blocks_on_one_model_are_refused(tiny_llama):
    with evict(tiny_llama, "knorm"), pytest.raises(ValueError, match="already inside"), evict(tiny_llama, "knorm"):
        pass


def test_foreign_caches_are_refused(tiny_llama, prompt):
    ids = prompt(1, 12)
    filled = tiny_llama(ids).past_key_values
    with evict(tiny_llama, "knorm") as first:
        old = first.new_cache()
        tiny_llama(ids, past_key_values=old)
        with pytest.raises(ValueError, match="filled outside"):
            tiny_llama(ids, past_key_values=filled)
        with pytest.raises(ValueError, match="StaticCache cannot be used"):
            tiny_llama(ids, past_key_values=StaticCache(tiny_llama.config, max_cache_len=64))
        with pytest.raises(ValueError, match="cannot be used"):
            tiny_llama.generate(ids, max_new_tokens=2, cache_implementation="static")
    with evict(tiny_llama, "knorm"), pytest.raises(ValueError, match="another evict"):
        tiny_llama(ids, past_key_values=old)
    with pytest.raises(ValueError, match="only inside it"):
        tiny_llama(ids, past_key_values=old)


def test_masks_of_another_form_are_refused(tiny_llama, prompt):
    ids = prompt(1, 12)
    with evict(tiny_llama, "knorm") as session:
        with pytest.raises(ValueError, match=r"needs a 2-D attention_mask .* got \(1, 1, 12, 12\)"):
            tiny_llama(ids, attention_mask=torch.zeros(1, 1, 12, 12))
        cache = session.new_cache()
        tiny_llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\), expected \(1, 15\)"):
            tiny_llama(ids[:, :3], attention_mask=torch.ones(1, 3), past_key_values=cache)
        with pytest.raises(ValueError, match="holds 1 rows, the model got 2"):
            tiny_llama(prompt(2, 3), past_key_values=cache)
        cache.check()


def test_an_empty_cache_of_transformers_is_replaced(tiny_llama, prompt):
    given = DynamicCache(config=tiny_llama.config)
    with evict(tiny_llama, "knorm", 5, recent=2) as session:
        tiny_llama(prompt(1, 40), past_key_values=given)
        assert given.get_seq_length() == 0
        assert session.report().entries == 5 * 6


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("filled", [False, True])
@torch.no_grad()
def test_a_forward_that_raises_leaves_no_trace(tiny_model, prompt, family, at, filled):
    model, ids, more = tiny_model(family), prompt(1, 40), prompt(1, 3, seed=1)

    def fail(*_):
        raise RuntimeError("on purpose")

    def run(broken: bool) -> torch.Tensor:
        with evict(model, SnapKV(window=4), 0.3, recent=4) as session:
            cache = session.new_cache()
            if filled:
                model(ids, past_key_values=cache)
            if broken:
                hook = model.model.layers[at].mlp.register_forward_pre_hook(fail)
                with pytest.raises(RuntimeError, match="on purpose"):
                    model(more, past_key_values=cache)
                hook.remove()
                cache.check()
                if filled:
                    first = 36 - RollbackConfig.spare_queries
                    assert cache.query_positions.sort().values.tolist() == [list(range(first, 40))]
            return model(more, past_key_values=cache).logits

    torch.testing.assert_close(run(broken=True), run(broken=False))


def test_a_policy_that_scores_nonsense_is_named(tiny_llama, prompt):
    class Wrong(Random):
        def score(self, view):
            return view.keys.sum(-1) * torch.nan

    class Flat(Random):
        def score(self, view):
            return view.keys.mean(1)

    for policy, message in ((Wrong(), "Wrong.score gave NaN in layer 0"), (Flat(), "Flat.score gave .* expected")):
        with evict(tiny_llama, policy, 0.2), pytest.raises(ValueError, match=message):
            tiny_llama(prompt(1, 30))


def test_what_was_not_recorded_cannot_be_compressed_with(tiny_llama, gates_for, prompt):
    gates = gates_for(tiny_llama)
    with evict(tiny_llama, "full", gates=gates, observe=[SnapKV(window=8)]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 30), past_key_values=cache)
        with pytest.raises(ValueError, match=r"'retention' needs log_beta, .* observe="):
            cache.compress("retention")
        with pytest.raises(ValueError, match=r"a window of 64 queries \(recorded: 8\)"):
            cache.compress("snapkv")
        with pytest.raises(ValueError, match="give the gates to evict"):
            cache.compress("knorm", gates=gates_for(tiny_llama))
        assert cache.plan.policy.name == "full"
        cache.compress(SnapKV(window=4), 0.5)
        cache.check()
