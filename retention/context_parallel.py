"""Context parallel: the tokens of every sequence are divided among processes.

Work on single tokens (embedding, projections, MLP, gates, logits) is done by the process that holds them. In attention
each process has the queries of its tokens, and the keys, values and log β of all tokens, which are gathered; in
backward their gradients are summed over the processes and return to the tokens' owners. Of 2·N equal parts of a
sequence, process r holds part r and part 2·N-1-r, so that causal attention costs the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .decoder_layers import full_attention_layers, plain_model, text_config
from .ops.after_prompt import gated_attention_part
from .ops.kernel_choice import Kernels
from .ops.softmax import Softmax
from .segments import Segments

TOKENS_DIM = 2  # of keys, values and log β


@dataclass(frozen=True)
class ContextGroup:
    """The processes that share sequences.

    Attributes:
        group: of torch.distributed; all of its processes run the same forwards and backwards.
        rank, size: of this process in it.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of_size(cls, size: int) -> ContextGroup:
        """Divides all processes into groups of `size` that follow each other; returns this process's group.

        Every process has to call it.

        Raises:
            ValueError: the number of processes is no multiple of `size`.
        """
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if size < 2 or processes % size:
            raise ValueError(
                f"got context_parallel {size} with {processes} processes; accepted: a number of processes that is a "
                "multiple of it"
            )
        me, found = dist.get_rank(), None
        for first in range(0, processes, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= me < first + size:
                found = cls(group, me - first, size)
        assert found is not None
        return found

    @property
    def parts(self) -> int:
        """A sequence has to have a multiple of this number of tokens."""
        return 2 * self.size

    def first_columns(self, seq_len: int) -> tuple[int, int]:
        """The columns at which this process's two parts of a sequence begin."""
        length = seq_len // self.parts
        return self.rank * length, (self.parts - 1 - self.rank) * length

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        """This process's columns of `(batch, seq_len)`: `(batch, seq_len / size)`."""
        length = whole.shape[1] // self.parts
        return torch.cat([whole[:, first : first + length] for first in self.first_columns(whole.shape[1])], dim=1)

    def gather(self, *local: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tensors `(batch, heads, seq_len, …)` of all tokens in order, from those of each process's tokens.

        Differentiable; one node of the graph for all of them, so that the order of reductions is the same everywhere.
        """
        gathered = _Gather.apply(self, *local)
        assert isinstance(gathered, tuple)
        return gathered

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, without a graph."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: ContextGroup, *local: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.context = context
        return tuple(_in_order(context, one) for one in local)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return None, *(_owned(ctx.context, grad) for grad in grads)


def _in_order(context: ContextGroup, local: torch.Tensor) -> torch.Tensor:
    local = local.contiguous()
    gathered = [torch.empty_like(local) for _ in range(context.size)]
    dist.all_gather(gathered, local, group=context.group)
    halves = [one.chunk(2, dim=TOKENS_DIM) for one in gathered]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim=TOKENS_DIM)


def _owned(context: ContextGroup, whole: torch.Tensor) -> torch.Tensor:
    """The sum over processes of this process's part."""
    parts = whole.chunk(context.parts, dim=TOKENS_DIM)
    by_rank = [torch.cat((parts[rank], parts[-1 - rank]), dim=TOKENS_DIM) for rank in range(context.size)]
    total = torch.empty_like(by_rank[context.rank])
    dist.reduce_scatter(total, by_rank, group=context.group)
    return total


@dataclass(frozen=True)
class SequencePart:
    """This process's part of a batch.

    Attributes:
        context: the processes that share its sequences.
        segments: documents and padding of the whole sequences, of a multiple of `context.parts` tokens.
    """

    context: ContextGroup
    segments: Segments

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, log_beta: torch.Tensor, scaling: float,
        kernels: Kernels, softmax: Softmax,
    ) -> torch.Tensor:  # fmt: skip
        """Gated attention of this process's queries over the keys of all processes, as `gated_attention`.

        Args:
            query: `(batch, num_heads, seq_len / size, head_dim)`.
            key, value, log_beta: `(batch, num_kv_heads, seq_len, …)`, gathered.
        """
        outputs = []
        for first, queries in zip(
            self.context.first_columns(key.shape[TOKENS_DIM]), query.chunk(2, dim=TOKENS_DIM), strict=True
        ):
            outputs.append(
                gated_attention_part(queries, key, value, log_beta, scaling, self.segments, first, kernels, softmax)
            )
        return torch.cat(outputs, dim=TOKENS_DIM)


def require_context_parallel(model: Any) -> None:
    """Checks that a model's tokens meet in full attention only.

    Raises:
        ValueError: it has layers with windows or recurrent states, or positions whose scaling depends on the longest
            position in a forward, which differs between processes.
    """
    config, name = text_config(model), type(plain_model(model)).__name__
    layers, gated = int(config.num_hidden_layers), len(full_attention_layers(model))
    if gated < layers:
        raise ValueError(
            f"{name} has {layers - gated} of {layers} layers without full attention, which would need the tokens of "
            "other processes; accepted with context_parallel: models of full attention in every layer"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} has {kind} positions, which depend on the longest position that a process holds; accepted with "
            "context_parallel: other kinds of rotary positions"
        )
