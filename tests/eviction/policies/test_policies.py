"""Every policy in one matrix: what it says of itself, its options, and the form of its scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tenure.eviction import (
    CAKE,
    H2O,
    RKV,
    TOVA,
    AdaCriticalKV,
    AdaKV,
    CriticalKV,
    Defensive,
    ExpectedAttention,
    Full,
    GateScore,
    KeyDiff,
    Knorm,
    LagKV,
    LayerDefensive,
    LayerView,
    Policy,
    PyramidKV,
    Random,
    Retention,
    RetentionDefensive,
    SnapKV,
    StreamingLLM,
    get_policy,
    policy_names,
)
from tenure.eviction.policies.policy import NEEDS

MATRIX: list[Policy] = [
    Retention(),
    Retention(lookahead=64),
    GateScore(),
    SnapKV(window=8),
    SnapKV(window=6, kernel=3, pool="max"),
    AdaKV(window=8),
    PyramidKV(window=8),
    CriticalKV(window=4),
    AdaCriticalKV(window=4),
    Defensive(window=8),
    Defensive(window=4, kernel=3, value_norm="tokens"),
    LayerDefensive(window=4, value_norm="none"),
    *(RetentionDefensive(window=4, combine=how) for how in ("prior", "max", "product", "rank")),
    ExpectedAttention(),
    LagKV(lag=4),
    RKV(window=4),
    CAKE(window=4),
    TOVA(),
    H2O(),
    KeyDiff(),
    Knorm(),
    StreamingLLM(),
    Random(seed=3),
    Full(),
]


@pytest.mark.parametrize("policy", MATRIX, ids=str)
def test_scores_have_the_shape_of_the_view_and_are_numbers(views, policy):
    def use(view: LayerView) -> None:
        before = view.keys.clone()
        score = policy.score(view)
        assert score.shape == view.shape == view.valid.shape
        assert score.dtype == torch.float32
        assert not score[view.valid].isnan().any()
        assert (score[view.valid] > -torch.inf).all()
        assert torch.equal(view.keys, before), "a policy writes to nothing"
        assert torch.equal(policy.score(view), score), "and gives the same twice"

    views(policy, use)


@pytest.mark.parametrize("policy", MATRIX, ids=str)
def test_a_policy_is_a_frozen_dataclass_that_says_what_it_needs(policy):
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.window = 1
    assert policy.needs <= set(NEEDS)
    assert (policy.window_size > 0) == ("queries" in policy.needs)
    assert get_policy(policy) is policy
    assert type(get_policy(policy.name)) is type(policy)


def test_names_are_listed_when_one_is_unknown():
    assert set(policy_names()) == {policy.name for policy in MATRIX}
    with pytest.raises(ValueError, match=r"unknown policy 'lru'; known: ada_criticalkv, .*, streaming_llm, tova"):
        get_policy("lru")


def test_options_are_given_by_name():
    assert get_policy("retention", lookahead=64) == Retention(lookahead=64)
    assert get_policy(SnapKV(window=8), kernel=3) == SnapKV(window=8, kernel=3)
    with pytest.raises(ValueError, match="policy 'retention' has no option window; known: lookahead, threshold"):
        get_policy("retention", window=8)
    with pytest.raises(ValueError, match="policy 'full' has no option window; known: none"):
        get_policy("full", window=8)
    with pytest.raises(ValueError, match=r"got 0 as snapkv\.window; accepted: a whole number from 1 to"):
        get_policy("snapkv", window=0)


def test_defaults_of_those_that_share_a_budget_between_heads():
    defaults = {one.name: (one.default_scope, one.default_floor) for one in map(get_policy, policy_names())}
    alone = {name for name, (scope, floor) in defaults.items() if scope == "head" and not floor}
    assert {name: defaults[name] for name in defaults.keys() - alone} == {
        "ada_criticalkv": ("layer", 0.2),
        "adakv": ("layer", 0.2),
        "cake": ("preference", 0.0),
        "defensive": ("layer", 0.0),
        "gate_score": ("global", 0.0),
        "layer_defensive": ("global", 0.0),
        "pyramidkv": ("pyramid", 0.0),
        "retention": ("global", 0.0),
        "retention_defensive": ("global", 0.0),
    }


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapkv", {"window": 0}, "got 0 as snapkv.window; accepted: a whole number from 1 to 65536"),
        ("snapkv", {"window": 10**9}, "got 1000000000 as snapkv.window; accepted: a whole number from 1 to 65536"),
        ("random", {"seed": "x"}, "got 'x' as random.seed; accepted: a whole number"),
        ("defensive", {"mass": float("nan")}, "got nan as defensive.mass; accepted: a number from 0 to 1"),
        ("snapkv", {"kernel": 4}, "SnapKV's kernel must be odd, got 4"),
        ("adakv", {"kernel": 0}, "got 0 as adakv.kernel; accepted: a whole number from 1"),
        ("snapkv", {"pool": "median"}, "got 'median' as snapkv.pool; accepted: avg, max"),
        ("criticalkv", {"first_stage": 1.5}, "got 1.5 as criticalkv.first_stage; accepted: a number from 0 to 1"),
        ("criticalkv", {"epsilon": -1.0}, "got -1.0 as criticalkv.epsilon; accepted: a number of 0 or more"),
        ("defensive", {"window": 0}, "got 0 as defensive.window; accepted: a whole number from 1"),
        ("layer_defensive", {"kernel": 2}, "LayerDefensive's kernel must be odd, got 2"),
        ("defensive", {"value_norm": "keys"}, "got 'keys' as defensive.value_norm; accepted: heads, tokens, raw, none"),
        ("retention_defensive", {"combine": "sum"}, "got 'sum' as retention_defensive.combine; accepted: prior, max"),
        ("expected_attention", {"future": 0}, "got 0 as expected_attention.future; accepted: a whole number from 1"),
        ("expected_attention", {"epsilon": -1.0}, "got -1.0 as expected_attention.epsilon; accepted: a number"),
        ("lagkv", {"lag": 0}, "got 0 as lagkv.lag; accepted: a whole number from 1"),
        ("lagkv", {"first": -1}, "got -1 as lagkv.first; accepted: a whole number from 0"),
        ("h2o", {"recent": 2.0}, "got 2.0 as h2o.recent; accepted: a number from 0 to 1"),
        ("retention", {"lookahead": 0}, "got 0 as retention.lookahead; accepted: a whole number from 1"),
        (
            "retention",
            {"threshold": 1.0},
            "got 1.0 as retention.threshold; accepted: a number above 0 and below 1 or nothing",
        ),
        ("rkv", {"window": 0}, "got 0 as rkv.window; accepted: a whole number from 1"),
        ("rkv", {"mix": 1.5}, "got 1.5 as rkv.mix; accepted: a number from 0 to 1"),
        ("rkv", {"threshold": 2.0}, "got 2.0 as rkv.threshold; accepted: a number from -1 to 1"),
        ("cake", {"window": 1}, "got 1 as cake.window; accepted: a whole number from 2"),
        ("cake", {"gamma": -1.0}, "got -1.0 as cake.gamma; accepted: a number of 0 or more"),
        ("cake", {"tau_entropy": 0.0}, "got 0.0 as cake.tau_entropy; accepted: a number above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_policy(name, **options)
