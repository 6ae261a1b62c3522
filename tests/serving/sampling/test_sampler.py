"""The batched sampler against transformers' processors, its random numbers, and what one row cannot do to others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tenure.serving.sampling.params import FinishedBy, SamplingParams
from tenure.serving.sampling.row import SamplerRow
from tenure.serving.sampling.sampler import Sampler, SamplingError, _CumulativeSums

VOCAB, EOS = 131, 2  # no multiple of the block size
PROMPT = [5, 6, 7, 7, 100]


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def expected(logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> np.ndarray:
    """The distribution by transformers' processors, and plain loops where it has none: `(vocab,)`."""
    scores: Any = logits.float().clone()[None]
    for token, bias in params.logit_bias.items():
        scores[0, token] += bias
    before: Any = torch.tensor([[*prompt, *output]])
    scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(before, scores)
    for token, count in Counter(output).items():
        scores[0, token] -= params.presence_penalty + params.frequency_penalty * count
    steps: list[Callable[..., Any]] = [TemperatureLogitsWarper(params.temperature)]
    steps += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    steps += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
    steps += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for step in steps:
        scores = step(before, scores)
    return scores[0].double().softmax(-1).numpy()


ALL: dict[str, Any] = {
    "temperature": 0.8, "min_p": 0.01, "top_k": 40, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.7,
    "repetition_penalty": 1.3, "logit_bias": {5: 2.0, 9: -100.0, 50: 1.0},
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 13},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.9999},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 2.0, "min_p": 0.02, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.02, "top_k": 20},
    {"temperature": 1.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 0.5},
    {"temperature": 1.0, "presence_penalty": 2.0},
    {"temperature": 1.0, "frequency_penalty": -1.0},
    {"temperature": 1.0, "logit_bias": {0: 5.0, 130: 7.5, 3: -100.0}},
    ALL,
]


LARGE: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 200},
    {"temperature": 3.0, "top_k": 128},
    {"temperature": 2.0, "top_k": 256},
    {"temperature": 3.0, "top_k": 300, "top_p": 0.99, "min_p": 1e-3},
    {"temperature": 3.0, "top_p": 0.97, "min_p": 1e-3},
]  # of more than a block


