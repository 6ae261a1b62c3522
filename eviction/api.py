"""`evict`: a model that keeps its KV cache within a budget while the block lasts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from ..retention.gates import RetentionGates
from ..retention.seams import intercept
from .plan import CALIBRATED, Budget, Plan, Protected, with_budget
from .policies.base import Policy
from .policies.registry import get_policy
from .prefill import chunked_prefill
from .session import Session


@contextmanager
def evict(
    model: PreTrainedModel,
    policy: str | Policy = "retention",
    budget: float | int | str = 0.2,
    scope: str | None = None,
    gates: RetentionGates | str | os.PathLike | None = None,
    sinks: int = 4,
    recent: int = 32,
    buffer: int = 128,
    observe: Iterable[str | Policy] = (),
    floor: float | None = None,
    protect: Any = None,
    prefill_chunk: int | None = None,
) -> Iterator[Session]:
    """Within the block `model(...)` and `model.generate(...)` keep their cache within a budget.

    The first input of a cache, the prompt, is evicted down to the budget at its end. After every later forward each
    row stores at most `budget + buffer` entries per head on average: eviction runs when there are more.

    Args:
        model: a transformers decoder with full-attention layers; its other layers are left alone.
        policy: a name (see `policy_names()`) or an instance.
        budget: a float in (0, 1], the share of the tokens seen that may stay; an int >= 1, entries per head on average;
            or a row's total: "65536 entries", or bytes as "512MiB" or "2GB". 1.0 evicts nothing. "calibrated" is the
            one `tenure calibrate` stored with the gates, whose promise holds for documents like those it saw.
        scope: who competes: "global" (all layers and heads of a row), "layer" (its heads), "head" (each has the same
            number), "pyramid" (as "head", with more in the lower layers). None for the policy's default.
        gates: for the retention policy; gates or the folder or Hub id they were saved to.
        sinks, recent: first and last tokens of each row that always stay; counted in the budget, and fewer of them
            (first of the recent ones) where they would exceed it.
        buffer: tokens that may be written above the budget before the next eviction.
        observe: other policies whose needs are recorded too, so that `cache.compress(policy=...)` can use them.
        floor: share of the per-head budget, in [0, 1], that every head keeps in the scopes "layer" and "global"
            (AdaKV: 0.2). None for the policy's default.
        protect: tokens that are never evicted, counted in the budget: ranges `[(start, stop), …]` for all rows, or a
            bool mask `(tokens,)` or `(batch, tokens)`, of positions among a row's real tokens. What lies beyond the
            tokens seen is protected once they are there. Sinks and recent tokens give way to them.
        prefill_chunk: inputs longer than this many tokens run in chunks of so many with an eviction after each, so that
            never more than `budget + prefill_chunk` entries per head are stored on average, plus `buffer` if the cache
            was not empty before. A share is counted from the length of the whole input, from the first chunk on.

    Yields:
        The session: `new_cache()`, `load_cache()`, `report()`.
    Raises:
        ValueError: a wrong option; retention without gates; gates of another model; "calibrated" without a calibration
            for these options; a model already in a block. Later, from a forward: a budget smaller than the tokens to
            protect (at a prompt before it runs, if the budget is not in bytes; else at the eviction).
        UnsupportedModelError: the model cannot be attached to.
    """
    chosen = get_policy(policy)
    plan = Plan(
        chosen,
        Budget(1.0 if budget == CALIBRATED else budget),  # looked up once the gates are there
        scope or chosen.default_scope,
        sinks,
        recent,
        buffer,
        floor=chosen.default_floor if floor is None else floor,
        prefill_chunk=prefill_chunk,
        protect=None if protect is None else Protected.of(protect),
    )
    watched = tuple(get_policy(one) for one in ([observe] if isinstance(observe, str | Policy) else observe))
    if gates is not None and not isinstance(gates, RetentionGates):
        gates = RetentionGates.from_pretrained(gates, model)
    session = Session(model, with_budget(plan, budget, gates), gates, watched)
    with intercept(model, session), chunked_prefill(model, session):
        yield session
