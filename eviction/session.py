"""`evict`: a model that keeps its KV cache within a budget while the block lasts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ..retention.gates import RetentionGates
from ..retention.seams import (
    SUPPORTED_FAMILIES,
    AttentionCall,
    AttentionLayer,
    Interceptor,
    UnsupportedModelError,
    full_attention_layers,
    intercept,
    text_config,
)
from .budget import Budget, Plan
from .cache import RaggedCache
from .gating import StackedGates
from .layer import RaggedLayer
from .policies import Policy, get_policy
from .report import Report


class Session(Interceptor):
    """What `evict` yields. Makes caches, follows the model's forwards, reports.

    Attributes:
        plan: what new caches evict and when.
        gates: the retention gates, if any.
        window_size: how many of the last queries every cache remembers.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, gates: RetentionGates | None, observe: tuple[Policy, ...]
    ) -> None:
        self.plan = plan
        self.gates = gates
        self._config = text_config(model)
        self._layers = {layer.layer_idx: layer for layer in full_attention_layers(model)}
        watched = (plan.policy, *observe)
        self._needs = frozenset().union(*(policy.needs for policy in watched))
        self.window_size = max(policy.window_size for policy in watched)
        self._running: RaggedCache | None = None
        self._last: RaggedCache | None = None
        self._check(model)
        self._stacked = StackedGates(gates) if gates is not None and "log_beta" in self._needs else None
        self._inputs: list[torch.Tensor] | None = None  # of a one-token forward, until its end

    def _check(self, model: PreTrainedModel) -> None:
        kinds = DynamicCache(config=self._config).layers
        mixed = {type(kinds[index]).__name__ for index in self._layers if index < len(kinds)} - {"DynamicLayer"}
        if mixed:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not supported by evict(): its attention layers use {', '.join(mixed)}; "
                f"supported: {SUPPORTED_FAMILIES}"
            )
        devices = {parameter.device for layer in self._layers.values() for parameter in layer.module.parameters()}
        if len(devices) > 1:
            raise ValueError(f"evict() needs the model on one device, its layers are on {sorted(map(str, devices))}")
        if self.gates is not None:
            self.gates.check_model(model)
            given = next(self.gates.parameters()).device
            if devices and given not in devices:
                raise ValueError(f"the gates are on {given}, the model is on {devices.pop()}: move them with .to()")
        elif "log_beta" in self._needs:
            raise ValueError(
                "policy 'retention' needs gates: give gates=RetentionGates.from_pretrained(folder), or the folder; "
                "`tenure train` trains them. Other policies, such as 'snapkv', need none"
            )

    def new_cache(self) -> RaggedCache:
        """An empty cache for the block's model."""
        layers = DynamicCache(config=self._config).layers
        while len(layers) <= max(self._layers):
            layers.append(None)  # type: ignore[arg-type]  # replaced below
        for index, layer in self._layers.items():
            layers[index] = RaggedLayer(layer, self.window_size)  # type: ignore[call-overload]
        cache = RaggedCache(self, self.plan, layers)
        self.track(cache)
        return cache

    def track(self, cache: RaggedCache) -> None:
        """Makes `cache` the last one."""
        self._last = cache

    @property
    def last_cache(self) -> RaggedCache:
        """The cache made or used last, for example by `generate`; the session keeps it alive.

        Raises:
            ValueError: there is none yet.
        """
        if self._last is None:
            raise ValueError("no cache to report on: run the model first")
        return self._last

    def report(self, cache: RaggedCache | None = None) -> Report:
        """The numbers of `cache`, by default of the last one; ValueError if there is none."""
        return (self.last_cache if cache is None else cache).report()

    def require_recorded(self, policy: Policy) -> None:
        """Raises ValueError if `policy` needs what this session does not record."""
        missing = sorted((policy.needs & {"log_beta", "queries"}) - self._needs)
        if policy.window_size > self.window_size and "queries" not in missing:
            missing.append(f"a window of {policy.window_size} queries (recorded: {self.window_size})")
        if missing:
            raise ValueError(
                f"policy {policy.name!r} needs {', '.join(missing)}, which this session does not record; name the "
                "policy in evict(..., observe=[...])"
            )

    # What the hooks ask.

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._running = None
        given = kwargs.get("past_key_values")
        if not isinstance(given, RaggedCache):
            use_cache = kwargs.get("use_cache")
            if not (self._config.use_cache if use_cache is None else use_cache):
                return kwargs
        cache = self._cache(given)
        source = kwargs.get("inputs_embeds")
        source = kwargs["input_ids"] if source is None else source
        batch, q_len = source.shape[:2]
        valid = _new_tokens(kwargs.get("attention_mask"), batch, q_len, cache.columns_seen)
        step = cache.begin_step(batch, q_len, valid, source.device)
        self._running = cache
        self._inputs = [] if self._stacked and not step.first and q_len == 1 and valid is None else None
        self.track(cache)
        return kwargs | {"past_key_values": cache, "use_cache": True}

    def _cache(self, given: Any) -> RaggedCache:
        """The session's cache that stands for the one given to the model."""
        if given is None:
            return self.new_cache()
        if isinstance(given, RaggedCache):
            if given.session is not self:
                raise ValueError("this cache belongs to another evict() block; make one with session.new_cache()")
            return given
        if type(given) is not DynamicCache or given.offloading:
            kind = f"an offloaded {type(given).__name__}" if isinstance(given, Cache) and given.offloading else (
                type(given).__name__
            )
            raise ValueError(
                f"inside evict() the cache is the session's own, {kind} cannot be used; leave cache_implementation and "
                "past_key_values unset, or pass session.new_cache()"
            )
        if given.get_seq_length() > 0:
            raise ValueError(
                "the cache given to the model was filled outside this evict() block; start with session.new_cache()"
            )
        cache = self.new_cache()
        if any(getattr(layer, "record_past", False) for layer in given.layers):
            cache.activate_past_recording()  # assisted decoding will take tokens back from the sliding layers
        return cache

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall | None:
        if self._running is None:
            return None
        state = {}
        if self._inputs is not None:
            self._inputs.append(hidden_states)
        elif self._stacked is not None:
            with torch.no_grad():
                state["log_beta"] = self._stacked.gates.log_beta(layer.layer_idx, hidden_states)
        return self._running.open_layer(layer.layer_idx, state)

    def end(self, completed: bool) -> None:
        cache, self._running = self._running, None
        inputs, self._inputs = self._inputs, None
        if cache is None:
            return
        if completed and inputs:
            assert self._stacked is not None
            for layer, values in zip(cache.ragged, self._stacked.log_beta(inputs), strict=True):
                assert layer.store is not None
                layer.store.fill("log_beta", values)
        cache.end_step(completed)


