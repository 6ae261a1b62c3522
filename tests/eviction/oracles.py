"""Presets in plain float64, written from the descriptions of the released codes and sharing no code with the package.

`Oracle` recomputes a whole sequence without a cache: at every step each token attends to the entries that were stored
when it was read. Rules then say, from queries, keys, values and log β, which entries have to be stored next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN

NEAR = 1e-5  # relative difference of scores below which fp32 may decide either way
Stored = dict[int, torch.Tensor]  # by layer: bool (num_kv_heads, tokens)


@dataclass
class Layer:
    """What one layer computed of a sequence, float64: `(heads, tokens, dim)`; log β `(num_kv_heads, tokens)`."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    log_beta: torch.Tensor
    output: torch.Tensor  # W_O, (num_heads, dim, hidden)

    @property
    def group(self) -> int:
        return self.queries.shape[0] // self.keys.shape[0]

    def attention(self, window: int, stored: torch.Tensor) -> torch.Tensor:
        """`(num_kv_heads, group, window, tokens)`: causal softmax of the last queries over the stored entries."""
        n = self.keys.shape[1]
        queries = self.queries.view(self.keys.shape[0], self.group, n, -1)[:, :, n - window :]
        logits = torch.einsum("hgqd,hkd->hgqk", queries, self.keys) * self.scaling
        at = torch.arange(n - window, n).unsqueeze(1)
        hidden = (torch.arange(n) > at) | ~stored[:, None, None]
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)

    @property
    def value_norms(self) -> torch.Tensor:
        """`(num_kv_heads, tokens)`: the L1 norm of `v W_O`, mean over the heads of a group."""
        output = self.output.view(self.keys.shape[0], self.group, *self.output.shape[1:])
        return torch.einsum("hnd,hgdo->hgno", self.values, output).abs().sum(-1).mean(1)


