"""Sampling parameters: every value is checked by name, and nothing of the caller's is kept by reference."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tenure.checked import read
from tenure.serving.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "got -0.1 as temperature; accepted: a number from 0 to 100"),
        ({"temperature": float("nan")}, "got nan as temperature"),
        ({"temperature": True}, "got True as temperature"),
        ({"top_p": 0}, "got 0 as top_p; accepted: a number above 0 and up to 1"),
        ({"top_p": 1.5}, "got 1.5 as top_p"),
        ({"top_k": -2}, "got -2 as top_k; accepted: a whole number from -1 to 2.14748e+09"),
        ({"top_k": 2**31}, "got 2147483648 as top_k"),  # no tensor of the sampler holds it
        ({"min_new_tokens": 2**70}, "min_new_tokens"),
        ({"top_k": 2.5}, "got 2.5 as top_k"),
        ({"min_p": 1.01}, "got 1.01 as min_p"),
        ({"seed": 2**63}, "as seed"),
        ({"seed": "7"}, "got '7' as seed"),
        ({"presence_penalty": 2.1}, "got 2.1 as presence_penalty; accepted: a number from -2 to 2"),
        ({"frequency_penalty": -3}, "got -3 as frequency_penalty"),
        ({"repetition_penalty": 0}, "got 0 as repetition_penalty; accepted: a number from 0.01 to 100"),
        ({"logit_bias": {3: 101}}, "got 101 as logit_bias.3; accepted: a number from -100 to 100"),
        ({"logit_bias": {-1: 1}}, "got -1 as a key of logit_bias; accepted: a whole number of 0 or more"),
        ({"logit_bias": {"x": 1}}, "got 'x' as a key of logit_bias"),
        ({"logit_bias": {1: 1, "01": 2}}, "got a number twice as a key of logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "got 1025 fields as logit_bias; accepted: 0 to 1024 fields"),
        ({"logit_bias": [1]}, "got a list as logit_bias; accepted: a mapping"),
        ({"logprobs": 21}, "got 21 as logprobs; accepted: a whole number from 0 to 20 or nothing"),
        ({"stop": "x"}, "got 'x' as stop; accepted: a list of 0 to 16 items, each text of 1 to 256 characters"),
        ({"stop": ("",)}, "got '' as stop[0]; accepted: text of 1 to 256 characters"),
        ({"stop": ("x" * 257,)}, "as stop[0]; accepted: text of 1 to 256 characters"),
        ({"stop": ("x",) * 17}, "got a list of 17 as stop"),
        ({"stop_token_ids": (-1,)}, "got -1 as stop_token_ids[0]"),
        ({"ignore_eos": 1}, "got 1 as ignore_eos; accepted: true or false"),
        ({"min_new_tokens": -1}, "got -1 as min_new_tokens"),
        ({"n": 0}, "got 0 as n; accepted: a whole number from 1 to 128"),
        ({"make_mask": 3}, "got 3 as make_mask; accepted: something callable or nothing"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**changes)
    assert message in str(error.value)


def test_the_callers_mapping_may_change_and_json_has_ids_as_digits() -> None:
    bias = {5: 1.5}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 1.0
    assert params.logit_bias == {5: 1.5}
    assert read(SamplingParams, {"logit_bias": {"5": 1.5}, "stop": ["a"]}).logit_bias == params.logit_bias
    assert hash(params) == hash(SamplingParams(logit_bias={5: 1.5})) and params == SamplingParams(logit_bias={5: 1.5})


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    for name, params in (
        ("logit_bias", SamplingParams(logit_bias={10: 1.0})),
        ("stop_token_ids", SamplingParams(stop_token_ids=(3, 10))),
    ):
        params.check_vocab(11)
        with pytest.raises(ValueError, match=f"got token id 10 in {name}; accepted: 0 to 9"):
            params.check_vocab(10)


def test_choices_have_seeds_of_their_own() -> None:
    params = SamplingParams(seed=5, n=100)
    seeds = [params.for_choice(index).seed for index in range(100)]
    assert seeds[0] == 5 and len(set(seeds)) == 100 and params.for_choice(1).n == 1
    others = [SamplingParams(seed=6, n=100).for_choice(index).seed for index in range(100)]
    assert not set(seeds) & set(others), "choices of neighbouring seeds differ"
    assert SamplingParams(n=2).for_choice(1).seed is None
    with pytest.raises(ValueError, match="got choice 2 of n=2; accepted: 0 to 1"):
        SamplingParams(n=2).for_choice(2)


def test_parameters_and_stop_texts_need_no_torch() -> None:
    modules = "tenure.serving.sampling.params, tenure.serving.sampling.stop"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
