"""The session of an `evict` block: makes caches, follows the model's forwards, and records data for policies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache, DynamicCache

from tenure.documents import shown

from ..retention.attention_arguments import INTEGERS, is_count, padding_mask
from ..retention.continuation import continues_from_cache
from ..retention.decoder_layers import (
    AttentionLayer,
    UnsupportedModelError,
    execution_device,
    full_attention_layers,
    plain_model,
    replaces_tensors,
    text_config,
    text_decoder,
)
from ..retention.gates import RetentionGates
from ..retention.seams import AttentionCall, Interceptor
from .cache import RaggedCache, Recording
from .cache_layer import RaggedLayer
from .cache_report import Report
from .forward_state import RollbackConfig, SequenceState, new_tokens
from .layer_gates import LayerGates
from .model_adapters import (
    LENGTH_DEPENDENT,
    OUTPUT_PROJECTIONS,
    ROTARY_TYPES,
    Rotary,
    find_rotary,
    has_output_weight,
    is_rotary_reviewed,
    rope_parameters,
    rope_type,
)
from .mrope import RopeDeltas
from .packed import PackedCache
from .plan import BudgetLayout, EvictionPlan
from .policies.policy import Policy
from .recorders import InputRecorder, Observers
from .serialization import load_cache, save_cache
from .stacking import stack
from .storage.paged_store import store_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Session(Interceptor):
    """Yielded by `evict`: makes caches, reads tokens into them, loads and stacks them, and reports.

    Attributes:
        model: the block's model.
        plan: which entries new caches evict, and when.
        gates: the retention gates, if any.
        policies: the plan's policy and those that are only observed.
        window_size: number of the last queries that every cache records.
        observers: states and statistics that every cache records while the model runs.
        recording: the part of these that caches hold.
        logits_to_keep: this argument of the running call of the model: the number of last logits that its caller reads;
            0 or a tensor of indices for all.
        shards: the model's heads in this process.
        call_mask: `attention_mask` of the running call of the model; None if there was none.
        rope_deltas: M-RoPE's offsets, which each cache has of its own.
    """

    def __init__(
        self, model: PreTrainedModel, plan: EvictionPlan, gates: RetentionGates | None, observe: tuple[Policy, ...]
    ) -> None:
        self.model = model = plain_model(model)
        self.plan = plan
        self.gates = gates
        self._config = text_config(model)
        self._depth = self._config.num_hidden_layers
        self._layers = {layer.layer_idx: layer for layer in full_attention_layers(model)}
        self.shards = next(iter(self._layers.values())).shards
        self._devices = {index: execution_device(layer.module) for index, layer in self._layers.items()}
        self.policies = policies = (plan.policy, *observe)
        self._needs = frozenset().union(*(policy.needs for policy in policies))
        self.window_size = max(policy.window_size for policy in policies)
        self._running: RaggedCache | PackedCache | None = None
        self._last: RaggedCache | None = None
        self.rope_deltas = RopeDeltas(model)
        # Other layers have no state but the tensors of their cache.
        self._continues = all(map(replaces_tensors, DynamicCache(config=self._config).layers))
        from transformers.modeling_layers import GradientCheckpointingLayer

        modules = text_decoder(model).modules()
        self._checkpointed = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
        self._check(model)
        self._gates = None
        if gates is not None and "log_beta" in self._needs:
            self._gates = LayerGates(gates, self._devices, self.shards)
        self.observers = Observers(policies, self._find_rotary())
        self._recorder = InputRecorder(Rotary(model) if "hidden_states" in self._needs else None)
        self.recording = Recording(
            model=model, gates=gates, policies=policies, window_size=self.window_size, observers=self.observers,
            entry_states=("log_beta",) * (self._gates is not None) + self.observers.state_keys, layout=self.layout,
            new_cache=self.new_cache, require=self.require_recorded, track=self.track, save=save_cache,
            rollback=RollbackConfig(),
        )  # fmt: skip
        self.logits_to_keep: Any = 0
        self.call_mask: Any = None
        self._in_call = False  # of the model; False while its decoder is called directly
        # The caches that replace those given to the model, which stay empty.
        self._replaced: WeakKeyDictionary[Cache, RaggedCache] = WeakKeyDictionary()
        self._inputs: list[torch.Tensor] | None = None  # of a one-token forward, until its end

    def _check(self, model: PreTrainedModel) -> None:
        if self.plan.prefill_chunk is not None:
            kinds = DynamicCache(config=self._config).layers
            others = {
                type(layer).__name__
                for index, layer in enumerate(kinds)
                if index not in self._layers and not replaces_tensors(layer)
            }
            if others:
                raise ValueError(
                    f"prefill_chunk needs layers that take a prompt in pieces; {type(model).__name__} has "
                    f"{', '.join(sorted(others))}: leave prefill_chunk unset"
                )
            scaled = {rope_type(each) for each in rope_parameters(self._config)} & LENGTH_DEPENDENT
            if scaled:
                raise ValueError(
                    f"prefill_chunk needs RoPE that does not depend on the length of the input; {type(model).__name__} "
                    f"has {', '.join(sorted(scaled))}: leave prefill_chunk unset"
                )
        self.plan.total(1, self.layout)
        for policy in self.policies:
            check_model_has(policy, model, self._layers.values())
            if "hidden_states" in policy.needs and self.plan.prefill_chunk is not None:
                raise ValueError(f"policy {policy.name!r} scores a prompt as a whole: leave prefill_chunk unset")
        if self.gates is not None:
            self.gates.check_model(model)
        elif "log_beta" in self._needs:
            name = next(policy.name for policy in self.policies if "log_beta" in policy.needs)
            raise ValueError(
                f"policy {name!r} needs gates: give gates=RetentionGates.from_pretrained(folder), or the folder; "
                "`tenure train` trains them. Other policies, such as 'snapkv', need none"
            )

    def _find_rotary(self) -> Rotary | None:
        """The rotation of the model's queries, if a policy needs it; UnsupportedModelError if it is not known."""
        policy = next((policy for policy in self.policies if "query_statistics" in policy.needs), None)
        if policy is None:
            return None
        rotary = find_rotary(self.model, list(self._layers.values()))
        if rotary is None:
            raise UnsupportedModelError(
                f"policy {policy.name!r} does not support {type(self.model).__name__}: it needs queries before RoPE, "
                f"and models of type {self._config.model_type!r} do not rotate them by their decoder's rotary embedding"
            )
        return rotary

    @property
    def layout(self) -> BudgetLayout:
        """The heads that share a row's budget; `entry_bytes` counts key and position, the least that is stored."""
        layers = list(self._layers.values())
        dim = max(layer.head_dim for layer in layers)
        width = dim * self.model.dtype.itemsize + torch.int32.itemsize
        kind = store_class(execution_device(self.model), self.model.dtype, dim)
        return BudgetLayout(tuple(layer.all_kv_heads for layer in layers), width, kind.spare)

    def new_cache(self) -> RaggedCache:
        """An empty cache for the block's model; ValueError while `generate` runs only some of its layers."""
        if self._config.num_hidden_layers != self._depth:
            self._config.num_hidden_layers = self._depth  # transformers does not restore it if its draft raises
            raise ValueError(
                "assistant_early_exit, which drafts with some of the model's layers, is not supported inside evict(); "
                "use assistant_model or prompt_lookup_num_tokens"
            )
        layers = DynamicCache(config=self._config).layers
        ring_size = self.recording.rollback.ring_size(self.window_size)
        for index, layer in self._layers.items():
            layers[index] = RaggedLayer(layer, ring_size, self.observers)  # type: ignore[call-overload]
        cache = RaggedCache(self.recording, self.plan, layers)
        self.track(cache)
        return cache

    def stack(self, caches: Sequence[RaggedCache]) -> RaggedCache:
        """One cache with the rows of `caches`, for decoding all of them together; see `stacking.stack`."""
        return stack(caches)

    def load_cache(self, path: str | os.PathLike) -> RaggedCache:
        """The cache that `cache.save(path)` wrote, under the plan that it was saved with.

        Raises:
            CacheFileError: a file that is absent, truncated, of another model, of other gates or of a newer schema; or
                this session does not record the data that the cache contains. The message names the reason.
        """
        return load_cache(self.recording, path)

    @torch.no_grad()
    def extend(
        self, cache: RaggedCache, ids: torch.Tensor | Sequence[int], attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, logits_to_keep: int = 0, inputs: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Reads more tokens into `cache` by one call of the model, evicting as its plan says, and returns the logits.

        Inputs longer than the plan's `prefill_chunk` are read in chunks. Call it within the block.

        Args:
            cache: a cache of this session.
            ids: token ids `(batch, n)`, one row per row of the cache; or a sequence of n ids for every row of the cache
                (one row if it is empty). On any device; n >= 1.
            attention_mask: `(batch, n)`, 0 for padding among the new tokens, which is neither stored nor counted; None
                if all are real. The padding that the cache has seen already is known to it.
            position_ids: int64 `(batch or 1, n)` for RoPE. None: positions continue each row's real tokens, so that
                padding has no effect on them.
            logits_to_keep: return the logits of so many last columns; 0 for all.
            inputs: further arguments of the model, such as the `pixel_values` of the images among `ids`.

        Returns:
            Logits `(batch, n or logits_to_keep, vocab_size)`, the model's dtype.
        Raises:
            ValueError: another shape of `ids` or `attention_mask`, another number of rows than the cache has, a cache
                of another block, images after the first tokens of a cache where they have positions of their own
                (M-RoPE), or as the forward under `evict`.
        """
        if not isinstance(cache, RaggedCache):
            raise ValueError(f"got {shown(cache)} as cache; accepted: one of this session, see session.new_cache()")
        device, rows = execution_device(self.model), cache.rows
        tokens = _token_ids(ids, max(1, len(rows.tokens))).to(device)
        if attention_mask is not None:
            _check_shape("attention_mask", attention_mask, [tuple(tokens.shape)])
        if position_ids is not None:
            _check_shape("position_ids", position_ids, [tuple(tokens.shape), (1, tokens.shape[1])])
        if not is_count(logits_to_keep):
            raise ValueError(f"got logits_to_keep={shown(logits_to_keep)}; accepted: a number of columns, 0 for all")
        if not isinstance(inputs, Mapping | None):
            raise ValueError(f"got {shown(inputs)} as inputs; accepted: arguments of the model by name")
        deltas = rows.rope_deltas
        further = dict(inputs or {})
        if further and rows.tokens and self.rope_deltas.kept:
            raise ValueError(
                f"got {', '.join(further)} for a cache that has {rows.columns} columns; accepted for a model that "
                "numbers images by time, height and width: images among a cache's first tokens"
            )
        if position_ids is None and (rows.padded or attention_mask is not None or deltas is not None):
            position_ids = self._positions_after(rows, tokens, attention_mask)
            if deltas is not None:  # text after an image: the same position in time, height and width
                position_ids = (position_ids + deltas.to(device)).expand(3, -1, -1)
        if attention_mask is None and rows.padded and len(cache.ragged) < len(cache.layers):
            attention_mask = torch.ones_like(tokens)  # transformers' own layers store padding and must mask it
        if attention_mask is not None:
            valid = attention_mask.to(device).bool()
            attention_mask = torch.cat([rows.mask().to(device), valid], dim=1) if rows.tokens else valid
        given: dict[str, Any] = {}
        if attention_mask is not None:
            given["attention_mask"] = attention_mask
        if position_ids is not None:
            given["position_ids"] = position_ids.to(device)
        call = {"past_key_values": cache, "use_cache": True, "logits_to_keep": logits_to_keep}
        return self.model(input_ids=tokens, **given, **further, **call).logits

    @staticmethod
    def _positions_after(rows: SequenceState, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """int64 `(batch, n)`: positions that continue each row's real tokens; those of padding are arbitrary."""
        seen = torch.tensor(rows.tokens or [0] * len(tokens), device=tokens.device).unsqueeze(1)
        if mask is None:
            return seen + torch.arange(tokens.shape[1], device=tokens.device)
        return (seen + mask.to(tokens.device).long().cumsum(1) - 1).clamp(min=0)

    @property
    def entry_states(self) -> tuple[str, ...]:
        """Names of the fp32 numbers stored with every entry in addition to key, value and position."""
        return self.recording.entry_states

    def track(self, cache: RaggedCache) -> None:
        """Makes `cache` the last one."""
        self._last = cache

    @property
    def last_cache(self) -> RaggedCache:
        """The cache of the last forward; ValueError if there was none."""
        if self._last is None:
            raise ValueError("no cache to report on: run the model first")
        return self._last

    def report(self, cache: RaggedCache | None = None) -> Report:
        """The numbers of `cache`, by default of the last one; ValueError if there is none."""
        if not isinstance(cache, RaggedCache | None):
            raise ValueError(f"got {shown(cache)} as cache; accepted: a cache of this session")
        return (self.last_cache if cache is None else cache).report()

    def require_recorded(self, policy: Policy) -> None:
        """Raises ValueError if `policy` needs what this session does not record."""
        check_model_has(policy, self.model, self._layers.values())
        missing = sorted((policy.needs & {"log_beta", "queries", "query_statistics", "hidden_states"}) - self._needs)
        if policy.states and policy not in self.observers.policies:
            missing.append(f"{', '.join(policy.states)} of every entry as {policy!r} observes it")
        if policy.window_size > self.window_size and "queries" not in missing:
            missing.append(f"a window of {policy.window_size} queries (recorded: {self.window_size})")
        if missing:
            raise ValueError(
                f"policy {policy.name!r} needs {', '.join(missing)}, which this session does not record; name the "
                "policy in evict(..., observe=[...])"
            )

    # Called by the hooks.

    def begin_call(self, kwargs: dict[str, Any]) -> None:
        self._in_call = True
        self.logits_to_keep, self.call_mask = kwargs.get("logits_to_keep", 0), kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        filled = cache.rows if isinstance(cache, RaggedCache) and cache.rows.tokens else None
        if filled is not None:
            _refuse_question_alone(kwargs.get("input_ids"), filled.columns)
            _refuse_repeated_prompt(kwargs.get("position_ids"), filled.columns)
        self.rope_deltas.load(filled, positions_given=kwargs.get("position_ids") is not None)

    def end_call(self) -> None:
        self._in_call = False
        self.logits_to_keep, self.call_mask = 0, None

    def uses_cache(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward of the decoder with these arguments writes to a cache."""
        use_cache = kwargs.get("use_cache")
        writes = self._config.use_cache if use_cache is None else use_cache
        return bool(writes) or isinstance(kwargs.get("past_key_values"), RaggedCache)

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._running = None
        if isinstance(kwargs.get("past_key_values"), PackedCache):
            self._running = kwargs["past_key_values"]
            return kwargs
        if not self.uses_cache(kwargs):
            return kwargs
        if any(module.training and module.gradient_checkpointing for module in self._checkpointed):
            raise ValueError(
                "got a model in training mode with gradient checkpointing, by which its layers drop the cache; call "
                "model.eval() first"
            )
        cache = self.cache_for(kwargs.get("past_key_values"))
        source = kwargs.get("inputs_embeds")
        source = kwargs["input_ids"] if source is None else source
        batch, q_len = source.shape[:2]
        if q_len > 1 and cache.rows.tokens:
            self._require_continuation()
        if self.drafts and cache.made_by_generate and not cache.drafting:
            cache.activate_past_recording()
        mask = padding_mask(kwargs.get("attention_mask"), self.call_mask)
        valid = new_tokens(mask, batch, q_len, cache.columns_seen)
        step = cache.begin_step(batch, q_len, valid, source.device)
        self.observers.begin(step, kwargs.get("position_ids"), cache.columns_seen)
        self._recorder.begin(step, kwargs.get("position_ids"), cache.columns_seen)
        self._running = cache
        self._inputs = [] if self._gates and not step.first and q_len == 1 and valid is None else None
        self.track(cache)
        return kwargs | {"past_key_values": cache, "use_cache": True}

    def _require_continuation(self) -> None:
        """Raises ValueError if state-space layers start anew with an input of several tokens; tried once."""
        if not self._continues and not continues_from_cache(self.model):
            raise ValueError(
                f"{type(self.model).__name__} does not continue several tokens from its cache: its state-space layers "
                "start anew with them; accepted after the first input: one token at a time"
            )
        self._continues = True

    @property
    def drafts(self) -> int:
        """Number of the running call's last tokens that are drafts, and may be removed, if `generate` made the call."""
        return max(0, self.logits_to_keep - 1) if isinstance(self.logits_to_keep, int) else 0

    def cache_for(self, given: Any) -> RaggedCache:
        """The session's cache to be used in place of the one given to the model."""
        if given is None:
            return self.new_cache()
        if isinstance(given, RaggedCache):
            if given.recording is not self.recording:
                raise ValueError("this cache belongs to another evict() block; make one with session.new_cache()")
            return given
        if type(given) is not DynamicCache or given.offloading:
            kind = (
                f"an offloaded {type(given).__name__}"
                if isinstance(given, Cache) and given.offloading
                else (type(given).__name__)
            )
            raise ValueError(
                f"inside evict() the cache is the session's own, {kind} cannot be used; leave cache_implementation and "
                "past_key_values unset, or pass session.new_cache()"
            )
        if given.get_seq_length() > 0:
            raise ValueError(
                "the cache given to the model was filled outside this evict() block; start with session.new_cache()"
            )
        former = self._replaced.get(given)
        if former is not None and former.columns_seen:
            raise ValueError(
                f"got the same {type(given).__name__} as in an earlier call, whose {former.columns_seen} tokens are in "
                "the session's own cache; pass the past_key_values of that call's output, or a session.new_cache()"
            )
        cache = self._replaced[given] = self.new_cache()
        cache.made_by_generate = True
        if any(getattr(layer, "record_past", False) for layer in given.layers):
            cache.activate_past_recording()  # assisted decoding will take tokens back from the sliding layers
        return cache

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall | None:
        if self._running is None:
            return None
        state: dict[str, torch.Tensor] = {}
        if isinstance(self._running, PackedCache):
            if self._running.gated is not None and self._gates is not None:
                hidden_states = hidden_states[:, self._running.gated]
                state["log_beta"] = self._gates.log_beta(layer.layer_idx, hidden_states)
            return self._running.open_layer(layer.layer_idx, state)
        if self._inputs is not None:
            self._inputs.append(hidden_states)
        elif self._gates is not None:
            with torch.no_grad():
                state["log_beta"] = self._gates.log_beta(layer.layer_idx, hidden_states)
        call = self._running.open_layer(layer.layer_idx, state)
        self._recorder.record(self._running.layers[layer.layer_idx], hidden_states)  # type: ignore[arg-type]
        return call

    def end(self, completed: bool) -> None:
        cache, self._running = self._running, None
        inputs, self._inputs = self._inputs, None
        if cache is None:
            return
        if isinstance(cache, PackedCache):
            return cache.end_step(completed)
        if completed and inputs:
            assert self._gates is not None
            log_beta = self._gates.of_all_layers(inputs)
            for layer in cache.ragged:
                assert layer.store is not None
                layer.store.fill("log_beta", log_beta[layer.layer_idx])
        cache.end_step(completed)
        if completed and self._in_call:
            self.rope_deltas.store(cache.rows)


def _token_ids(ids: Any, rows: int) -> torch.Tensor:
    """int64 `(rows, n)` token ids, from a tensor or a sequence, one row of ids being repeated.

    Raises:
        ValueError: no whole numbers, or another shape.
    """
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # texts, ragged lists, numbers beyond int64
        raise ValueError(f"got {shown(ids)} as ids; accepted: token ids (batch, n) or (n,)") from None
    if tokens.ndim == 1:
        tokens = tokens.expand(rows, -1)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"got ids {tuple(tokens.shape)}; accepted: (batch, n) or (n,), of at least one token")
    if tokens.numel() and tokens.dtype not in INTEGERS:
        raise ValueError(f"got ids in {tokens.dtype}; accepted: token ids, in torch.int64 or as whole numbers")
    return tokens.long()


def _check_shape(name: str, given: Any, accepted: list[tuple[int, ...]]) -> None:
    """Raises ValueError unless a tensor has one of the shapes."""
    shape = tuple(given.shape) if isinstance(given, torch.Tensor) else None
    if shape not in accepted and not (name == "position_ids" and shape is not None and len(shape) == 3):
        raise ValueError(
            f"got {name} {shown(given) if shape is None else shape} for ids {accepted[0]}; accepted: a tensor with one "
            "number for each of the new tokens"
        )


def _refuse_repeated_prompt(position_ids: Any, columns: int) -> None:
    """Raises ValueError if a call reads so many tokens, from position 0 on, as its cache has seen columns.

    That is `generate` with a prompt whose tokens are all in the cache: transformers then reads all of them again.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != columns:
        return
    if columns > 1 and bool((position_ids == torch.arange(columns, device=position_ids.device)).all()):
        raise ValueError(
            f"got a prompt whose {columns} tokens are all in its cache, so that nothing is left to read; accepted: a "
            "prompt that is longer than its cache, or a cache without the last token (cache.crop(-1))"
        )


def _refuse_question_alone(ids: Any, columns: int) -> None:
    """Raises ValueError if nothing is left of a prompt from which `generate` has taken what its cache holds."""
    if isinstance(ids, torch.Tensor) and ids.ndim == 2 and len(ids) and ids.shape[1] == 0:
        raise ValueError(
            f"got no tokens beyond the {columns} in the cache; accepted by generate: the ids of context and question "
            "together (it leaves out those in the cache), or session.extend(cache, question) and then its logits"
        )


def check_model_has(policy: Policy, model: PreTrainedModel, layers: Iterable[AttentionLayer]) -> None:
    """Raises UnsupportedModelError, naming what is missing, unless `policy` can run on `model` with these layers."""
    reason, softmaxes = "", {layer.softmax for layer in layers} - {""}
    if "output_weight" in policy.needs:
        without = [layer.name for layer in layers if not has_output_weight(layer)]
        if without:
            names = ", ".join(OUTPUT_PROJECTIONS)
            reason = (
                f"the output projection as a linear layer ({names}) over the heads' outputs, which {without[0]} does "
                "not have"
            )
    if policy.needs - {"log_beta"} and any(layer.latent for layer in layers):
        reason = "keys and values of every head, where this model's cache holds one latent for all of them"
    elif softmaxes and (policy.observes or policy.needs & {"queries", "query_statistics", "hidden_states"}):
        reason = f"the weights of an ordinary softmax, where this model's attention has {softmaxes.pop()}"
    elif "hidden_states" in policy.needs and not is_rotary_reviewed(model):
        reason = (
            f"queries before RoPE, which are known for the model types {', '.join(ROTARY_TYPES)}; this one is "
            f"{text_config(model).model_type!r}"
        )
    if not policy.scores_heads_alone and any(layer.shards.count > 1 for layer in layers):
        reason = "all heads of a layer in one process, where tensor parallelism divides them"
    if reason:
        kind = type(model).__name__
        raise UnsupportedModelError(f"policy {policy.name!r} does not support {kind}: it needs {reason}")
