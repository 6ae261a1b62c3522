"""Presets: kept sets against float64 oracles, in the prompt and after every token, and what presets refuse."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import evict, get_policy
from tenure.eviction.plan import Budget, EvictionPlan, Rules
from tenure.eviction.presets import PRESETS, make_plan
from tenure.retention import RetentionGates

from .oracles import (
    Oracle,
    check_top,
    defensive_scores,
    keydiff_scores,
    knorm_scores,
    retention_scores,
    snapkv_scores,
)

MODELS = (
    ("llama", {"num_key_value_heads": 4}),  # one query head a key/value head
    ("llama", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 1}),  # four
    ("gemma3", {}),
)
LENGTHS = (71, 53)  # of the rows, the second padded on the left
DECODED = 5


class Kept:
    """A batch of two left-padded rows that is read under a preset, step by step."""

    def __init__(self, session, ids, cuts=(), lengths=LENGTHS):
        self.session, self.cache, self.ids, self.lengths = session, session.new_cache(), ids, lengths
        longest = max(lengths)
        prompt = torch.zeros(2, longest, dtype=torch.long)
        for row, n in enumerate(lengths):
            prompt[row, longest - n :] = ids[row, :n]
        mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
        session.extend(self.cache, prompt, mask)

    def decode(self, step):
        tokens = torch.stack([row[n + step] for row, n in zip(self.ids, self.lengths, strict=True)])
        self.session.extend(self.cache, tokens.view(-1, 1))

    def of_row(self, row, index, tokens):
        """bool `(num_kv_heads, tokens)`: the entries of a layer that are stored."""
        places = self.cache.kept(index)[row]
        return torch.stack([torch.isin(torch.arange(tokens), place) for place in places])


def follow(model, gates, ids, check, decoded=DECODED, lengths=LENGTHS, **options):
    """Reads the rows under `evict(**options)`; after each forward `check(layers, stored, kept, first)` of each row."""
    oracle = Oracle(model, gates)
    with evict(model, gates=gates, **options) as session:
        cache, log = Kept(session, ids, lengths=lengths), []
        for step in range(decoded + 1):
            log.append([
                {index: cache.of_row(row, index, n + step) for index in oracle.evicting}
                for row, n in enumerate(lengths)
            ])  # fmt: skip
            if step < decoded:
                cache.decode(step)
    for row, n in enumerate(lengths):
        cuts = list(range(n, n + decoded + 1))
        walk = oracle.steps(ids[row, : n + decoded].tolist(), cuts)
        for step, (layers, stored) in enumerate(walk):
            kept = log[step][row]
            check(layers, stored, kept, step == 0)
            for index, one in stored.items():
                assert not (kept[index] & ~one).any(), "only stored entries can be kept"
                one.copy_(kept[index])


def unchanged(stored, kept):
    return all(torch.equal(stored[index], kept[index]) for index in stored)


def model_and_gates(tiny_model, family, sizes):
    model = tiny_model(family, **sizes)
    torch.manual_seed(1)
    return model, RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)


@pytest.mark.parametrize(("family", "sizes"), MODELS)
@pytest.mark.parametrize("preset", ["trimkv", "dbtrimkv"])
@torch.no_grad()
def test_retention_is_the_released_codes_in_the_prompt_and_after_every_token(tiny_model, prompt, family, sizes, preset):
    model, gates = model_and_gates(tiny_model, family, sizes)
    memory, buffer, evictions = 20, 2, []

    def check(layers, stored, kept, first):
        scores, heads = retention_scores(layers, stored), next(iter(stored.values())).shape[0]
        total, segments = sum(int(one.sum()) for one in stored.values()), heads * len(stored)
        if total < segments * (memory + buffer):
            assert unchanged(stored, kept)
            return
        evictions.append(first)
        if preset == "dbtrimkv":
            check_top(list(scores.values()), list(kept.values()), segments * memory, "all heads")
            return
        for index in stored:
            for head in range(heads):
                check_top([scores[index][head]], [kept[index][head]], memory, f"layer {index}, head {head}")

    follow(model, gates, prompt(2, 90), check, preset=preset, budget=memory, buffer=buffer)
    assert evictions.count(True) == 2 and evictions.count(False) == 4, "the prompts, and every second token of a row"


@torch.no_grad()
def test_a_prompt_between_budget_and_buffer_stays_whole(tiny_llama, gates_for, prompt):
    with evict(tiny_llama, preset="dbtrimkv", budget=20, buffer=16, gates=gates_for(tiny_llama)) as session:
        cache = session.new_cache()
        session.extend(cache, prompt(1, 35))
        assert cache.entries == 6 * 35
        session.extend(cache, prompt(1, 1))
        assert cache.entries == 6 * 20


@torch.no_grad()
def test_a_floor_adds_to_the_heads_of_dbtrimkv_and_a_lookahead_is_one_token_older(tiny_llama, gates_for, prompt):
    memory, share = 20, 0.25

    def check(layers, stored, kept, first):
        if not first:
            return
        scores = retention_scores(layers, stored, lookahead=4)
        flat = torch.cat([one.flatten() for one in scores.values()])
        least = flat.sort(descending=True).values[int(6 * memory * (1 - share)) - 1]
        for index, score in scores.items():
            for head in range(2):
                count = int((score[head] >= least).sum()) + int(memory * share)
                check_top([score[head]], [kept[index][head]], count, f"layer {index}, head {head}")

    options = {"preset": "dbtrimkv", "policy": "retention(lookahead=4)", "floor": share, "buffer": 4}
    follow(tiny_llama, gates_for(tiny_llama), prompt(2, 90), check, 1, budget=memory, **options)


@torch.no_grad()
def test_thresholds_need_no_budget_and_evict_after_every_token(tiny_llama, gates_for, prompt):
    threshold, lost = 0.3, []

    def check(layers, stored, kept, first):
        for index, score in retention_scores(layers, stored).items():
            assert torch.equal(kept[index], score >= torch.tensor(threshold).log())
        lost.append(sum(int((stored[index] & ~kept[index]).sum()) for index in stored))

    options = {"preset": "dbtrimkv", "policy": f"retention(threshold={threshold})", "budget": 1.0}
    follow(tiny_llama, gates_for(tiny_llama), prompt(2, 90), check, **options)
    assert all(lost), "every forward evicts something"


@torch.no_grad()
def test_between_chunks_dbtrimkv_scores_at_the_tokens_seen_so_far(tiny_llama, gates_for, prompt):
    gates, ids, memory, buffer = gates_for(tiny_llama), prompt(1, 80), 12, 4
    oracle, kept = Oracle(tiny_llama, gates), []
    with evict(tiny_llama, preset="dbtrimkv", budget=memory, buffer=buffer, gates=gates, prefill_chunk=16) as session:
        cache = session.new_cache()
        evicted = cache._evict

        def note(*args):
            evicted(*args)
            kept.append({index: cache.kept(index)[0] for index in oracle.evicting})

        cache._evict = note  # pyright: ignore[reportAttributeAccessIssue]
        session.extend(cache, ids)
    assert len(kept) == 5
    for number, (layers, stored) in enumerate(oracle.steps(ids[0].tolist(), [16, 32, 48, 64, 80])):
        scores = retention_scores(layers, stored)
        n = next(iter(stored.values())).shape[1]
        chosen = {
            index: torch.stack([torch.isin(torch.arange(n), place) for place in heads])
            for index, heads in kept[number].items()
        }
        check_top(list(scores.values()), list(chosen.values()), 6 * memory, f"chunk {number}")
        for index, one in stored.items():
            one.copy_(chosen[index])


@pytest.mark.parametrize(("family", "sizes"), MODELS)
@pytest.mark.parametrize("policy", ["layer_defensive", "defensive"])
@pytest.mark.parametrize("keep", [0.3, 0.7])
@torch.no_grad()
def test_defensivekv_is_the_released_codes_and_evicts_once(tiny_model, prompt, family, sizes, policy, keep):
    """At 0.3 the window alone exceeds a head's budget, and layers compete for it."""
    model, gates = model_and_gates(tiny_model, family, sizes)

    def check(layers, stored, kept, first):
        if not first:
            assert unchanged(stored, kept)
            return
        scores = defensive_scores(layers, keep, window=32)
        heads, n = next(iter(stored.values())).shape
        if policy == "defensive":
            for index in stored:
                check_top([scores[index]], [kept[index]], int(n * keep * heads), f"layer {index}")
        else:
            check_top(list(scores.values()), list(kept.values()), int(n * keep * heads * len(stored)), "all layers")

    follow(model, gates, prompt(2, 90), check, 3, policy=policy, preset="defensivekv", budget=keep)


