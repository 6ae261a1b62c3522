"""`evict`: within its block a model keeps its KV cache within a budget."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tenure.documents import shown

from ..retention.decoder_layers import plain_model
from ..retention.gates import RetentionGates
from ..retention.seams import intercept
from .plan import with_budget
from .policies.policy import Policy
from .policies.registry import get_policy
from .prefill import chunked_prefill
from .presets import make_plan
from .session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL_BUDGET = 100  # a whole number up to it may be meant as a percentage


@contextmanager
def evict(
    model: PreTrainedModel,
    policy: str | Policy | None = None,
    budget: float | int | str = 0.2,
    scope: str | None = None,
    gates: RetentionGates | str | os.PathLike | None = None,
    sinks: int | None = None,
    recent: int | None = None,
    buffer: int = 128,
    observe: Iterable[str | Policy] = (),
    floor: float | None = None,
    protect: Any = None,
    prefill_chunk: int | None = None,
    schedule: str | None = None,
    preset: str | None = None,
    token_floors: Any = None,
) -> Iterator[Session]:
    """Within the block `model(...)` and `model.generate(...)` keep their KV cache within a budget.

    The first input of a cache, the prompt, is evicted down to the budget at its end. After every later forward each
    row stores at most `budget + buffer` entries per head on average: eviction runs when there are more.

    Args:
        model: a transformers decoder with full-attention layers; its other layers are unchanged.
        policy: a name (see `policy_names()`) or an instance. None for retention, or the preset's.
        budget: a float in (0, 1], the share of the tokens seen that is kept; an int >= 1, entries per head on average;
            so that 20 is no percentage; or text: that share, "20%", or a row's total, "65536 entries", or bytes,
            "512MiB" or "2GB". 1.0 evicts nothing. "calibrated" is the one that `tenure calibrate` stored with the
            gates; its guarantee holds for documents like those measured.
        scope: which entries compete: "global" (all layers and heads of a row), "layer" (its heads), "head" (each has
            the same number), "pyramid" (as "head", with more in the lower layers), "preference" (as "head", with more
            in layers that the policy prefers: CAKE). None for the policy's default.
        gates: for the retention policy: gates, or where `RetentionGates.from_pretrained` finds them.
        sinks, recent: numbers of first and last tokens of each row that are always kept; they count towards the budget,
            and are reduced (recent ones first) where they would exceed it. None for the policy's, which were measured:
            see `Policy.default_protection`.
        buffer: tokens that may be written above the budget before the next eviction.
        observe: other policies whose needs are recorded too, so that `cache.compress(policy=...)` can use them.
        floor: share of the per-head budget, in [0, 1], that every head keeps in the scopes "layer" and "global"
            (AdaKV: 0.2). None for the policy's default.
        protect: tokens that are never evicted and count towards the budget: ranges `[(start, stop), …]` for all rows,
            or a bool mask `(tokens,)` or `(batch, tokens)`, of positions among a row's real tokens. Positions beyond
            the tokens seen are protected once they are read. Sinks and recent tokens are reduced first.
        prefill_chunk: inputs longer than this many tokens are read in chunks of that size with an eviction after each,
            so that at most `budget + prefill_chunk` entries per head are stored on average, plus `buffer` if the cache
            was not empty before. A share is counted from the length of the whole input, from the first chunk on.
        schedule: "bounded" as above; "once": the prompt alone is evicted; "filled": a prompt, too, only when budget and
            buffer are reached. None for "bounded", or the preset's.
        preset: eviction as a released code does it: "defensivekv", "trimkv", "dbtrimkv" or "kvpress"
            (docs/reference/presets.md). Options that it fixes must be left out.
        token_floors: pairs `(tokens, share)`, tokens in any form of `protect`: their best entries keep at least that
            share of the budget of those that compete, as far as they have any. Shares add up to 1 at most. With
            `modality_ranges` they are floors for images and text.

    Yields:
        The session: `new_cache()`, `extend()`, `load_cache()`, `report()`.
    Raises:
        ValueError: an invalid option; retention without gates; gates of another model; "calibrated" without a
            calibration for these options; a model already in a block. Later, from a forward: a budget smaller than the
            tokens to protect (at a prompt before it runs, if the budget is not in bytes; else at the eviction).
        UnsupportedModelError: the model is not supported.
    """
    plan = make_plan(
        policy, budget, preset=preset, scope=scope, floor=floor, protect=protect, sinks=sinks, recent=recent,
        buffer=buffer, prefill_chunk=prefill_chunk, schedule=schedule, token_floors=token_floors,
    )  # fmt: skip
    if isinstance(budget, int) and not isinstance(budget, bool) and 1 <= budget <= SMALL_BUDGET:
        text = f"budget={budget} keeps {budget} entries per head on average; a share is a float or a text: '{budget}%'"
        warnings.warn(text, stacklevel=3)  # once for each place, which is two frames of contextlib further out
    plain_model(model)  # refuses what is none
    given = [observe] if isinstance(observe, str | Policy) else observe
    if not isinstance(given, Iterable):
        raise ValueError(f"got {shown(observe)} as observe; accepted: policies, by name or as instances")
    observed = tuple(get_policy(one) for one in given)
    if gates is not None and not isinstance(gates, RetentionGates):
        if not isinstance(gates, str | os.PathLike):
            raise ValueError(f"got {shown(gates)} as gates; accepted: RetentionGates, or the folder or Hub id of some")
        gates = RetentionGates.from_pretrained(gates, model)
    session = Session(model, with_budget(plan, budget, gates), gates, observed)
    with intercept(model, session), session.rope_deltas.in_generate(), chunked_prefill(model, session):
        yield session
