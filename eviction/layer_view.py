"""A policy's view of one layer: its entries as dense tensors, its recorded queries and inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from ..retention.decoder_layers import AttentionLayer
from ..retention.ops.kernel_choice import chosen_kernels
from .cache_layer import RaggedLayer
from .model_adapters import Rotary, output_weight
from .ops.naive import attention_over
from .ops.value_norms import value_norms
from .ops.window_risk import DTYPES, MAX_DIM, MAX_KERNEL, window_risk
from .ops.window_risk_by_heads import window_risk_by_heads
from .recorded import QueryStatistics, RecordedInputs


class LayerView:
    """One layer's entries as dense tensors, computed when first read.

    Segments shorter than the longest are padded at their end with arbitrary values, see `valid`. If all segments are
    equally long the tensors are views of the storage: policies must not write to them.

    Attributes:
        layer_idx: the layer's index in the decoder.
        time: int64 `(batch,)`: real tokens each row has seen, T.
        horizon: int64 `(batch,)`: real tokens each row will have seen at the end of the running input; more than `time`
            between the chunks of a long prompt.
        num_kv_groups: query heads that share a key/value head.
        scaling: factor of the attention logits.
        budget: int64 `(batch,)`: entries that a head of this layer may keep, on average over the heads that compete; 0
            where nothing is about to be evicted.
        window_size: number of the last queries that the policy reads.
    """

    def __init__(
        self, layer: RaggedLayer, time: torch.Tensor, recorded: torch.Tensor | None = None,
        states: Mapping[str, str] | None = None, window_size: int = 0, budget: torch.Tensor | None = None,
        horizon: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Views `layer`, which has entries.

        `recorded`: int64 `(batch, slots)`, the positions of the recorded queries, -1 for none; `states`: names of the
        policy's states in the layer (`Policy.state_keys()`); the others as the attributes, `horizon` None for `time`.
        """
        assert layer.store is not None, "the layer has entries"
        self._layer, self._store = layer, layer.store
        self._recorded = None if recorded is None else recorded.to(time.device)
        self._states = states or {}
        # By width of the pooling; None without the worst case.
        self._risks: dict[int | None, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self.window_size = window_size
        self.time = time
        self.horizon = time if horizon is None else horizon
        self.budget = torch.zeros_like(time) if budget is None else budget
        self.layer_idx = layer.layer_idx
        self.scaling = layer.scaling
        self.num_kv_groups = layer.num_kv_groups

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, num_kv_heads, n), n the longest segment."""
        return self._store.batch, self._store.num_kv_heads, max(self._store.lengths, default=0)

    @cached_property
    def _index(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._store.dense_index()

    def _dense(self, buffer: str) -> torch.Tensor:
        return self._store.dense(self._store.buffers[buffer], self._index[0])

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool `(batch, num_kv_heads, n)`: False for padding after a segment's last entry."""
        return self._index[1]

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 `(batch, num_kv_heads, n)`: index of the entry's token among its row's real tokens; -1 for none."""
        return torch.where(self.valid, self._dense("position"), -1).long()

    @cached_property
    def keys(self) -> torch.Tensor:
        """`(batch, num_kv_heads, n, head_dim)` post-RoPE, the model's dtype."""
        return self._dense("key")

    @cached_property
    def values(self) -> torch.Tensor:
        """`(batch, num_kv_heads, n, value_dim)`, the model's dtype."""
        return self._dense("value")

    @property
    def log_beta(self) -> torch.Tensor:
        """fp32 `(batch, num_kv_heads, n)`, each in (-∞, 0]; for policies that need `log_beta`."""
        return self.state("log_beta")

    @property
    def first_head(self) -> int:
        """The number, in the layer, of the view's first head: not 0 where tensor parallelism divides the heads."""
        return self.attention.shards.index * self.shape[1]

    def of_all_heads(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """`(batch, all key/value heads, n)` of the view's `(batch, num_kv_heads, n)`, also of those in other processes.

        Args:
            fill: for entries beyond a process's longest segment.
        """
        return self.attention.shards.gathered([values], fill)[0]

    def of_own_heads(self, values: torch.Tensor) -> torch.Tensor:
        """The part of a tensor `(batch, all key/value heads, …)` for the heads of this view."""
        return self.attention.shards.own(values)

    def state(self, name: str) -> torch.Tensor:
        """A per-entry state by name, fp32 `(batch, num_kv_heads, n)`: one of the policy's `states`, or `log_beta`."""
        return self._dense(self._states.get(name, name))

    @cached_property
    def output_weight(self) -> torch.Tensor:
        """`(num_heads, value_dim, hidden_size)`: W_O, a view if in memory; needs `output_weight`."""
        return output_weight(self._layer.attention, self._store.value.dtype)

    @cached_property
    def value_norms(self) -> torch.Tensor:
        """fp32 `(batch, num_kv_heads, n)`: `ops.value_norms`, memoised for forks; needs `output_weight`."""
        return self._store.memoised("value_norms", lambda: value_norms(self.values, self.output_weight))

    @property
    def attention(self) -> AttentionLayer:
        """The layer's attention module and its sizes."""
        return self._layer.attention

    @property
    def inputs(self) -> RecordedInputs | None:
        """The attention's inputs, for policies that need `hidden_states`; None in a cache that was loaded."""
        return self._layer.inputs

    @property
    def expected_queries(self) -> QueryStatistics:
        """Mean and covariance of the row's queries before RoPE; for policies that need `query_statistics`."""
        assert self._layer.statistics is not None, "the policy needs them and the cache records them"
        return self._layer.statistics

    @property
    def rotary(self) -> Rotary:
        """The rotation of the layer's queries; for policies that need `query_statistics`."""
        rotary = self._layer.observers.rotary
        assert rotary is not None, "the policy needs query statistics and the session records them"
        return rotary.of_layer(self._layer.layer_idx)

    @cached_property
    def _newest(self) -> torch.Tensor:
        assert self._recorded is not None and self.window_size, "the policy needs queries, the cache has them"
        newest = self._recorded.topk(self.window_size, dim=1).indices
        return newest.flip(1)

    @property
    def query_positions(self) -> torch.Tensor:
        """int64 `(batch, window)`: positions of the last queries, ascending; -1 where a row has fewer."""
        assert self._recorded is not None
        return self._recorded.gather(1, self._newest)

    @cached_property
    def queries(self) -> torch.Tensor:
        """`(batch, num_heads, window, head_dim)` post-RoPE: the queries of each row's last `window` real tokens."""
        data = self._layer.window
        assert data is not None
        index = self._newest[:, None, :, None].expand(-1, data.shape[1], -1, data.shape[3])
        return data.gather(2, index)

    @cached_property
    def window_attention(self) -> torch.Tensor:
        """fp32 `(batch, num_kv_heads, num_kv_groups, window, n)`: causal attention of `queries` over the entries."""
        return attention_over(self.keys, self.positions, self.queries, self.query_positions, self.scaling)

    def worst_attention(self, kernel: int) -> torch.Tensor:
        """fp32 `(batch, num_kv_heads, n)`: the maximum of `window_attention` over queries, pooled and renormalised.

        See `ops.window_risk`; 0 for the window's own entries. `window_attention` itself is not materialised.

        Args:
            kernel: width of the pooling, odd.
        """
        worst, _ = self._risk(kernel)
        assert worst is not None, "a kernel was given"
        return worst

    @property
    def mean_attention(self) -> torch.Tensor:
        """fp32 `(batch, num_kv_heads, n)`: `window_attention`, mean over queries and heads of a group."""
        return self._risk(next(iter(self._risks), None))[1]

    def _fits_kernel(self, width: int) -> bool:
        if chosen_kernels(self.time.device) == "reference":
            return False
        return width <= MAX_KERNEL and self.keys.dtype in DTYPES and self.keys.shape[3] <= MAX_DIM

    def _risk(self, kernel: int | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The worst case with a pooling of that width, None for `kernel=None`, and the mean."""
        if kernel not in self._risks:
            assert self.window_size, "the policy has a window"
            limit = self.time - self.window_size
            given = self.queries, self.keys, self.positions, self.query_positions, limit, self.scaling
            if self._fits_kernel(kernel or 1):
                worst, mean = window_risk(*given, kernel or 1, mean=True)
                assert mean is not None, "the mean was requested"
                self._risks[kernel] = worst, mean
            else:
                name = "window_risk", self.window_size, kernel, *self.time.tolist()
                self._risks[kernel] = self._store.memoised(name, lambda: window_risk_by_heads(*given, kernel))
        return self._risks[kernel]
