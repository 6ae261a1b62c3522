"""Presses of kvpress as policies: `evict(model, from_press(SnapKVPress()), budget=0.2)`.

kvpress slices the tensors of a layer to one length, and where heads keep different numbers it only masks the evicted
entries. Here a press is given one layer of one row, its kept entries are read off, and the memory of the others is
freed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..layer_view import LayerView
from ..model_adapters import Rotary
from ..policies.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Reasons why presses cannot run, by class name; subclasses are refused too.
_OWN_EVICTIONS = "evicts while tokens are generated, which evict() does itself after every `buffer` tokens"
REFUSED = {
    "ThinKPress": "zeroes channels of the keys and evicts no entry",
    "KeyRerotationPress": "rotates the keys that it keeps to new positions, and a cache here keeps every key as it was "
    "written: give the press inside it",
    "MergingPress": "adds what it evicts to the values that it keeps: give the press inside it",
    "FinchPress": "cuts a delimiter token out of the prompt while the model runs; SnapKVPress has a window too",
    "KVzipPress": "runs the model over the prompt again to score it",
    "KVComposePress": "runs the model over the prompt again to score it",
    "DecodingPress": f"{_OWN_EVICTIONS}: give its base_press",
    "PrefillDecodingPress": f"{_OWN_EVICTIONS}: give its prefilling_press",
    "ComposedPress": "chains presses that have a ratio each, which one budget cannot set: give one of them",
}

# Attributes that presses load for a model in `post_init_from_model`.
LOADED = {
    "DuoAttentionPress": "streaming_mask",
    "ExpectedAttentionStatsPress": "mu",
    "FastKVzipPress": "gates",
    "KVzapPress": "kvzap_model",
    "LUKVPress": "_budget_curves",
    "QFilterPress": "q_filters",
}


def kind_of(press: Any) -> str:
    """Classifies a press by the way its kept entries are obtained.

    Returns:
        "scores": its scores; a head keeps its best.
        "heads": the scores of the press inside it; the heads of a layer compete (AdaKV).
        "gates": scores that are comparable between layers (Fast KVzip).
        "threshold": the scores of the press inside it, of which low ones are never kept (DMS).
        "choice": the entries it keeps.
        "layers": the entries that the press inside it keeps at the layer's own ratio.
        "": unsupported, it does something else.
    """
    hook, call, compress = (_definer(press, name) for name in ("forward_hook", "__call__", "compress"))
    special = {"DMSPress": "threshold", "PerLayerCompressionPress": "layers", "FastKVzipPress": "gates"}
    if hook in special and call in ("BasePress", hook):
        return special[hook]
    if hook != "BasePress" or call != "BasePress" or compress == "BasePress":
        return ""
    return {"ScorerPress": "scores", "AdaKVPress": "heads"}.get(compress, "choice")


def refuse(press: Any) -> None:
    """Raises ValueError if the press, or one inside it, does more than select entries of a prompt."""
    for part in parts_of(press):
        names = class_names(part)
        reason = next((REFUSED[name] for name in names if name in REFUSED), "")
        if not reason and not kind_of(part):
            reason = "runs by hooks of its own; presses with a score() or compress() of their own are accepted"
        elif "DMSPress" in names and part.decoding:
            reason = f"{_OWN_EVICTIONS}: set decoding=False"
        elif "DMSPress" in names and part.threshold is None:
            reason = "has no threshold: give DMSPress(press, threshold=…)"
        if reason:
            raise ValueError(f"{type(part).__name__} cannot run under evict(): it {reason}")


def require_loaded(press: Any) -> None:
    """Raises ValueError if the press, or one inside it, has not loaded the data it needs for a model."""
    for part in parts_of(press):
        for name in class_names(part):
            if name in LOADED and getattr(part, LOADED[name], None) is None:
                raise ValueError(f"{name} needs its {LOADED[name]} for a model: give from_press(press, model)")


def class_names(press: Any) -> list[str]:
    """The names of its class and of those that one inherits from, nearest first."""
    return [kind.__name__ for kind in type(press).__mro__]


def _definer(press: Any, method: str) -> str:
    return next(kind.__name__ for kind in type(press).__mro__ if method in vars(kind))


def parts_of(press: Any) -> Iterator[Any]:
    """A press and those inside it."""
    yield press
    for value in vars(press).values():
        if _is_press(value):
            yield from parts_of(value)


def copied(press: Any) -> Any:
    """A copy whose options, and those of the presses inside it, can be set; tensors and modules are shared."""
    twin = copy.copy(press)
    for name, value in vars(press).items():
        if _is_press(value):
            vars(twin)[name] = copied(value)
        elif isinstance(value, dict | list):
            vars(twin)[name] = copy.copy(value)
    return twin


def described(value: Any) -> str:
    """A press's class and options as text, without its ratio; values that are not plain by their identity."""
    if _is_press(value):
        options = {name: one for name, one in vars(value).items() if name != "compression_ratio"}
        return f"{type(value).__name__}({', '.join(f'{name}={described(one)}' for name, one in options.items())})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {described(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return f"<{type(value).__name__} {id(value):#x}>"


def _is_press(value: Any) -> bool:
    from kvpress import BasePress  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    return isinstance(value, BasePress)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PressInput:
    """The arguments that kvpress gives a press after a layer's attention, for a single row.

    Attributes:
        module: the attention module.
        hidden_states: `(1, n, hidden_size)`, its input.
        keys, values: `(1, num_kv_heads, n, dim)`, post-RoPE; copies, because a press may write to them.
        positions: int64 `(1, n)`, the positions at which RoPE was applied.
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
        """Arguments of `press.score` and `press.compress`."""
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
def press_attributes(given: PressInput) -> Iterator[None]:
    """Within the block the module has `rotary_emb`, which kvpress sets permanently, and no masked keys.

    Where kvpress would omit the norm of queries and keys, presses that project hidden states raise ValueError.
    """
    attributes = vars(given.module)  # not setattr: a module among them would become a part of the model
    temporary: dict[str, Any] = {"rotary_emb": _Embedding(given.rotary), "masked_key_indices": None}
    if _has_unknown_norm(given.module):
        temporary |= dict.fromkeys(("q_proj", "k_proj"), _Refusal(type(given.module).__name__))
    before = {name: attributes[name] for name in temporary if name in attributes}
    attributes.update(temporary)
    try:
        yield
    finally:
        for name in temporary:
            attributes.pop(name, None)
        attributes.update(before)


def _has_unknown_norm(module: nn.Module) -> bool:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

    return hasattr(module, "q_norm") and not isinstance(module, Qwen3Attention | Gemma3Attention)


@dataclass(frozen=True)
class _Refusal:
    """Replaces a projection followed by a norm that kvpress omits."""

    module: str

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        raise ValueError(
            f"kvpress computes queries and keys without the norm that {self.module} has; accepted on this model: "
            "presses that read the cached keys and values only"
        )


def attention_weights(given: PressInput, scaling: float) -> torch.Tensor:
    """The layer's causal attention, `(1, num_heads, n, n)`, the model's dtype; for presses that read it.

    kvpress reads it from the model, which must run with eager attention for that. Here it is recomputed, one layer at
    a time.
    """
    from kvpress.utils import get_prerope_query_states  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    queries = get_prerope_query_states(given.module, given.hidden_states)
    cos, sin = _Embedding(given.rotary)(given.hidden_states, given.positions)
    queries = apply_rotary_pos_emb(queries, given.keys, cos, sin)[0]
    _, heads, n, dim = queries.shape
    grouped = queries.reshape(1, given.keys.shape[1], -1, dim)  # the heads of a group are adjacent
    logits = (grouped @ given.keys.transpose(2, 3)).view(1, heads, n, n) * scaling
    future = torch.ones(n, n, dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill_(future, -torch.inf).softmax(-1, dtype=torch.float32).to(given.keys.dtype)


def scores_of(press: Any, given: PressInput, budget: int) -> torch.Tensor:
    """A press's scores `(1, num_kv_heads, n)`, or 1 for entries that it keeps; -inf for "never keep".

    Call it within `press_attributes`.

    Args:
        press: of a known `kind_of`; its ratio is set here.
        budget: entries that a head of this layer may keep, on average.
    """
    n = given.keys.shape[2]
    # kvpress keeps int(n * (1 - ratio)): exactly the budget, despite rounding of the product.
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
    with suppress(AttributeError):  # raised by presses that determine their own ratio
        press.compression_ratio = ratio
    kept = kept_by(press, given)
    return torch.ones_like(kept, dtype=torch.float32).masked_fill(~kept, -torch.inf)


def kept_by(press: Any, given: PressInput) -> torch.Tensor:
    """Runs `press.compress` and returns a mask of the entries that it keeps: bool `(1, num_kv_heads, n)`.

    A press returns the kept keys and values or, where heads keep different numbers, sets the module's
    `masked_key_indices`. Call it within `press_attributes`.

    Raises:
        ValueError: the returned tensors are not a selection of the entries.
    """
    before = _fingerprints(given.keys, given.values)  # before the call: the press may write to them
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
    """A hash of the bits of each entry (times random odd factors, modulo 2⁶⁴): int64 `(1, num_kv_heads, n)`."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(keys.shape[:3], dtype=torch.long, device=keys.device)
    for states in (keys, values):
        bits = states.contiguous().view(_INTEGERS[states.element_size()])
        for channel in range(bits.shape[-1]):  # one at a time: as int64 all channels would be four times the cache
            factor = int(torch.randint(2**62, (1,), generator=generator)) * 2 + 1
            total += bits[..., channel].long() * factor
    return total


def _found(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor | None:
    """Marks the elements of `before` that are in `after`, equal ones as often as there; None if one is missing."""
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


LOWEST = torch.finfo(torch.float32).min  # score of entries that the press has not scored


def from_press(press: Any, model: PreTrainedModel | None = None) -> Policy:
    """A policy that keeps the entries that a press of kvpress keeps.

    Args:
        press: an instance of a press, which is copied. Its compression ratio is ignored; the budget of `evict` applies.
        model: for presses that load data for a model, such as `QFilterPress`; it is loaded now.

    Returns:
        The policy, for `evict(policy=…)`, `observe=[…]` and `cache.compress(…)`.
    Raises:
        ImportError: kvpress is not installed.
        ValueError: not a press, or one that does more than select entries; the message names the reason.
    """
    try:
        from kvpress import BasePress  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
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
    """Keeps the entries of a prompt that a press keeps, and the newest of later tokens; made by `from_press`.

    A press scores each row alone and once: at its first eviction, when all its entries are stored. The scores are kept
    with the entries. Later tokens are not scored: they rank below scored ones, the newest first.

    Attributes:
        press: a private copy of the press.
        options: its class and options as text; policies of equal presses are equal.
    """

    press: Any = field(repr=False, compare=False)
    options: str

    name: ClassVar[str] = "kvpress"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "hidden_states"})
    states: ClassVar[tuple[str, ...]] = ("score",)
    scores_heads_alone: ClassVar[bool] = False

    @property
    def default_scope(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Scope of the competition, as in kvpress; "global" for presses that select entries themselves."""
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
            given = self._press_input(view, row) if budget else None
            if given is not None:
                own = self._press_scores(given, budget, view.layer_idx)
                scores[row, :, : own.shape[2]] = own[0]
        return {"score": scores}

    def score(self, view: LayerView) -> torch.Tensor:
        scores = view.state("score")
        return scores.masked_fill(scores == 0, LOWEST)  # on ties the newer entries are kept

    def _press_input(self, view: LayerView, row: int) -> PressInput | None:
        """The input of the press; None if it has scored the row already, or the row is empty."""
        inputs = view.inputs
        before = None if inputs is None else inputs.evicted_by[row]
        if before == self:
            return None
        if inputs is None or before is not None:
            why = "the cache was loaded from a file" if before is None else f"entries were evicted by {before!r}"
            raise ValueError(
                f"{self.options} scores a prompt as a whole and its hidden states were discarded: {why}; fork() the "
                "cache before its first eviction"
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

    def _press_scores(self, given: PressInput, budget: int, layer_idx: int) -> torch.Tensor:
        """The press's scores, fp32 `(1, num_kv_heads, n)`, none of them 0, which marks entries without a score."""
        shape = given.keys.shape[:3]
        try:
            with press_attributes(given):
                scores = scores_of(copied(self.press), given, budget)
        except AssertionError as error:  # raised by presses, e.g. for a prompt shorter than their window
            raise ValueError(f"{self.options} refuses the prompt: {error}") from None
        if scores.shape != shape or bool(scores.isnan().any()):
            found = "NaN" if scores.shape == shape else f"scores {tuple(scores.shape)}"
            raise ValueError(f"{self.options} gave {found} in layer {layer_idx}, expected numbers {tuple(shape)}")
        never = scores == -torch.inf
        scores = scores.float().clamp(min=LOWEST / 2).masked_fill(never, -torch.inf)
        return scores.masked_fill(scores == 0, torch.finfo(torch.float32).tiny)