@pytest.mark.parametrize(
    ("options", "vocab"), [(each, VOCAB) for each in OPTIONS] + [(each, 700) for each in LARGE], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distribution_is_that_of_transformers(options, vocab, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With evenly spaced numbers in place of random ones each token is drawn in proportion, to one draw."""
    count, output = 1000, [8, 8, 9, 5]
    logits = logits_of(1, vocab, seed=len(str(options)))
    if dtype is torch.bfloat16:  # no ties, of which transformers keeps more than top_k
        ranks = torch.randperm(vocab, generator=torch.Generator().manual_seed(1))
        logits = (ranks.to(torch.int16) + 0x3F80).view(torch.bfloat16)[None]  # one after the other from 1
    assert len(logits.unique()) == vocab
    monkeypatch.setattr(SamplerRow, "uniform", lambda row: (row.seed + 0.5) / count)
    sampler = Sampler(vocab)
    rows = [sampler.new_row(SamplingParams(seed=number, **options), PROMPT, output) for number in range(count)]
    result = sampler.sample(logits.expand(count, -1), rows)
    assert result.errors == [None] * count
    wanted = expected(logits[0], SamplingParams(**options), PROMPT, output)
    drawn = np.bincount(result.tokens, minlength=vocab) / count
    assert np.abs(drawn - wanted).max() < 1.01 / count
    assert not drawn[wanted == 0].any()


def test_sampled_frequencies_pass_a_chi_square_test() -> None:
    """Seeds next to each other and places next to each other are independent draws."""
    count, steps, vocab = 1000, 10, 40
    logits = logits_of(1, vocab, scale=1.0)
    kinds: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 12, "top_p": 0.9}]
    for options in kinds:
        sampler = Sampler(vocab)
        rows = [sampler.new_row(SamplingParams(seed=seed, **options), ()) for seed in range(count)]
        tokens = np.array([sampler.sample(logits.expand(count, -1), rows).tokens for _ in range(steps)])
        wanted = expected(logits[0], SamplingParams(**options), (), ())
        kept = wanted > 0
        assert kept[tokens].all()
        assert chisquare(np.bincount(tokens.ravel(), minlength=vocab)[kept], wanted[kept] * tokens.size).pvalue > 1e-3
        chance = float((wanted**2).sum())
        for equal in (tokens[1:] == tokens[:-1], tokens[:, 1:] == tokens[:, :-1]):
            assert abs(equal.mean() - chance) < 5 * (chance / equal.size) ** 0.5


def mixed_rows(sampler: Sampler, count: int) -> list[SamplerRow]:
    """Rows of every kind."""
    kinds: list[dict[str, Any]] = [{}, {"logprobs": 3}, *OPTIONS, ALL | {"logprobs": 20}, {"presence_penalty": 1.0}]
    kinds += [{"temperature": 1.0, "make_mask": EvenTokens}, {"make_mask": EvenTokens, "logprobs": 0}]
    return [
        sampler.new_row(SamplingParams(seed=number, **kinds[number % len(kinds)]), PROMPT) for number in range(count)
    ]


class EvenTokens:
    """Allows even tokens; as bits at every second token."""

    is_finished = False

    def allowed(self, tokens: Sequence[int]) -> torch.Tensor | None:
        if len(tokens) % 2:
            return torch.full((-(-VOCAB // 32),), 0x55555555, dtype=torch.int32)
        return torch.arange(VOCAB) % 2 == 0

    def accept(self, token: int) -> None:
        assert token % 2 == 0


def test_a_row_is_independent_of_its_mates_and_of_the_order() -> None:
    count, steps = 44, 4
    sampler = Sampler(VOCAB, [EOS])
    logits = [logits_of(count, seed=step) for step in range(steps)]
    alone = mixed_rows(sampler, count)
    wanted = [[sampler.sample(each[number][None], [row]) for number, row in enumerate(alone)] for each in logits]
    together, shuffled = mixed_rows(sampler, count), random.Random(0)
    for step, each in enumerate(logits):
        present = shuffled.sample(range(count), count if step == 0 else count - 1)
        absent = set(range(count)) - set(present)
        result = sampler.sample(each[present], [together[number] for number in present])
        for place, number in enumerate(present):
            reference = wanted[step][number]
            assert result.errors[place] is None
            assert result.tokens[place] == reference.tokens[0]
            assert result.logprobs[place] == reference.logprobs[0]
        for number in absent:  # such a row is paused for a step
            sampler.sample(each[number][None], [together[number]])


def test_an_answer_is_resumed_where_it_was() -> None:
    sampler = Sampler(VOCAB, [EOS])
    whole = sampler.new_row(SamplingParams(seed=3, min_new_tokens=4, **ALL), PROMPT)
    steps = [logits_of(1, seed=seed, scale=1.0) for seed in range(12)]
    for each in steps:
        sampler.sample(each, [whole])
    for cut in (1, 3, 4, 9):
        rest = sampler.new_row(
            SamplingParams(seed=3, min_new_tokens=4, **ALL), torch.tensor(PROMPT), whole.tokens[:cut]
        )
        for each in steps[cut:]:
            sampler.sample(each, [rest])
        assert rest.tokens == whole.tokens


def test_without_a_seed_answers_differ() -> None:
    sampler = Sampler(VOCAB)
    rows = [sampler.new_row(SamplingParams(temperature=1.0), ()) for _ in range(8)]
    for _ in range(8):
        sampler.sample(torch.zeros(8, VOCAB), rows)
    assert len({tuple(row.tokens) for row in rows}) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_fast_path_gives_what_the_general_one_gives(dtype: torch.dtype) -> None:
    logits = (logits_of(9).round() if dtype is torch.float32 else logits_of(9)).to(dtype)  # with ties
    logits[3, 7] = torch.nan
    logits[4] = -torch.inf
    logits[5, 1:] = -torch.inf
    sampler = Sampler(VOCAB)
    plain = [sampler.new_row(SamplingParams(), ()) for _ in range(9)]
    mixed = [sampler.new_row(SamplingParams(temperature=float(number == 8), seed=1), ()) for number in range(9)]
    fast, slow = sampler.sample(logits, plain), sampler.sample(logits, mixed)
    assert all(row.plain for row in plain) and not mixed[8].plain
    assert fast.tokens[:8] == slow.tokens[:8]
    assert [str(one) for one in fast.errors] == [str(one) for one in slow.errors]
    good = [0, 1, 2, 5, 6, 7]
    assert [fast.tokens[row] for row in good] == logits.float().argmax(-1)[good].tolist()


def test_equal_logits_are_ranked_by_id() -> None:
    sampler = Sampler(VOCAB)
    logits = torch.zeros(200, VOCAB)
    logits[:, 10:20] = 1.0
    for top_k, wanted in ((1, {10}), (3, {10, 11, 12}), (12, {*range(10, 20), 0, 1})):
        rows = [sampler.new_row(SamplingParams(temperature=0.9, top_k=top_k, seed=seed), ()) for seed in range(200)]
        assert set(sampler.sample(logits, rows).tokens) == wanted


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 100.0])
def test_extreme_temperatures(temperature: float) -> None:
    sampler = Sampler(VOCAB)
    logits = logits_of(100) * 1000
    rows = [sampler.new_row(SamplingParams(temperature=temperature, top_p=0.999, seed=seed), ()) for seed in range(100)]
    result = sampler.sample(logits, rows)
    assert result.errors == [None] * 100
    if temperature < 1:
        assert result.tokens == logits.argmax(-1).tolist()
    assert SamplingParams(temperature=0.9e-5).greedy


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the ends of the unit interval, with most of the mass in the last token, or in many blocks."""
    monkeypatch.setattr(SamplerRow, "uniform", lambda row: (0.0, 1 - 2.0**-52, 0.5)[row.seed])
    for vocab in (1, 127, 128, 129, 1000):
        logits = torch.full((1, vocab), -torch.inf)
        logits[0, [vocab // 2, vocab - 1]] = torch.tensor([-3.0, 4.0])
        sampler = Sampler(vocab)
        kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9999}, {"top_k": 2}, {"min_p": 1e-9}]
        for options in kinds:
            params = [SamplingParams(temperature=1.0, seed=seed, **options) for seed in range(3)]
            result = sampler.sample(logits.expand(3, -1), [sampler.new_row(one, ()) for one in params])
            assert set(result.tokens) <= {vocab // 2, vocab - 1}, (vocab, options)
            in_rank_order = "top_p" in options or "top_k" in options
            ends = [vocab - 1, vocab // 2] if in_rank_order else [vocab // 2, vocab - 1]
            assert result.tokens[:2] == ends, (vocab, options)


def test_cumulative_sums_are_searched_by_blocks() -> None:
    """As if all sums were there, up to rounding, and never to a place without weight."""
    weights = torch.rand(300, 512, generator=torch.Generator().manual_seed(0))
    weights[:, 100:128] = weights[:, 250:300] = weights[:, 500:] = 0.0
    sums, whole = _CumulativeSums(weights), weights.double().cumsum(-1)
    assert torch.allclose(sums.total, whole[:, -1], rtol=1e-6)
    places = torch.arange(300)
    assert torch.allclose(sums.at(places), whole[places, places], rtol=1e-6)
    below = 1 - 2.0**-52
    for name, target in {
        "anywhere": torch.rand(300, dtype=torch.float64) * sums.total,
        "block": sums.at(torch.full((300,), 127)),
        "rounded": sums._blocks[:, 1] * below,
        "last": sums.total * below,
    }.items():
        for right in (False, True):
            found, total = sums.find(target, right)
            assert (weights.gather(1, found[:, None]) > 0).all(), name
            assert torch.allclose(whole.gather(1, found[:, None]).squeeze(1), total, rtol=1e-6)
            assert (total >= target * (1 - 1e-6)).all()
            assert (total - weights.gather(1, found[:, None]).squeeze(1) <= target * (1 + 1e-6)).all()


def test_rounding_leads_to_no_token_beyond_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplerRow, "uniform", lambda row: 1 - 2.0**-52)
    sampler, logits = Sampler(700), logits_of(500, 700, scale=0.1)
    for top_k in (127, 128, 256, 384):
        rows = [sampler.new_row(SamplingParams(temperature=1.0, top_k=top_k), ()) for _ in range(500)]
        tokens = torch.tensor(sampler.sample(logits, rows).tokens)[:, None]
        ranks = (logits > logits.gather(1, tokens)).sum(-1)
        assert ranks.tolist() == [top_k - 1] * 500


def test_log_probabilities_are_of_the_models_own_distribution() -> None:
    sampler = Sampler(VOCAB, [EOS])
    logits = logits_of(3)
    options: list[dict[str, Any]] = [ALL | {"logprobs": 5}, {"logprobs": 0}, {}]
    rows = [sampler.new_row(SamplingParams(seed=1, **each), PROMPT) for each in options]
    result = sampler.sample(logits, rows)
    reference = logits.log_softmax(-1)
    first, second, third = result.logprobs
    assert first is not None and second is not None and third is None
    assert first.logprob == pytest.approx(float(reference[0, result.tokens[0]]), abs=1e-5)
    top = reference[0].topk(5)
    assert list(first.top_ids) == top.indices.tolist()
    assert first.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)
    assert second.logprob == pytest.approx(float(reference[1].max()), abs=1e-5)
    assert second.top_ids == second.top_logprobs == ()
    few = Sampler(4)
    (logprobs,) = few.sample(logits[:1, :4], [few.new_row(SamplingParams(logprobs=20), ())]).logprobs
    assert logprobs is not None and len(logprobs.top_ids) == 4


class Broken:
    """A token mask that fails where it is asked to."""

    is_finished = False

    def __init__(self, mask: Any = None, accept: bool = True) -> None:
        self.mask, self.accepts = mask, accept

    def allowed(self, tokens: Sequence[int]) -> Any:
        if isinstance(self.mask, str):
            raise RuntimeError(self.mask)
        return self.mask

    def accept(self, token: int) -> None:
        if not self.accepts:
            raise KeyError("no such state")


def test_a_row_that_fails_fails_alone() -> None:
    broken: list[tuple[dict[str, Any], float | None, type[Exception], str]] = [
        ({"make_mask": lambda: Broken("the grammar is broken")}, None, RuntimeError, "the grammar is broken"),
        ({"make_mask": lambda: Broken(torch.ones(5, dtype=torch.bool))}, None, ValueError,
         "got a token mask of torch.bool (5,) on cpu; accepted: torch.bool (131,) or torch.int32 (5,) in CPU memory"),
        ({"make_mask": lambda: Broken([1])}, None, ValueError, "got a token mask of list; accepted: torch.bool (131,)"),
        ({"make_mask": lambda: Broken(None, accept=False)}, None, KeyError, "no such state"),
        ({"make_mask": lambda: Broken(torch.zeros(VOCAB, dtype=torch.bool))}, None, SamplingError,
         "no token is left for token 1 of the answer: the token mask, logit_bias and min_new_tokens exclude all"),
        ({}, torch.nan, SamplingError, "the model's largest logit is nan for token 1 of the answer; accepted: a"),
        ({}, -torch.inf, SamplingError, "the model's largest logit is -inf for token 1"),
        ({"logit_bias": {3: 1.0}}, torch.inf, SamplingError, "the model's largest logit is inf for token 1"),
    ]  # fmt: skip
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}]
    for extra in kinds:
        sampler = Sampler(VOCAB)
        count = len(broken)
        logits = logits_of(2 * count)
        rows = [sampler.new_row(SamplingParams(seed=1, **extra | options), ()) for options, *_ in broken]
        good = [sampler.new_row(SamplingParams(seed=7, **extra), ()) for _ in broken]
        reference = sampler.sample(
            logits[count:], [sampler.new_row(SamplingParams(seed=7, **extra), ()) for _ in broken]
        )
        for row, (_, fill, _, _) in enumerate(broken):
            if fill is not None:
                logits[row] = fill
        result = sampler.sample(logits, [*rows, *good])
        for row, (_, _, kind, message) in enumerate(broken):
            error = result.errors[row]
            assert isinstance(error, kind) and message in str(error), (extra, row, error)
            assert result.tokens[row] == -1 and result.logprobs[row] is None
        assert result.errors[count:] == [None] * count
        assert result.tokens[count:] == reference.tokens and result.logprobs[count:] == reference.logprobs