@pytest.mark.parametrize(("preset", "window", "lengths"), [("defensivekv", 32, LENGTHS), ("kvpress", 64, (101, 83))])
@torch.no_grad()
def test_snapkv_and_adakv_have_the_windows_of_each_source(tiny_llama, gates_for, prompt, preset, window, lengths):
    keep = 0.8

    def check(policy):
        def one(layers, stored, kept, first):
            if not first:
                assert unchanged(stored, kept)
                return
            for index, layer in layers.items():
                score = snapkv_scores(layer, window)
                count = int(score.shape[1] * keep)
                if policy == "snapkv":
                    for head in range(2):
                        check_top([score[head]], [kept[index][head]], count, f"layer {index}, head {head}")
                else:
                    safe = score.topk(int(count * 0.2), 1).indices
                    check_top([score.scatter(1, safe, 9.0)], [kept[index]], 2 * count, f"layer {index}")

        return one

    for policy in ("snapkv", "adakv"):
        options = {"policy": policy, "preset": preset, "budget": keep, "lengths": lengths}
        follow(tiny_llama, gates_for(tiny_llama), prompt(2, 110), check(policy), 2, **options)


@torch.no_grad()
def test_criticalkv_selects_in_two_stages(tiny_llama, gates_for, prompt):
    keep, window = 0.7, 32

    def check(layers, stored, kept, first):
        for index, layer in layers.items() if first else ():
            score = snapkv_scores(layer, window)
            count = int(score.shape[1] * keep)
            second = (score + 1e-4) * layer.value_norms
            second = second.scatter(1, score.topk(int(count * 0.5), 1).indices, torch.inf)
            for head in range(2):
                check_top([second[head]], [kept[index][head]], count, f"layer {index}, head {head}")

    options = {"policy": "criticalkv", "preset": "defensivekv", "budget": keep, "lengths": (131, 113)}
    follow(tiny_llama, gates_for(tiny_llama), prompt(2, 140), check, 0, **options)


