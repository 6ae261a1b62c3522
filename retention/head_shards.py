"""The division of a model's key/value heads by tensor parallelism, and sums and selections over all processes.

transformers (`tp_plan="auto"`) gives each process of a group the same number of consecutive heads of every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Projections whose outputs hold keys, as transformers' plans name them; divided where their style is DIVIDED.
KEY_PROJECTIONS = frozenset({"k_proj", "qkv_proj", "query_key_value"})
DIVIDED = "colwise"


@dataclass(frozen=True)
class HeadShards:
    """The part of every layer's key/value heads that is in this process.

    Methods that exchange data are collective: every process of the group calls them, in the same order.

    Attributes:
        count: processes that the heads are divided among; 1 for an undivided model.
        index: this process among them.
        group: theirs; None for an undivided model.
    """

    count: int = 1
    index: int = 0
    group: Any = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> HeadShards:
        """The division of `model`; that of an undivided model if every process has all heads."""
        size = getattr(model, "_tp_size", None) or 1
        plan = getattr(model, "_tp_plan", None) or {}
        divided = any(name.rsplit(".", 1)[-1] in KEY_PROJECTIONS and style == DIVIDED for name, style in plan.items())
        if size == 1 or not divided:
            return cls()
        mesh: Any = model._device_mesh
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        return cls(size, mesh.get_local_rank(), mesh.get_group())

    def own(self, of_all_heads: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The part of this process of a tensor with all heads in dimension `dim`."""
        return of_all_heads if self.count == 1 else of_all_heads.chunk(self.count, dim)[self.index]

    def gathered(self, of_own_heads: Sequence[torch.Tensor], fill: float) -> list[torch.Tensor]:
        """The tensors of all heads, by one exchange for all layers.

        Args:
            of_own_heads: `(batch, num_kv_heads, n)` of each layer, of one dtype and device; n may differ between
                layers and processes.
            fill: pads them to the longest of each layer.

        Returns:
            `(batch, count * num_kv_heads, n)` of each layer.
        """
        if self.count == 1:
            return list(of_own_heads)
        first = of_own_heads[0]
        longest = torch.tensor([each.shape[2] for each in of_own_heads], device=first.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.group)
        padded = [
            pad(each, (0, n - each.shape[2]), value=fill)
            for each, n in zip(of_own_heads, longest.tolist(), strict=True)
        ]
        flat = torch.cat([each.flatten() for each in padded])
        parts = [torch.empty_like(flat) for _ in range(self.count)]
        dist.all_gather(parts, flat, group=self.group)
        by_process = [part.split([each.numel() for each in padded]) for part in parts]
        return [
            torch.cat([layers[index].view_as(each) for layers in by_process], dim=1)
            for index, each in enumerate(padded)
        ]

    def summed(self, counts: Sequence[int]) -> list[int]:
        """Sums of whole numbers over the processes."""
        if self.count == 1:
            return list(counts)
        device = "cpu" if dist.get_backend(self.group) == "gloo" else "cuda"
        total = torch.tensor(list(counts), dtype=torch.long, device=device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()


UNDIVIDED = HeadShards()