def _new_tokens(mask: Any, batch: int, q_len: int, seen: int) -> torch.Tensor | None:
    """Which of the new tokens are real: bool `(batch, q_len)`, or None if all are."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"evict() needs a 2-D attention_mask (batch, tokens), got {shape}")
    if mask.shape != (batch, seen + q_len):
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}, expected {(batch, seen + q_len)}: one column for each of the "
            f"{seen} tokens the cache has seen and the {q_len} new ones"
        )
    valid = mask[:, seen:].bool()
    return None if bool(valid.all()) else valid


@contextmanager
def evict(
    model: PreTrainedModel,
    policy: str | Policy = "retention",
    budget: float | int = 0.2,
    scope: str | None = None,
    gates: RetentionGates | str | os.PathLike | None = None,
    sinks: int = 4,
    recent: int = 32,
    buffer: int = 128,
    observe: Iterable[str | Policy] = (),
) -> Iterator[Session]:
    """Within the block `model(...)` and `model.generate(...)` keep their cache within a budget.

    The first forward of a cache, the prompt, is evicted down to the budget at its end. After every later forward
    each row stores at most `budget + buffer` entries per head on average: eviction runs when there are more.

    Args:
        model: a transformers decoder with full-attention layers; its other layers are left alone.
        policy: a name (see `policy_names()`) or an instance.
        budget: a float in (0, 1], the share of the tokens seen that may stay, or an int >= 1, entries per head on
            average. 1.0 evicts nothing.
        scope: who competes: "global" (all layers and heads of a row), "layer" (its heads), "head" (each has the same
            number). None for the policy's default.
        gates: for the retention policy; gates or the folder or Hub id they were saved to.
        sinks, recent: first and last tokens of each row that always stay; counted in the budget, and fewer of them
            (first of the recent ones) where they would exceed it.
        buffer: tokens that may be written above the budget before the next eviction.
        observe: other policies whose needs are recorded too, so that `cache.compress(policy=...)` can use them.

    Yields:
        The session: `new_cache()`, `report()`.
    Raises:
        ValueError: a wrong option; retention without gates; gates of another model; a model already in a block.
        UnsupportedModelError: the model cannot be attached to.
    """
    chosen = get_policy(policy)
    plan = Plan(chosen, Budget(budget), scope or chosen.default_scope, sinks, recent, buffer)
    watched = tuple(get_policy(one) for one in ([observe] if isinstance(observe, str | Policy) else observe))
    if gates is not None and not isinstance(gates, RetentionGates):
        gates = RetentionGates.from_pretrained(gates, model)
    session = Session(model, plan, gates, watched)
    with intercept(model, session):
        yield session
