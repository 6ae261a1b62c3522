"""DefensiveKV: every step by hand, the whole against plain loops, chunk by chunk, with padding, on ragged segments."""

from __future__ import annotations

import shutil

import pytest
import torch

from tenure.eviction import Defensive, LayerDefensive, LayerView, SnapKV, evict
from tenure.eviction.ops.naive import norms_by_parts, pool_and_renormalise, worst_case
from tenure.eviction.ops.value_norms import (
    find_norm_kernel,
    find_tile_kernel,
    norms_in_c,
    norms_in_tiles,
    value_norms,
)
from tenure.eviction.policies.common import own_entries, window_attention
from tenure.eviction.policies.defensive import (
    defensive_aggregate,
    flat_prior,
    mass_protection,
    released_protection,
)
from tenure.eviction.selection import conclude
from tenure.retention.ops.kernel_choice import multiplies_bf16, multiplies_bf16_tiles


def test_window_attention_by_hand(hand_view):
    """Two entries with logits ln 3 and 0, and a third that only the last query may see."""
    keys = torch.tensor([3.0, 1.0, 4.0]).log().view(1, 1, 3, 1)
    queries = torch.ones(1, 2, 2, 1)
    queries[0, 1] = 0
    view = hand_view(SnapKV(window=2), keys, queries=queries)
    expected = [[[3 / 4, 1 / 4, 0], [3 / 8, 1 / 8, 4 / 8]], [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]]
    attention = window_attention(view, view.queries, view.query_positions)
    torch.testing.assert_close(attention, torch.tensor(expected).view(1, 1, 2, 2, 3))
    missing = window_attention(view, view.queries, torch.tensor([[-1, 2]]))
    assert missing[0, 0, :, 0].eq(0).all(), "a query that does not exist attends to nothing"


def test_pool_and_renormalise_by_hand():
    """[6, 0, 3, 0 | window 1] pools to [2, 3, 1, 1] (kernel 3): 7 is scaled back to 9."""
    attention = torch.tensor([[6.0, 0, 3, 0, 1], [0, 0, 0, 0, 10]]).view(1, 1, 1, 2, 5) / 10
    counted = torch.tensor([True, True, True, True, False]).view(1, 1, 5)
    pooled = pool_and_renormalise(attention, counted, 3)
    expected = torch.tensor([[2.0, 3, 1, 1, 0], [0, 0, 0, 0, 0]]) * 9 / 7 / 10
    torch.testing.assert_close(pooled[0, 0, 0], expected)


def test_worst_case_by_hand():
    pooled = torch.tensor([[[1.0, 2], [5, 0]], [[3, 1], [0, 4]]]).view(1, 1, 2, 2, 2)
    assert worst_case(pooled).tolist() == [[[5, 4]]]


def test_prior_and_aggregate_by_hand():
    worst = torch.tensor([[[0.6, 0.1, 0.2, 9.0]]])
    counted = torch.tensor([[[True, True, True, False]]])
    prior = flat_prior(worst, counted)
    torch.testing.assert_close(prior, torch.tensor([[[0.3]]]))
    torch.testing.assert_close(defensive_aggregate(worst, prior), torch.tensor([[[0.6, 0.3, 0.3, 9.0]]]))
    assert flat_prior(worst, torch.zeros_like(counted)).item() == 0


def test_value_norms_by_hand():
    """One KV head with two query heads whose projections are [1, -1] and [3, 0]; L1 norms 2|v| and 3|v|."""
    values = torch.tensor([1.0, -2.0]).view(1, 1, 2, 1)
    weight = torch.tensor([[1.0, -1.0], [3.0, 0.0]]).view(2, 1, 2)
    torch.testing.assert_close(value_norms(values, weight), torch.tensor([[[2.5, 5.0]]]))


def test_value_norms_equal_the_projection_of_everything_at_once(monkeypatch):
    monkeypatch.setattr("tenure.eviction.ops.naive.PROJECTED_BYTES", 96)
    torch.manual_seed(0)
    values, weight = torch.randn(2, 3, 11, 5), torch.randn(6, 5, 7)
    projected = torch.einsum("bhnd,hgdo->bhgno", values, weight.view(3, 2, 5, 7))
    torch.testing.assert_close(norms_by_parts(values, weight), projected.abs().sum(-1).mean(2))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("tiles", [True, False])
