"""The cache layer of one full-attention layer: transformers' interface on one side, ragged storage on the other."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..retention.attention_arguments import SOFTMAX, refuse_dropout, refuse_unknown, softmax_of
from ..retention.decoder_layers import AttentionLayer, UnsupportedModelError
from ..retention.seams import AttentionCall
from .forward_state import ForwardStep
from .model_adapters import Rotary
from .recorded import QueryStatistics, RecordedInputs
from .storage.attention import ragged_attention
from .storage.dense_attention import latent_attention
from .storage.paged_store import store_class
from .storage.segment_store import SegmentStore, is_frozen


class LayerObserver:
    """Observes the queries of every forward of a layer; this base class observes nothing (see `recorders.Observers`).

    Attributes:
        state_keys: names of the per-entry states that the layer stores in addition to key, value and position; 0 for a
            new entry.
        observed_keys: those of `state_keys` that `observe` updates.
        rotary: the model's RoPE, if `observe` updates `RaggedLayer.statistics`.
    """

    state_keys: tuple[str, ...] = ()
    observed_keys: tuple[str, ...] = ()
    rotary: Rotary | None = None

    @property
    def accumulated(self) -> str:
        """Names the sums over all tokens, which can be undone only by returning to a rollback point; may be empty."""
        return ""

    def observe(self, layer: RaggedLayer, queries: torch.Tensor, step: ForwardStep) -> None:
        """Called with the post-RoPE queries `(batch, num_heads, step.q_len, head_dim)` of a layer.

        May replace `layer.statistics` and the buffers of `observed_keys`, never write to them in place: a forward that
        raises is undone from the old tensors.
        """


class RaggedLayer(CacheLayerMixin):
    """Entries of one layer, a different number for every (row, head).

    A forward calls `open(step, state)`; then transformers calls `update`, and the attention function `attend`.

    Attributes:
        attention: the attention module and its sizes.
        layer_idx: index in the decoder.
        num_kv_groups: query heads that share a key/value head.
        store: the entries; None before the first forward.
        ring_size: slots of `window`; 0 if no queries are recorded.
        window: the last queries, a ring buffer `(batch, num_heads, ring_size, head_dim)`, see
            `RollbackConfig.spare_queries`; None if none are recorded.
        observers: observes the queries of every forward.
        statistics: of the queries seen; None if no policy needs them, or before the first forward.
        scaling: factor of the attention logits, known after the first forward.
        inputs: the attention's inputs while nothing was evicted; None if no policy needs them, or unknown.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False  # evicted entries cannot be restored

    def __init__(self, layer: AttentionLayer, ring_size: int = 0, observers: LayerObserver | None = None) -> None:
        super().__init__()
        self.attention = layer
        self.layer_idx = layer.layer_idx
        self.num_kv_groups = layer.num_heads // layer.num_kv_heads
        self.scaling = 1.0
        self.ring_size = ring_size
        self.observers = observers or LayerObserver()
        self.statistics: QueryStatistics | None = None
        self.store: SegmentStore | None = None
        self.inputs: RecordedInputs | None = None
        self.window: torch.Tensor | None = None
        self._window_shared = False
        self._seen = 0
        self._step: ForwardStep | None = None
        self._state: dict[str, torch.Tensor] = {}
        self._deferred_queries: torch.Tensor | None = None  # of the step's deferred columns
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None  # what the running `update` returned
        # What was recorded before this forward: it replaces tensors, so the old ones are enough to undo it.
        self._before: tuple[torch.Tensor | None, QueryStatistics | None, dict[str, torch.Tensor]] = None, None, {}

    def open(self, step: ForwardStep, state: dict[str, torch.Tensor]) -> AttentionCall:
        """Prepares the layer for a forward.

        Args:
            step: the running forward.
            state: per-entry state of the new tokens, fp32 `(batch, num_kv_heads, q_len)` by name; missing states are
                filled in at the end of the forward.

        Returns:
            The call that computes the layer's attention.
        """
        self._step, self._state = step, state
        self._before = self.window, self.statistics, {}
        return self.attend

    def close(self, completed: bool = True) -> None:
        """Ends the forward for this layer, whether it took part in it or not.

        If the forward is not `completed`, its observations are undone; removing the new entries is left to `rewind`.
        """
        if not completed and self._step is not None:
            self._deferred_queries = None
            self.window, self.statistics, states = self._before
            for name, buffer in states.items():
                assert self.store is not None, "states are of stored entries"
                self.store.buffers[name] = buffer
        self._step, self._state, self._before, self._given = None, {}, (None, None, {}), None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new entries; returns them alone, the attention call reads the rest from the store."""
        step = self._step
        if step is None:
            raise ValueError(
                "this cache belongs to an evict() block and works only inside it, with the block's own model"
            )
        step = self._step = step.on(key_states.device)
        state = {name: values.to(key_states.device) for name, values in self._state.items()}
        if self.observers.state_keys:
            shape, device = key_states.shape[:3], key_states.device
            fp32: dict[str, Any] = {"dtype": torch.float32, "device": device}
            state = state | {name: torch.zeros(shape, **fp32) for name in self.observers.state_keys}
        dtype = self._entry_dtype(key_states)
        key, value = key_states.to(dtype), value_states.to(dtype)
        if self.store is None:
            self.lazy_initialization(key, value)
            kind = store_class(key.device, dtype, key.shape[-1], value.shape[-1])
            self.store = kind.from_dense(key, value, state, step)
        else:
            self.store.append(key, value, state, step)
        self._seen += step.q_len
        self._given = key_states, value_states
        return key_states, value_states

    def _entry_dtype(self, key_states: torch.Tensor) -> torch.dtype:
        """That of the entries stored so far; for the first ones the dtype in which the model's attention computes."""
        if self.store is not None:
            return self.store.key.dtype
        device = key_states.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key_states.dtype

    def attend(
        self, base: AttentionCall, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The attention call of this layer. The first forward is the model's own attention, bit for bit."""
        step, store = self._step, self.store
        assert step is not None and store is not None, "update() came before attend()"
        refuse_unknown(module, kwargs)
        softmax = softmax_of(kwargs)
        if not softmax.ordinary and not self.attention.softmax:
            given = " and ".join(sorted(SOFTMAX & kwargs.keys()))
            raise UnsupportedModelError(
                f"{type(module).__name__} is not supported: it passes {given} to its attention function, which its "
                "configuration does not announce"
            )
        given, self._given = self._given, None
        unchanged = given is not None and key is given[0] and value is given[1]
        if not unchanged and not self.attention.latent:
            raise UnsupportedModelError(
                f"{type(module).__name__} is not supported: it attends over other keys and values than it caches"
            )
        scaling = kwargs.get("scaling")
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if self.observers.observed_keys:
            self._before[2].update((name, store.buffers[name]) for name in self.observers.observed_keys)
        precisely = without_autocast(query.device)
        with precisely:
            entries = query.to(store.key.dtype)
            self._observe_step(entries, step)
        if step.first:
            return base(module, query, key, value, attention_mask, **kwargs)
        refuse_dropout(kwargs)
        step.require_causal(attention_mask)
        if self.attention.latent:
            expand: Any = self.attention.module.expand_kv  # a part of the model, in its dtype, or autocast's
            output = latent_attention(store, expand, query, scaling, step)
        else:
            with precisely:
                output = ragged_attention(store, entries, scaling, step, softmax)
        output = output.contiguous().to(query.dtype)
        if output.requires_grad:
            output.register_hook(_refuse_backward)
        return output, None

    def _observe_step(self, query: torch.Tensor, step: ForwardStep) -> None:
        """Records and observes the queries of the running forward, the deferred ones later."""
        if not step.deferred:
            self._observe(query, step)
            return
        if step.observed_part is not None:
            self._observe(query[:, :, : -step.deferred], step.observed_part)
        self._deferred_queries = query[:, :, -step.deferred :].detach()

    def _observe(self, query: torch.Tensor, step: ForwardStep) -> None:
        """Records and observes the queries `(batch, num_heads, step.q_len, head_dim)`."""
        if step.slots is not None:
            self._record_queries(query, *step.slots, in_place=step.q_len == 1)
        self.observers.observe(self, query, step)

    def observe_deferred(self, step: ForwardStep | None) -> None:
        """Records and observes the first `step.q_len` deferred columns; their entries are stored already."""
        queries, self._deferred_queries = self._deferred_queries, None
        if step is not None and queries is not None:
            self._observe(queries[:, :, : step.q_len], step.on(queries.device))

    def _record_queries(
        self, query: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, slots: torch.Tensor, in_place: bool
    ) -> None:
        if self.window is None:
            self.window = query.new_zeros(query.shape[0], query.shape[1], self.ring_size, query.shape[3])
        elif self._window_shared or not in_place or is_frozen(self.window):
            # A fork or a rollback point reads the old one, or the forward may raise, or it must not be written to.
            self.window = self.window.clone()
        self._window_shared = False
        self.window[rows, :, slots] = query.detach()[rows, :, columns]

    def share_window(self) -> torch.Tensor | None:
        """The ring buffer, which is not written to from now on: the next forward makes a new one."""
        self._window_shared = True
        return self.window

    def fork(self) -> RaggedLayer:
        """A layer that shares this one's storage until either is written to."""
        other = copy.copy(self)
        if self.store is not None:
            other.store = self.store.fork()
        self.share_window()
        other.share_window()
        return other

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row `i` becomes a copy of the former row `rows[i]`."""
        if self.store is None:
            return
        self.store.select_rows(rows.tolist())
        self.batch_size = len(rows)
        if self.window is not None:
            self.window = self.window.index_select(0, rows.to(self.window.device))
            self._window_shared = False
        if self.statistics is not None:
            self.statistics = self.statistics.select(rows)
        if self.inputs is not None:
            self.inputs = self.inputs.select(rows)

    def rewind(self, lengths: list[int] | None, columns: int) -> None:
        """Shortens the segments to `lengths` entries (None: removes all), when `columns` columns are left."""
        if lengths is None:
            self.reset()
        elif self.store is not None:
            self.store.set_lengths(lengths)
        if self.inputs is not None:
            self.inputs = self.inputs.first(columns)
        self._seen = columns

    # The interface of a transformers cache layer.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.keys = self.values = key_states.new_empty(0)  # the entries are in `store`; Mllama asks layers for these
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Columns seen, padding and evicted tokens included: transformers derives masks and positions from it."""
        return self._seen

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]  # transformers < 5.3: positions
        return self._seen + new, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.store, self.window, self.statistics, self._deferred_queries, self._seen = None, None, None, None, 0
        self.inputs, self.is_initialized = None, False
        self.close()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.select_rows(beam_idx)

    def offload(self) -> None:
        raise NotImplementedError("an evicted cache is small; it is not offloaded")

    def prefetch(self) -> None:
        raise NotImplementedError("an evicted cache is small; it is not offloaded")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Within it nothing is autocast: policies score in fp32, and entries keep their dtype."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _refuse_backward(gradient: torch.Tensor) -> None:
    """Stored entries have no graph, so a gradient through attention over them would be wrong."""
    raise RuntimeError(
        "backward through attention over an evicted cache is not supported: its entries have no gradients; compute "
        "gradients of a cache's first forward only, without prefill_chunk, or train with attach()"
    )
