"""Every way to combine learned retention with the worst case, by hand, and as an option of the policy."""

from __future__ import annotations

import pytest
import torch

from tenure.eviction import Defensive, RetentionDefensive, evict, get_policy
from tenure.eviction.policies.retention_defensive import COMBINATIONS, combine
from tenure.eviction.selection import conclude

WORST = torch.tensor([[[0.6, 0.1, 0.2, 0.1, 7.0]]])  # mean 0.25, maximum 0.6
RETENTION = torch.tensor([[[0.2, 0.8, 0.4, 0.2, 0.99]]])  # mean 0.4, maximum 0.8
COUNTED = torch.tensor([[[True, True, True, True, False]]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("prior", [0.6, 0.5, 0.25, 0.125]),  # 0.25 / 0.4 times the retention: 0.125, 0.5, 0.25, 0.125
        ("max", [0.6, 0.6, 0.3, 0.15]),  # 0.6 / 0.8 times the retention: 0.15, 0.6, 0.3, 0.15
        ("product", [0.12, 0.2, 0.1, 0.05]),  # the risk 0.6, 0.25, 0.25, 0.25
        ("rank", [1.0, 1.0, 0.75, 0.5]),  # of w: 1, 1/2, 3/4, 1/2; of r: 1/2, 1, 3/4, 1/2
    ],
)
def test_combinations_by_hand(how, expected):
    risk = combine(how, WORST, RETENTION.log(), COUNTED)
    torch.testing.assert_close(risk[0, 0, :4], torch.tensor(expected))


@pytest.mark.parametrize("how", COMBINATIONS)
def test_retentions_below_the_smallest_number_are_no_trap(how):
    """Old entries have a retention of exp(-1000) and less; all counted out gives numbers too."""
    faded = torch.tensor([[[-1000.0, -1200.0, -900.0, -3000.0, -1.0]]])
    risk = combine(how, WORST, faded, COUNTED)
    assert risk[0, 0, :4].isfinite().all()
    if how in ("prior", "max"):
        assert risk[0, 0, 2] == risk[0, 0, :4].amax(), "the one that has faded least"
    assert combine(how, WORST, faded, torch.zeros_like(COUNTED)).isfinite().all()


def test_a_flat_retention_is_the_flat_prior():
    flat = torch.full_like(WORST, -0.5)
    torch.testing.assert_close(combine("prior", WORST, flat, COUNTED)[0, 0, :4], torch.tensor([0.6, 0.25, 0.25, 0.25]))


@torch.no_grad()
def test_everything_else_is_defensives(tiny_llama, gates_for, prompt):
    """The value term, the window and the protected entries; only the risk of the others differs."""
    plain = Defensive(window=4, protection="cumulative")
    policies = [RetentionDefensive(window=4, mass=0.9, combine=how) for how in COMBINATIONS]  # pyright: ignore[reportArgumentType]
    with evict(tiny_llama, "full", gates=gates_for(tiny_llama), observe=[plain, *policies]) as session:
        cache = session.new_cache()
        tiny_llama(prompt(1, 30), past_key_values=cache)

        def scores(policy: Defensive) -> torch.Tensor:
            view = policy.view(cache.ragged[1], cache.tokens_seen, cache.query_positions, torch.tensor([9]))
            conclude(cache.ragged[1], policy, view, torch.ones(1, 1, 1, dtype=torch.bool))
            return policy.score(view)

        expected, seen = scores(plain), []
        for policy in policies:
            score = scores(policy)
            assert torch.equal(score.isinf(), expected.isinf())
            seen.append(tuple(score[score.isfinite()].tolist()))
        assert len(set(seen)) == len(policies)


def test_a_variant_is_chosen_by_option_and_needs_gates(tiny_llama):
    assert get_policy("retention_defensive", combine="rank", value_norm="tokens") == RetentionDefensive(
        combine="rank", value_norm="tokens"
    )
    message = "policy 'retention_defensive' needs gates"
    with pytest.raises(ValueError, match=message), evict(tiny_llama, "retention_defensive"):
        pass