def test_value_norms_of_bf16_numbers_are_not_rounded(monkeypatch, tiles, kernels):
    """With a CPU's matrix units, where it has them, and without."""
    monkeypatch.setenv("TENURE_KERNELS", kernels)
    if not tiles:
        monkeypatch.setattr("tenure.eviction.ops.value_norms.multiplies_bf16_tiles", lambda device: False)
    torch.manual_seed(0)
    values, weight = torch.randn(1, 2, 50, 64).bfloat16(), torch.randn(6, 64, 101).bfloat16()
    norms = value_norms(values, weight)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, norms_by_parts(values, weight), rtol=2e-6, atol=0)
    torch.testing.assert_close(value_norms(values.float(), weight), norms, rtol=2e-6, atol=0)


@pytest.mark.skipif(not multiplies_bf16_tiles(torch.device("cpu")), reason="needs a CPU with AMX")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "columns"), [((2, 3, 11, 32), 7), ((1, 2, 1100, 64), 40), ((3, 1, 331, 96), 33), ((1, 1, 0, 128), 4)]
)
def test_value_norms_in_tiles_are_those_of_the_twin(shape, columns, dtype, threads):
    torch.manual_seed(0)
    values = torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)  # as views of a storage
    weight = torch.randn(columns, 2 * shape[1], shape[3]).to(dtype).permute(1, 2, 0)  # as a layer's W_O is
    kernel = find_tile_kernel(values, weight)
    assert kernel is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norms = norms_in_tiles(kernel, values, weight)
    finally:
        torch.set_num_threads(before)
    rest = 0 if dtype == torch.bfloat16 else 2**-16 * values.shape[3] ** 0.5  # sums of rests that are left out
    torch.testing.assert_close(norms, norms_by_parts(values, weight), rtol=2e-6 + rest, atol=0)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "columns"), [((2, 3, 11, 5), 7), ((1, 2, 500, 64), 40), ((3, 1, 331, 80), 33), ((1, 1, 0, 8), 4)]
)
def test_value_norms_in_c_are_those_of_the_twin(shape, columns, dtype, threads):
    torch.manual_seed(0)
    values, weight = torch.randn(shape).to(dtype), torch.randn(2 * shape[1], shape[3], columns).to(dtype)
    found = find_norm_kernel(values, weight)
    assert found is not None
    in_bf16 = dtype == torch.bfloat16 and shape[3] % 2 == 0 and multiplies_bf16(values.device)
    assert found[1] == (torch.bfloat16 if in_bf16 else torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        norms = norms_in_c(*found, values, weight)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(norms, norms_by_parts(values, weight), rtol=2e-6, atol=0)


def test_value_norms_in_plain_torch(monkeypatch):
    monkeypatch.setenv("TENURE_KERNELS", "reference")
    values, weight = torch.randn(1, 2, 9, 8), torch.randn(4, 8, 6)
    assert find_norm_kernel(values, weight) is None
    assert torch.equal(value_norms(values, weight), norms_by_parts(values, weight))


@pytest.mark.parametrize(
    ("window_mass", "most", "expected"),
    [
        (0.1, 4, [False, True, False, True, True]),  # 0.4 + 0.3 < 0.8 <= 0.4 + 0.3 + 0.15
        (0.3, 4, [False, True, False, True, False]),  # 0.4 < 0.6 <= 0.7
        (0.1, 1, [False, True, False, False, False]),
        (0.95, 4, [False] * 5),  # the window alone covers it
        (0.1, -3, [False] * 5),
    ],
)
def test_mass_protection_by_hand(window_mass, most, expected):
    mean = torch.tensor([[[0.05, 0.4, 0.9, 0.3, 0.15]]])
    counted = torch.tensor([[[True, True, False, True, True]]])
    taken = mass_protection(mean, torch.tensor([[0.9 - window_mass]]), counted, torch.tensor([most]))
    assert taken.tolist() == [[expected]]


def naive_scores(view: LayerView, policy: Defensive, worst: list[list[dict[int, float]]] | None = None) -> torch.Tensor:
    """The scores of a layer in plain loops; `worst` of [row][head] by index replaces the window's own."""
    score = torch.zeros(view.shape)
    heads, group, w, half = view.shape[1], view.num_kv_groups, policy.window, policy.kernel // 2
    for row in range(view.shape[0]):
        time = int(view.time[row])
        observers = [j for j, at in enumerate(view.query_positions[row].tolist()) if at >= 0]
        norm: dict[tuple[int, int], float] = {}
        for head in range(heads):
            for i in view.valid[row, head].nonzero().flatten().tolist():
                parts = [
                    (view.values[row, head, i] @ view.output_weight[head * group + g]).abs().sum().item()
                    for g in range(group)
                ]
                norm[head, int(view.positions[row, head, i])] = sum(parts) / group
        for head in range(heads):
            valid = view.valid[row, head].nonzero().flatten().tolist()
            place = {i: int(view.positions[row, head, i]) for i in valid}
            outside = [i for i in valid if place[i] < time - w]
            high, mean, window_mass = dict.fromkeys(outside, 0.0), dict.fromkeys(outside, 0.0), 0.0
            for g in range(group):
                for j in observers:
                    at = int(view.query_positions[row, j])
                    seen = [i for i in valid if place[i] <= at]
                    query = view.queries[row, head * group + g, j]
                    share = (view.keys[row, head, seen] @ query * view.scaling).softmax(0).tolist()
                    weights = dict(zip(seen, share, strict=True))
                    near = {i: sum(weights[k] for k in range(i - half, i + half + 1) if k in outside) for i in outside}
                    total, pooled = sum(weights[i] for i in outside), sum(near.values())
                    for i in outside:
                        high[i] = max(high[i], near[i] * total / pooled)
                        mean[i] += weights[i] / group / len(observers)
                    window_mass += (1 - total) / group / len(observers)
            if worst is not None:
                high = worst[row][head]
            prior = sum(high.values()) / max(1, len(outside))
            covered, protected = 0.0, set()
            for i in sorted(outside, key=lambda i: -mean[i])[: max(0, int(view.budget[row]) - w)]:
                if covered >= 0.9 - window_mass:
                    break
                covered += mean[i]
                protected.add(i)
            for i in valid:
                value = 1.0
                if policy.value_norm == "heads":
                    value = norm[head, place[i]] / sum(norm[other, place[i]] for other in range(heads))
                elif policy.value_norm == "tokens":
                    value = norm[head, place[i]] / max(1e-30, sum(norm[head, place[k]] for k in outside))
                elif policy.value_norm == "raw":
                    value = norm[head, place[i]]
                kept = i not in outside or i in protected
                score[row, head, i] = float("inf") if kept else max(high[i], prior) * value
    return score


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("options", [{}, {"value_norm": "tokens"}, {"value_norm": "raw"}, {"value_norm": "none"}])
@torch.no_grad()
def test_a_prompt_in_one_forward_equals_loops(tiny_model, prompt, family, options):
    policy = Defensive(window=6, kernel=3, protection="cumulative", **options)
    model, ids = tiny_model(family), prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with evict(model, "full", observe=[policy]) as session:
        cache = session.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        for layer in cache.ragged:
            view = policy.view(layer, cache.tokens_seen, cache.query_positions, torch.tensor([9, 8]))
            conclude(layer, policy, view, torch.ones(2, 1, 1, dtype=torch.bool))
            expected, got = naive_scores(view, policy), policy.score(view)
            torch.testing.assert_close(got[view.valid], expected[view.valid], atol=1e-5, rtol=1e-4)
            assert 0 < got[0].isinf().sum() < got[0].numel()


@torch.no_grad()
def test_the_worst_case_is_the_maximum_over_the_windows_of_all_evictions(tiny_llama, prompt):
    """Chunks of 9, 12 and 6 tokens, an eviction that keeps everything after each but the second; then a fork's own."""
    ids, policy = prompt(1, 27), Defensive(window=6, kernel=3)
    with evict(tiny_llama, "full", observe=[policy]) as session:
        cache = session.new_cache()
        expected = [torch.zeros(1, 2, 27) for _ in range(3)]
        for start, stop, evicts in ((0, 9, True), (9, 21, False), (21, 27, True)):
            tiny_llama(ids[:, start:stop], past_key_values=cache)
            if not evicts:
                continue
            for layer, worst in zip(cache.ragged, expected, strict=True):
                view = policy.view(layer, cache.tokens_seen, cache.query_positions)
                for head in range(2):
                    outside = view.positions[0, head] < stop - 6
                    for g in range(2):
                        for query, place in zip(view.queries[0, head * 2 + g], view.query_positions[0], strict=True):
                            logits = view.keys[0, head] @ query * view.scaling
                            seen = view.positions[0, head] <= place
                            weights = logits.masked_fill(~seen, -torch.inf).softmax(0) * outside
                            near = torch.nn.functional.avg_pool1d(weights.view(1, 1, -1), 3, 1, 1).flatten() * outside
                            part = worst[0, head, :stop]
                            part.copy_(torch.maximum(part, near * weights.sum() / near.sum()))
            cache.compress(policy, budget=stop)
        views = [policy.view(layer, cache.tokens_seen) for layer in cache.ragged]
        for view, worst in zip(views, expected, strict=True):
            torch.testing.assert_close(view.state("worst"), worst, atol=1e-6, rtol=1e-4)
        before = [view.state("worst").clone() for view in views]
        fork = cache.fork()
        tiny_llama(prompt(1, 8), past_key_values=fork)
        fork.compress(policy, budget=35)
        for layer, old in zip(cache.ragged, before, strict=True):
            kept = policy.view(layer, cache.tokens_seen).state("worst")
            assert torch.equal(kept, old), "what the fork concludes is its own"


@torch.no_grad()
def test_a_row_does_not_conclude_when_another_evicts(tiny_llama, prompt):
    """The first row is long enough to evict, the second is not: its states stay as they are."""
    policy, ids = Defensive(window=4), prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    with evict(tiny_llama, policy, 20, sinks=0, recent=4, buffer=4) as session:
        cache = session.new_cache()
        tiny_llama(ids, attention_mask=mask, past_key_values=cache)
        view = policy.view(cache.ragged[0], cache.tokens_seen)
        for name in policy.states:
            state = view.state(name).masked_fill(~view.valid, 0.0)
            assert bool(state[0].any()) and not state[1].any()


@torch.no_grad()
def test_the_value_term_is_that_of_all_heads_when_written(tiny_llama, prompt):
    """Its normalisation over heads survives that the heads keep different tokens."""
    policy = Defensive(window=4)
    with evict(tiny_llama, policy, 0.4, sinks=0, recent=4, buffer=4) as session:
        full, cache = session.new_cache(), session.new_cache()
        ids = prompt(1, 60)
        for start, stop in ((0, 40), (40, 55), (55, 56), (56, 60)):
            tiny_llama(ids[:, start:stop], past_key_values=cache)
        cache.compress()
        cache.check()
        full.plan = full.plan.changed(None, 1.0)
        tiny_llama(ids, past_key_values=full)
        full.compress(budget=60)
        one, other = cache.kept(0)[0]
        assert one.tolist() != other.tolist(), "heads keep different tokens"
        layer = cache.ragged[0]  # its values do not depend on what was evicted
        view = policy.view(layer, cache.tokens_seen)
        whole = policy.view(full.ragged[0], full.tokens_seen)
        expected = whole.state("value").gather(2, view.positions.clamp(min=0))
        torch.testing.assert_close(view.state("value")[view.valid], expected[view.valid], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole.state("value").sum(1), torch.ones(1, 60))


@torch.no_grad()
def test_window_and_mass_are_kept_and_heads_compete(tiny_llama, prompt):
    policy = LayerDefensive(window=6, protection="cumulative")
    with evict(tiny_llama, policy, 0.8, sinks=0, recent=0) as session:
        tiny_llama(prompt(1, 60))
        report = session.report()
        assert report.entries == 48 * 6
        assert len(set(report.lengths.flatten().tolist())) > 1
        for layer in range(3):
            for head in session.last_cache.kept(layer)[0]:
                assert head[-6:].tolist() == list(range(54, 60))


def test_own_entries_are_those_of_the_last_tokens(hand_view):
    view = hand_view(Defensive(window=2), torch.ones(1, 2, 5, 2), lengths=[5, 4])
    assert (own_entries(view, 2) & view.valid).tolist() == [[[False] * 3 + [True] * 2, [False] * 3 + [True, False]]]


@torch.no_grad()
def test_without_mass_only_the_window_is_protected(tiny_llama, prompt):
    policies = [Defensive(window=4, mass=mass, protection="cumulative") for mass in (0.0, 0.9)]
    with evict(tiny_llama, "full", observe=policies) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        counts = []
        for policy in policies:
            view = policy.view(cache.ragged[0], cache.tokens_seen, cache.query_positions, torch.tensor([12]))
            conclude(cache.ragged[0], policy, view, torch.ones(1, 1, 1, dtype=torch.bool))
            counts.append(policy.score(view).isinf().sum(2).flatten().tolist())
    assert counts[0] == [4, 4] and all(count > 4 for count in counts[1])
    with pytest.raises(ValueError, match=r"got 1\.5 as defensive\.mass; accepted: a number from 0 to 1"):
        Defensive(mass=1.5)


def test_released_protection_by_hand():
    """Of 5 entries with the window in the third: shares .05/.9, .4/.9, .3/.9 and .15/.9, and a bias of .15."""
    mean = torch.tensor([[[0.05, 0.4, 0.9, 0.3, 0.15]]])
    counted = torch.tensor([[[True, True, False, True, True]]])
    bias = torch.tensor([[0.15]])
    taken = released_protection(mean, 0.9, counted, bias, torch.tensor([4]))
    assert taken.tolist() == [[[False, True, False, False, False]]], "4/9 < 0.75 <= 7/9: the second would cross"
    more = released_protection(mean, 0.99, counted, bias, torch.tensor([4]))
    assert more.tolist() == [[[False, True, False, True, False]]], "7/9 < 0.84 <= 8.5/9"
    for most in (1, 0, -3):
        fewer = released_protection(mean, 0.99, counted, bias, torch.tensor([most]))
        assert fewer.tolist() == [[[False, most == 1, False, False, False]]]


@torch.no_grad()
def test_released_protection_is_at_the_highest_score_of_the_layer(tiny_llama, prompt):
    policy = Defensive(window=4)
    with evict(tiny_llama, "full", observe=[policy]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 40), past_key_values=cache)
        view = policy.view(cache.ragged[0], cache.tokens_seen, cache.query_positions, torch.tensor([12]))
        conclude(cache.ragged[0], policy, view, torch.ones(1, 1, 1, dtype=torch.bool))
        score = policy.score(view)
    assert score.isfinite().all()
    highest = (score == score.max()).sum(2).flatten().tolist()
    assert all(4 < count <= 12 for count in highest) and (score[:, :, -4:] == score.max()).all()