def test_a_mask_limits_the_tokens_and_ends_the_answer() -> None:
    class OneWord(Broken):
        """Tokens 20, 30 and then nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.left = [20, 30]

        def allowed(self, tokens: Sequence[int]) -> torch.Tensor:
            assert list(tokens) == [20, 30][: len(tokens)]
            return torch.arange(VOCAB) == self.left[0]

        def accept(self, token: int) -> None:
            assert token == self.left.pop(0)

        @property
        def is_finished(self) -> bool:
            return not self.left

    sampler = Sampler(VOCAB)
    rows = [sampler.new_row(SamplingParams(temperature=heat, make_mask=OneWord), ()) for heat in (0.0, 1.0)]
    first, second = sampler.sample(logits_of(2), rows), sampler.sample(logits_of(2), rows)
    assert first.tokens == [20, 20] and first.finished == [None, None]
    assert second.tokens == [30, 30] and second.finished == [FinishedBy.MASK, FinishedBy.MASK]


def test_the_tokens_that_end_an_answer() -> None:
    logits = torch.zeros(5, VOCAB)
    logits[:, EOS], logits[:, 9], logits[:, 4] = 3.0, 2.0, 1.0
    logits[1, 9] = 5.0
    options: list[dict[str, Any]] = [
        {}, {"stop_token_ids": (9,)}, {"ignore_eos": True},
        {"min_new_tokens": 2, "stop_token_ids": (9,)},
        {"min_new_tokens": 1, "temperature": 1.0, "top_k": 1, "logit_bias": {EOS: -1.5}},
    ]  # fmt: skip
    sampler = Sampler(VOCAB, [EOS])
    rows = [sampler.new_row(SamplingParams(**each), ()) for each in options]
    steps = [sampler.sample(logits, rows) for _ in range(3)]
    assert [one.tokens for one in steps] == [[EOS, 9, EOS, 4, 9], [EOS, 9, EOS, 4, 9], [EOS, 9, EOS, EOS, 9]]
    assert [one.finished for one in steps] == [
        [FinishedBy.EOS, FinishedBy.STOP_TOKEN, None, None, None],
        [FinishedBy.EOS, FinishedBy.STOP_TOKEN, None, None, None],
        [FinishedBy.EOS, FinishedBy.STOP_TOKEN, None, FinishedBy.EOS, None],
    ]


def test_bad_calls_are_refused_before_anything_changes() -> None:
    sampler = Sampler(VOCAB)
    row = sampler.new_row(SamplingParams(), ())
    for logits in (torch.zeros(2, VOCAB), torch.zeros(1, VOCAB + 1), torch.zeros(1, VOCAB, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"got logits of shape .*; accepted: \(1, 131\) of a floating-point dtype"):
            sampler.sample(logits, [row])
    assert row.tokens == []
    with pytest.raises(ValueError, match="got token id 131 in logit_bias; accepted: 0 to 130"):
        sampler.new_row(SamplingParams(logit_bias={131: 1.0}), ())
    for prompt, output, message in (([-1], (), "-1 in the prompt"), ([3], [131], "131 in the answer so far")):
        with pytest.raises(ValueError, match=f"got token id {message}; accepted: 0 to 130"):
            sampler.new_row(SamplingParams(repetition_penalty=1.1), prompt, output)
    empty = sampler.sample(torch.zeros(0, VOCAB), [])
    assert empty.tokens == empty.errors == []


def test_long_answers_are_counted() -> None:
    """Counts of more tokens than there is room for at first."""
    sampler, vocab_size = Sampler(1000), 1000
    params = SamplingParams(frequency_penalty=0.01, presence_penalty=0.1, logit_bias={999: 1.0})
    output = random.Random(0).choices(range(vocab_size), k=2000)
    changes = sampler.new_row(params, (), output).changes
    assert changes is not None
    counts = Counter(output)
    ids = changes.ids.tolist()
    assert sorted(ids) == sorted({*counts, 999})
    assert changes.values[2].tolist() == pytest.approx([0.1 + 0.01 * counts[one] if counts[one] else 0 for one in ids])


@pytest.mark.parametrize("plain", [True, False])
def test_one_copy_from_the_device_a_step(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every other way to read a value, or a size that depends on one, is an error."""
    sampler, copies = Sampler(VOCAB, [EOS]), []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        copies.append(tensor)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    rows = [sampler.new_row(SamplingParams(), ()) for _ in range(30)] if plain else mixed_rows(sampler, 30)
    for _ in range(2):
        result = sampler.sample(torch.zeros(30, VOCAB, dtype=torch.bfloat16, device="meta"), rows)
        assert result.tokens == [0] * 30
    assert [one.device.type for one in copies] == ["meta", "meta"]


def test_steps_inside_and_outside_of_inference_mode() -> None:
    sampler = Sampler(VOCAB)
    row = sampler.new_row(SamplingParams(temperature=1.0, top_p=0.9), ())
    with torch.inference_mode():
        sampler.sample(logits_of(1), [row])
    logits = logits_of(1).requires_grad_()
    sampler.sample(logits, [row])
    sampler.sample(logits, [sampler.new_row(SamplingParams(), ())])
    assert len(row.tokens) == 2