@pytest.mark.parametrize(("policy", "scores"), [("knorm", knorm_scores), ("keydiff", keydiff_scores)])
@torch.no_grad()
def test_keys_are_scored_as_in_kvpress(tiny_llama, gates_for, prompt, policy, scores):
    def check(layers, stored, kept, first):
        if not first:
            assert unchanged(stored, kept)
            return
        for index, layer in layers.items():
            for head, score in enumerate(scores(layer)):
                check_top([score], [kept[index][head]], int(len(score) * 0.3), f"layer {index}, head {head}")

    follow(tiny_llama, gates_for(tiny_llama), prompt(2, 90), check, 2, policy=policy, preset="kvpress", budget=0.3)


@pytest.mark.real
@torch.no_grad()
def test_presets_on_smollm2(real_model_path, essay_texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32).eval()
    gates = RetentionGates.from_pretrained("demo", model)
    ids = torch.tensor([AutoTokenizer.from_pretrained(real_model_path)(essay_texts[0]).input_ids[:260]] * 2)
    heads, layers_count = 3, 30

    def retention(layers, stored, kept, first):
        scores = retention_scores(layers, stored)
        check_top(list(scores.values()), list(kept.values()), heads * layers_count * 40, "all")

    def defensive(layers, stored, kept, first):
        if first:
            scores = defensive_scores(layers, 0.3, window=32)
            n = next(iter(stored.values())).shape[1]
            check_top(list(scores.values()), list(kept.values()), 3 * n * heads * layers_count // 10, "all")

    lengths = (251, 203)
    follow(model, gates, ids, retention, 2, lengths, preset="dbtrimkv", budget=40, buffer=1)
    follow(model, gates, ids, defensive, 1, lengths, preset="defensivekv", budget=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "h2o"}, r"unknown preset 'h2o'; known: defensivekv, trimkv, dbtrimkv, kvpress"),
        ({"preset": "trimkv", "sinks": 4}, r"preset 'trimkv' has sinks=0, got 4: leave out sinks, or the preset"),
        ({"preset": "dbtrimkv", "scope": "head"}, r"'dbtrimkv' has scope='global', got 'head'"),
        ({"preset": "trimkv", "floor": 0.1}, r"'trimkv' has floor=0.0, got 0.1"),
        ({"preset": "defensivekv", "schedule": "bounded"}, r"has schedule='once', got 'bounded'"),
        ({"preset": "defensivekv", "prefill_chunk": 64}, r"has prefill_chunk=None, got 64"),
        ({"preset": "defensivekv", "policy": "defensive(mass=0)"}, r"has mass=0.9 in policy 'defensive', got 0"),
        ({"preset": "defensivekv", "policy": "snapkv(window=16)"}, r"has window=32 in policy 'snapkv', got 16"),
        ({"preset": "defensivekv", "policy": "retention"}, r"no policy 'retention'; accepted: layer_defensive, d"),
        ({"preset": "kvpress"}, r"'kvpress' needs a policy; accepted: snapkv, adakv"),
        ({"preset": "trimkv", "policy": "retention(lookahead=2)"}, r"has lookahead=1 in policy 'retention', got 2"),
        ({"preset": "dbtrimkv", "policy": "retention(threshold=0.1)"}, r"give budget=1.0, got 0.2"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**options)


def test_presets_say_what_they_fix_and_leave_the_rest():
    assert make_plan(preset="kvpress", policy="snapkv(window=16)").policy == get_policy("snapkv", window=16)
    assert make_plan(preset="defensivekv", policy="criticalkv").policy.window == 32  # pyright: ignore[reportAttributeAccessIssue]
    assert make_plan(preset="kvpress", policy="h2o").policy == get_policy("h2o", recent=0.0, average=True)
    assert make_plan(preset="trimkv", sinks=0, scope="head", buffer=7).buffer == 7, "the preset's own value is no fault"
    plan = make_plan(preset="defensivekv", budget=0.2)
    assert (plan.policy, plan.scope) == (get_policy("layer_defensive"), "global")
    assert plan.rules == Rules(rounding="group") and plan.schedule == "once"
    assert make_plan() == EvictionPlan(get_policy("retention"), Budget(0.2), "global")
    for name, preset in PRESETS.items():
        for policy in preset.policies:
            assert make_plan(policy, preset=name).protected(0, 100, 50) == (0, 0)
