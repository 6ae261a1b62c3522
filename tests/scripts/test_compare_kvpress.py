"""The comparison with kvpress: what is counted, what is refused. Running it takes an environment that has kvpress."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tenure.scripts.bench import kvpress_kept
from tenure.scripts.bench.compare_kvpress import KvpressBenchConfig, agreement, kept_by_kvpress, kept_by_us, policies


def test_agreement_counts_common_entries():
    ours = [[[[0, 1, 2], [5, 6]], [[1], [2]]]]
    theirs = [[[[0, 1, 3], [5, 6]], [[1], [3]]]]
    assert agreement(ours, theirs) == (5 / 7, 1 / 2)
    assert agreement(theirs, theirs) == (1.0, 1.0)


def test_kept_positions_are_found_by_their_keys_or_by_what_is_masked():
    full = torch.arange(24.0).view(2, 4, 3)
    left = torch.stack([full[0, [3, 1]], full[1, [0, 2]]])
    assert kvpress_kept._kept(full, left, nn.Module()) == [[1, 3], [0, 2]]
    module = nn.Module()
    module.masked_key_indices = (torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]))  # type: ignore[assignment]
    assert kvpress_kept._kept(full, full, module) == [[0, 3], [0, 1, 2]]
    assert module.masked_key_indices is None


@torch.no_grad()
def test_the_press_for_defensivekv_scores_as_the_oracle_does():
    from ..eviction.oracles import Layer, defensive_scores

    torch.manual_seed(0)
    heads, group, n, window, keep = 2, 3, 97, 32, 0.6
    layer = Layer(
        torch.randn(heads * group, n, 8).double(), torch.randn(heads, n, 8).double(), torch.randn(heads, n, 8).double(),
        0.4, torch.zeros(heads, n), torch.randn(heads * group, 8, 12).double(),
    )  # fmt: skip
    expected = defensive_scores({0: layer}, keep, window)[0]
    attention = layer.attention(window, torch.ones(heads, n, dtype=torch.bool))[..., : n - window]
    found = kvpress_kept.defensive_scores(attention, layer.value_norms[:, : n - window], n, keep)
    torch.testing.assert_close(found, expected)
    assert (found == found.max()).sum() > heads * window, "some entries are protected"


@torch.no_grad()
def test_our_side_keeps_the_share(tiny_llama):
    prompt = [3 + i * 37 % 125 for i in range(300)]
    (kept,) = kept_by_us(tiny_llama, [prompt], (0.5,))
    assert kept.keys() == policies().keys()
    for name, (layers,) in kept.items():
        assert sum(len(head) for layer in layers for head in layer) == 150 * 6, name


def test_what_cannot_be_run_is_told(tmp_path):
    with pytest.raises(ValueError, match="--shares accepts numbers between 0 and 1"):
        KvpressBenchConfig(Path("python"), shares=(1.0,))
    with pytest.raises(ValueError, match="accept 1 or more"):
        KvpressBenchConfig(Path("python"), prompts=0)
    with pytest.raises(ValueError, match="--python /no/python cannot be run"):
        kept_by_kvpress(Path("/no/python"), "model", [[1]], (0.5,))
    with pytest.raises(ValueError, match=r"could not run kvpress: .*(kvpress|/no/model)"):
        kept_by_kvpress(Path(sys.executable), "/no/model", [[1]], (0.5,))