class Oracle:
    """A model in float64 whose tokens see, layer by layer and head by head, what `visible` says."""

    def __init__(self, model: PreTrainedModel, gates: Any) -> None:
        AttentionInterface.register("oracle", self._attention)
        self.model = copy.deepcopy(model).double()
        self.model.set_attn_implementation("oracle")
        self.gates = {name: value.double() for name, value in gates.state_dict().items()}
        self.config, self.evicting = gates.config, gates.layer_indices
        self.heads = gates.config.num_kv_heads
        self.visible: Stored = {}
        self.seen: dict[int, tuple[torch.Tensor, ...]] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._note(index), with_kwargs=True)

    def _note(self, index: int) -> Callable[..., None]:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            self.inputs[index] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return note

    def _attention(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **rest: Any) -> Any:
        n, index = key.shape[2], module.layer_idx
        self.seen[index] = query[0], key[0], value[0], torch.tensor(scaling)
        at = torch.arange(n)
        sees = at <= at.unsqueeze(1)
        if index in self.visible:
            sees = self.visible[index][:, :n, :n]
        elif rest.get("sliding_window"):
            sees = sees & (at.unsqueeze(1) - at < rest["sliding_window"])
        sees = sees.expand(key.shape[1], n, n).repeat_interleave(query.shape[1] // key.shape[1], 0)
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~sees, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    @torch.no_grad()
    def read(self, ids: list[int]) -> dict[int, Layer]:
        """The evicting layers after a forward over all of `ids`."""
        self.model.model(torch.tensor([ids]), use_cache=False)
        found = {}
        for index in self.evicting:
            query, key, value, scaling = self.seen[index]
            weight = self.model.model.layers[index].self_attn.o_proj.weight
            output = weight.t().reshape(query.shape[0], value.shape[2], -1)
            found[index] = Layer(query, key, value, scaling.item(), self._log_beta(index), output)
        return found

    def _log_beta(self, index: int) -> torch.Tensor:
        """Two linear layers, each followed by the model's activation, then a projection to the heads and logsigmoid."""
        x, act = self.inputs[index][0], ACT2FN[self.config.activation]
        for part in (0, 2):
            x = act(F.linear(x, self.gates[f"bodies.{index}.{part}.weight"], self.gates[f"bodies.{index}.{part}.bias"]))
        return F.logsigmoid(F.linear(x, self.gates["weight"], self.gates["bias"])).t()

    def steps(self, ids: list[int], cuts: list[int]) -> Iterator[tuple[dict[int, Layer], Stored]]:
        """After the forwards that end at `cuts`: the layers, and the stored entries, which the consumer reduces."""
        stored = {index: torch.zeros(self.heads, len(ids), dtype=torch.bool) for index in self.evicting}
        self.visible = {index: torch.zeros(self.heads, len(ids), len(ids), dtype=torch.bool) for index in self.evicting}
        for start, stop in zip([0, *cuts], cuts, strict=False):
            for index in self.evicting:
                for at in range(start, stop):
                    self.visible[index][:, at] = stored[index]
                    self.visible[index][:, at, start : at + 1] = True
            layers = self.read(ids[:stop])
            for index in self.evicting:
                stored[index][:, start:stop] = True
            yield layers, {index: one[:, :stop] for index, one in stored.items()}


Scores = Mapping[int, torch.Tensor]  # by layer, (num_kv_heads, tokens)


def check_top(scores: list[torch.Tensor], kept: list[torch.Tensor], count: int, name: str) -> None:
    """Asserts that `kept` are the `count` highest of the scores; -inf is no candidate, nearly equal ones are equal."""
    flat, chosen = torch.cat([one.flatten() for one in scores]), torch.cat([one.flatten() for one in kept])
    count = min(count, int((flat > -torch.inf).sum()))
    assert int(chosen.sum()) == count, f"{name}: {int(chosen.sum())} kept, {count} expected"
    least = flat.sort(descending=True).values[count - 1].item()
    near = NEAR * abs(least)
    wrong = (chosen & (flat < least - near)) | (~chosen & (flat > least + near))
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {count} entries differ"


def retention_scores(layers: Mapping[int, Layer], stored: Stored, lookahead: int = 1) -> Scores:
    """`(T + 1 - i) log β`, with positions from 0; with a lookahead `(T + 2 - i) log β + log(1 - β^n) - log(1 - β)`."""
    scores = {}
    for index, layer in layers.items():
        n = layer.keys.shape[1]
        rate, at = layer.log_beta, torch.arange(n)
        score = (n + 1 - at) * rate
        if lookahead > 1:
            score = (n + 2 - at) * rate + (1 - (lookahead * rate).exp()).log() - (1 - rate.exp()).log()
        scores[index] = score.masked_fill(~stored[index], -torch.inf)
    return scores


def defensive_scores(layers: Mapping[int, Layer], keep: float, window: int, mass: float = 0.9) -> Scores:
    """DefensiveKV as released, on a prompt that is whole."""
    scores = {}
    for index, layer in layers.items():
        heads, n = layer.keys.shape[:2]
        rest = n - window
        attention = layer.attention(window, torch.ones(heads, n, dtype=torch.bool))[..., :rest]
        bias = attention[..., max(0, rest - window) :].sum(-1).mean().item()
        mean = attention.mean((1, 2))
        pooled = F.avg_pool1d(attention.reshape(1, -1, rest), 5, 1, 2).view_as(attention)
        pooled = pooled / pooled.sum(-1, keepdim=True) * attention.sum(-1, keepdim=True)
        worst = pooled.amax((1, 2))
        risk = torch.maximum(worst, worst.mean(1, keepdim=True))
        norms = layer.value_norms[:, :rest]
        risk = risk * norms / norms.sum(0)
        highest, most = risk.max().item(), int(n * keep) - window
        for head in range(heads):
            shares, order = (mean[head] / mean[head].sum()).sort(descending=True)
            covered = 0
            while covered < rest and shares[: covered + 1].sum() < mass - bias:
                covered += 1
            risk[head, order[: max(0, min(covered, most))]] = highest
        scores[index] = F.pad(risk, (0, window), value=highest)
    return scores


def snapkv_scores(layer: Layer, window: int) -> torch.Tensor:
    """SnapKV as in kvpress, the window's own entries above all."""
    n = layer.keys.shape[1]
    rest = n - window
    mean = layer.attention(window, torch.ones(layer.keys.shape[0], n, dtype=torch.bool))[..., :rest].mean(2)
    pooled = F.avg_pool1d(mean, 5, 1, 2).mean(1)
    return F.pad(pooled, (0, window), value=2.0)


def knorm_scores(layer: Layer) -> torch.Tensor:
    return -layer.keys.norm(dim=-1)


def keydiff_scores(layer: Layer) -> torch.Tensor:
    """How little a key resembles the mean of the head's normalised keys."""
    keys = F.normalize(layer.keys, dim=-1)
    return -F.cosine_similarity(keys, keys.mean(1, keepdim=True), dim=-1)
