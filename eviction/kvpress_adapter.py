"""Presses of kvpress as policies: `evict(model, from_press(SnapKVPress()), budget=0.2)`.

kvpress cuts the tensors of a layer to one length, and where heads keep different numbers it only masks what it evicts.
Here a press says what stays, and the memory of the rest is given back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .policies.base import Policy
from .press_call import PressInput, attention_weights, lent, scores_of
from .press_kinds import class_names, copied, described, kind_of, parts_of, refuse, require_loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .view import LayerView

LOWEST = torch.finfo(torch.float32).min  # the score of entries that the press has not scored


def from_press(press: Any, model: PreTrainedModel | None = None) -> Policy:
    """A policy that keeps what a press of kvpress keeps; see "Presses of kvpress" in docs/eviction.md.

    Args:
        press: an instance of a press, which is copied. The budget of `evict` counts, not its compression ratio.
        model: for presses that load something for a model, such as `QFilterPress`; it is loaded now.

    Returns:
        The policy, for `evict(policy=…)`, `observe=[…]` and `cache.compress(…)`.
    Raises:
        ImportError: kvpress is not installed.
        ValueError: no press, or one that does more than select entries; the message says what.
    """
    try:
        from kvpress import BasePress  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("presses need kvpress: pip install 'tenure[kvpress]'") from None
    if not isinstance(press, BasePress):
        raise ValueError(f"from_press() accepts an instance of a press of kvpress, got {press!r}")
    refuse(press)
    press = copied(press)
    if model is not None:
        press.post_init_from_model(model)
    require_loaded(press)
    return PressPolicy(press, described(press))


@dataclass(frozen=True)
class PressPolicy(Policy):
    """Keeps of a prompt what a press keeps, and of later tokens the newest; made by `from_press`.

    A press scores each row alone and once: at its first eviction, when all its entries are there. The scores stay with
    the entries. Tokens that come later are not scored: they rank below those that were, the newest first.

    Attributes:
        press: a private copy of the press.
        options: its class and options as text; policies of equal presses are equal.
    """

    press: Any = field(repr=False, compare=False)
    options: str

    name: ClassVar[str] = "kvpress"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "hidden_states"})
    states: ClassVar[tuple[str, ...]] = ("score",)

    @property
    def default_scope(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Who competes, as in kvpress; "global" takes the choice of a press that chooses by itself as a whole."""
        kind = kind_of(self.press)
        if kind == "gates" and self.press.layerwise:
            return "layer"
        return {"scores": "head", "heads": "layer"}.get(kind, "global")

    @property
    def default_floor(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return float(self.press.alpha_safeguard) if kind_of(self.press) == "heads" else 0.0

    def conclude(self, view: LayerView) -> dict[str, torch.Tensor]:
        scores = view.state("score").clone()
        for row, budget in enumerate(view.budget.tolist()):
            given = self._given(view, row) if budget else None
            if given is not None:
                own = self._asked(given, budget, view.layer_idx)
                scores[row, :, : own.shape[2]] = own[0]
        return {"score": scores}

    def score(self, view: LayerView) -> torch.Tensor:
        scores = view.state("score")
        return scores.masked_fill(scores == 0, LOWEST)  # of equal ones the newer entries stay

    def _given(self, view: LayerView, row: int) -> PressInput | None:
        """What the press is asked about; None if it has scored the row, or the row is empty.

        Raises:
            ValueError: entries of the row are gone that the press has not scored.
        """
        inputs = view.inputs
        before = None if inputs is None else inputs.evicted_by[row]
        if before == self:
            return None
        if inputs is None or before is not None:
            why = "the cache was loaded from a file" if before is None else f"entries were evicted by {before!r}"
            raise ValueError(
                f"{self.options} scores a prompt as a whole and its hidden states are gone: {why}; fork() the cache "
                "before its first eviction"
            )
        hidden, positions = inputs.row(row)
        if hidden.shape[1] == 0:
            return None
        own = slice(row, row + 1), slice(None), slice(0, hidden.shape[1])
        keys, values = view.keys[own].clone(), view.values[own].clone()
        given = PressInput(view.attention.module, hidden, keys, values, positions, inputs.rotary)
        if any("ObservedAttentionPress" in class_names(part) for part in parts_of(self.press)):
            given = replace(given, attentions=attention_weights(given, view.scaling))
        return given

    def _asked(self, given: PressInput, budget: int, layer_idx: int) -> torch.Tensor:
        """The press's scores, fp32 `(1, num_kv_heads, n)`, none of them 0, which is left to entries without a score.

        Raises:
            ValueError: the press refuses the prompt, or gives no scores.
        """
        shape = given.keys.shape[:3]
        try:
            with lent(given):
                scores = scores_of(copied(self.press), given, budget)
        except AssertionError as error:  # how presses refuse: a prompt shorter than their window, for example
            raise ValueError(f"{self.options} refuses the prompt: {error}") from None
        if scores.shape != shape or bool(scores.isnan().any()):
            found = "NaN" if scores.shape == shape else f"scores {tuple(scores.shape)}"
            raise ValueError(f"{self.options} gave {found} in layer {layer_idx}, expected numbers {tuple(shape)}")
        never = scores == -torch.inf
        scores = scores.float().clamp(min=LOWEST / 2).masked_fill(never, -torch.inf)
        return scores.masked_fill(scores == 0, torch.finfo(torch.float32).tiny)