@torch.no_grad()
def test_options_of_the_papers_comparison(tiny_llama, prompt):
    """Mean aggregation, no prior and a fixed one, against the steps by hand."""
    plain = {"window": 6, "kernel": 3, "value_norm": "none", "mass": 0.0, "protection": "cumulative"}
    policies = {
        "mean": Defensive(aggregation="mean", prior="none", **plain), "none": Defensive(prior="none", **plain),
        "fixed": Defensive(prior=0.1, **plain),
    }  # fmt: skip
    with evict(tiny_llama, "full", observe=list(policies.values())) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 30), past_key_values=cache)
        scores = {}
        for name, policy in policies.items():
            view = policy.view(cache.ragged[0], cache.tokens_seen, cache.query_positions)
            conclude(cache.ragged[0], policy, view, torch.ones(1, 1, 1, dtype=torch.bool))
            scores[name] = policy.score(view)[..., :24]
        counted = view.valid & (view.positions < 24)  # pyright: ignore[reportPossiblyUnboundVariable]
        pooled = pool_and_renormalise(view.window_attention, counted, 3)[..., :24]  # pyright: ignore[reportPossiblyUnboundVariable]
    torch.testing.assert_close(scores["mean"], pooled.mean((2, 3)))
    torch.testing.assert_close(scores["none"], pooled.amax((2, 3)))
    torch.testing.assert_close(scores["fixed"], pooled.amax((2, 3)).clamp(min=0.1))
    assert (scores["fixed"] == 0.1).any() and (scores["fixed"] > 0.1).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protection": "none"}, "got 'none' as defensive.protection; accepted: released, cumulative"),
        ({"aggregation": "median"}, "got 'median' as defensive.aggregation; accepted: max, mean"),
        ({"prior": "max"}, "got 'max' as defensive.prior; accepted: mean, none or a number from 0 to 1"),
        ({"prior": 2.0}, "got 2.0 as defensive.prior; accepted: mean, none or a number from 0 to 1"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Defensive(**options)
