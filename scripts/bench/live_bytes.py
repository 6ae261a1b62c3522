"""Counting the bytes of tensors that live at a time, on the meta device, where nothing is computed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Inside the block, counts the storages of meta tensors that are made.

    Integers and masks of a batch stay real, on the CPU, so that shapes which depend on them are right; where they meet
    a meta tensor they are taken as one. A number that is read from a meta tensor is 0.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()

    def known(self, tensors: Any) -> None:
        """Leaves out tensors that live already, such as weights."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        if any(one.is_meta for one in given):
            if func is torch.ops.aten._local_scalar_dense.default:
                return False if args[0].dtype == torch.bool else 0
            if func in INDEXING:
                args = (args[0], _indices(args[1]), *args[2:])
            args, kwargs = tree_map(_as_meta, (args, kwargs))
        out = func(*args, **kwargs)
        for one in tree_flatten(out)[0]:
            if isinstance(one, torch.Tensor) and one.is_meta:
                self._note(one.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def _indices(given: Any) -> list[Any]:
    """Real masks that choose rows as the indices of what they choose."""
    found: list[Any] = []
    for one in given:
        is_mask = isinstance(one, torch.Tensor) and one.dtype == torch.bool and not one.is_meta
        found += one.nonzero(as_tuple=True) if is_mask else [one]
    return found


def _as_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) and not value.is_meta else value


@torch.library.custom_op("tenure_bench::scaled_dot_product", mutates_args=())
def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of a fused attention: its output, and a log-sum of each row."""
    raise NotImplementedError("sizes only: for meta tensors")


@fused_attention.register_fake
def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(*query.shape[:-1], value.shape[-1]), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bias = inputs
    ctx.save_for_backward(query, key, value, *output, *(() if bias is None else (bias,)))


def _gradients(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, _, sums, *bias = ctx.saved_tensors
    dots = torch.empty_like(sums)  # of each row's output and gradient
    found = [torch.empty_like(one) for one in (query, key, value, *bias)]
    del dots
    return (*found, *(() if bias else (None,)))


fused_attention.register_autograd(_gradients, setup_context=_save)


class _Occupancy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_beta: torch.Tensor, samples: int) -> torch.Tensor:
        ctx.save_for_backward(log_beta)
        return log_beta.new_empty(*log_beta.shape[:-1], samples)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


def _flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return fused_attention(query, key, value, None)[0]


def _gated(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, *a: Any, **k: Any) -> Any:
    return fused_attention(query, key, value, bias)[0]


def _gathered(context: Any, local: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(local) for _ in range(context.size)]
    return torch.cat(parts, dim=2)


def _scattered(context: Any, whole: torch.Tensor) -> torch.Tensor:
    return torch.cat([one.contiguous() for one in whole.chunk(context.size, dim=2)[:1]], dim=2)


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Inside the block attention, occupancy and collectives make the tensors that they make on GPUs, and no others."""
    from ...retention import capacity, context_parallel
    from ...retention.attach import Attached
    from ...retention.context_parallel import ContextGroup

    attach = sys.modules[Attached.__module__]  # the package has a function of this name

    with ExitStack() as stack:
        for owner, name, stand_in in (
            (torch, "autocast", lambda *given, **named: nullcontext()),  # which knows no meta device
            (torch, "is_autocast_enabled", lambda *given: False),
            (torch, "get_autocast_dtype", lambda *given: torch.bfloat16),
            (F, "scaled_dot_product_attention", _flash),
            (attach, "is_causal", lambda *given: True),  # which looks at values
            (attach, "gated_attention", _gated),
            (attach, "gated_attention_after", _gated),
            (attach, "biased_attention", _gated),
            (context_parallel, "gated_attention_part", _gated),
            (context_parallel, "_in_order", _gathered),
            (context_parallel, "_owned", _scattered),
            (ContextGroup, "sum", lambda self, values: values.detach().clone()),
            (capacity, "occupancy_at", lambda log_beta, index, segments: _Occupancy.apply(log_beta, index.shape[1])),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield
