"""A press of kvpress asked about one layer of one row: what it is given, its scores, and what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .press_kinds import kind_of
from .rotary import Rotary

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PressInput:
    """What kvpress hands a press after a layer's attention, for a single row.

    Attributes:
        module: the attention module.
        hidden_states: `(1, n, hidden_size)`, its input.
        keys, values: `(1, num_kv_heads, n, dim)`, post-RoPE; copies, for a press may write to them.
        positions: int64 `(1, n)`, the positions that RoPE gave them.
        rotary: the model's RoPE.
        attentions: `(1, num_heads, n, n)`, or None.
    """

    module: nn.Module
    hidden_states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    rotary: Rotary
    attentions: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of `press.score` and `press.compress`."""
        kwargs = {
            "hidden_states": self.hidden_states,
            "position_ids": self.positions,
            "position_embeddings": _Embedding(self.rotary)(self.hidden_states, self.positions),
            "cache_position": torch.arange(self.keys.shape[2], device=self.keys.device),
        }
        return self.module, self.hidden_states, self.keys, self.values, self.attentions, kwargs


class _Embedding:
    """RoPE as presses call it: `module.rotary_emb(x, position_ids)`, without Gemma-3's layer type."""

    def __init__(self, rotary: Rotary) -> None:
        self._rotary = rotary

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary.angles(position_ids)
        return cos.to(x.dtype), sin.to(x.dtype)


@contextmanager
def lent(given: PressInput) -> Iterator[None]:
    """Within the block the module has `rotary_emb`, which kvpress gives it for good, and masks nothing.

    Where kvpress would leave the norm of queries and keys out, presses that project hidden states raise ValueError.
    """
    attributes = vars(given.module)  # not setattr: a module among them would become a part of the model
    loan: dict[str, Any] = {"rotary_emb": _Embedding(given.rotary), "masked_key_indices": None}
    if _has_unknown_norm(given.module):
        loan |= dict.fromkeys(("q_proj", "k_proj"), _Refusal(type(given.module).__name__))
    before = {name: attributes[name] for name in loan if name in attributes}
    attributes.update(loan)
    try:
        yield
    finally:
        for name in loan:
            attributes.pop(name, None)
        attributes.update(before)


def _has_unknown_norm(module: nn.Module) -> bool:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    return hasattr(module, "q_norm") and not isinstance(module, Qwen3Attention | Gemma3Attention)


@dataclass(frozen=True)
class _Refusal:
    """Stands for a projection whose norm kvpress does not know."""

    module: str

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise ValueError(
            f"kvpress computes queries and keys without the norm that {self.module} has; on this model presses can run "
            "that read the cached keys and values only"
        )


def attention_weights(given: PressInput, scaling: float) -> torch.Tensor:
    """The layer's causal attention, `(1, num_heads, n, n)`, the model's dtype; for presses that read it.

    kvpress takes it from the model, which must be run with eager attention for that. Here it is computed again, one
    layer at a time.
    """
    from kvpress.utils import get_prerope_query_states  # pyright: ignore[reportMissingImports]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    queries = get_prerope_query_states(given.module, given.hidden_states)
    cos, sin = _Embedding(given.rotary)(given.hidden_states, given.positions)
    queries = apply_rotary_pos_emb(queries, given.keys, cos, sin)[0]
    _, heads, n, dim = queries.shape
    grouped = queries.reshape(1, given.keys.shape[1], -1, dim)  # the heads of a group stand one behind the other
    logits = (grouped @ given.keys.transpose(2, 3)).view(1, heads, n, n) * scaling
    future = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1, dtype=torch.float32).to(given.keys.dtype)


def scores_of(press: Any, given: PressInput, budget: int) -> torch.Tensor:
    """What a press makes of the entries, `(1, num_kv_heads, n)`: its scores, or 1 for what it keeps; -inf for never.

    Runs within `lent`.

    Args:
        press: of a known `kind_of`; its ratio is set here.
        budget: entries that a head of this layer may keep, on average.
    """
    n = given.keys.shape[2]
    # kvpress keeps int(n * (1 - ratio)): the budget, whatever the last digit of the product.
    ratio = max(0.0, 1 - (budget + 1e-3) / n)
    kind = kind_of(press)
    if kind == "scores":
        press.compression_ratio = ratio
        return press.score(*given.arguments)
    if kind == "heads":
        press.compression_ratio = ratio
        return press.press.score(*given.arguments)
    if kind == "threshold":
        scores = press.press.score(*given.arguments)
        recent = torch.arange(n, device=scores.device) >= n - press.sliding_window_size
        return scores.masked_fill(scores < press.threshold, -torch.inf).masked_fill(recent, torch.inf)
    if kind == "gates":
        press.score_val = {}
        press._score_fast(given.module, given.hidden_states)
        return press.score_val[given.module.layer_idx]
    if kind == "layers":
        ratio, press = press.compression_ratios[given.module.layer_idx], press.press
    with suppress(AttributeError):  # of presses that decide by themselves how much they keep
        press.compression_ratio = ratio
    kept = kept_by(press, given)
    return torch.ones_like(kept, dtype=torch.float32).masked_fill(~kept, -torch.inf)


def kept_by(press: Any, given: PressInput) -> torch.Tensor:
    """Runs `press.compress`, and tells which entries it keeps: bool `(1, num_kv_heads, n)`.

    A press shows that either in what it returns or, where heads keep different numbers, in the module's
    `masked_key_indices`. Runs within `lent`.

    Raises:
        ValueError: what it returns is not a selection of the entries.
    """
    before = _fingerprints(given.keys, given.values)  # first: the press may write to them
    keys, values = press.compress(*given.arguments)
    same_width = keys.shape[-1] == given.keys.shape[-1] and values.shape[-1] == given.values.shape[-1]
    kept = _found(before, _fingerprints(keys, values)) if same_width else None
    if kept is None:
        raise ValueError(
            f"{type(press).__name__} changes the keys or values that it keeps; only presses that select entries can "
            "run under evict()"
        )
    masked = vars(given.module)["masked_key_indices"]
    if masked is not None:
        kept[tuple(index.to(kept.device) for index in masked)] = False
    return kept


def _fingerprints(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A number for the bits of each entry, int64 `(1, num_kv_heads, n)`: entries that differ share none but by chance.

    Bits times random odd factors, modulo 2⁶⁴.
    """
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(keys.shape[:3], dtype=torch.long, device=keys.device)
    for states in (keys, values):
        bits = states.contiguous().view(_INTEGERS[states.element_size()])
        for channel in range(bits.shape[-1]):  # one at a time: as int64 all channels would be four times the cache
            factor = int(torch.randint(2**62, (1,), generator=generator)) * 2 + 1
            total += bits[..., channel].long() * factor
    return total


def _found(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Marks those of `before` `(1, heads, n)` that are in `after` `(1, heads, k)`; None if one of these is not there.

    Of equal ones as many are marked as there are in `after`.
    """
    n, count = before.shape[-1], after.shape[-1]
    ordered, order = before.sort(-1)
    wanted = after.sort(-1).values
    among_equals = torch.arange(count, device=wanted.device) - torch.searchsorted(wanted, wanted)
    place = torch.searchsorted(ordered, wanted) + among_equals
    if count > n or bool((ordered.gather(-1, place.clamp(max=n - 1)) != wanted).any()):
        return None
    if bool((place >= n).any()):
        return None
    return torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order.gather(-1, place), True)
