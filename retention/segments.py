"""The documents of a batch: padding, packed documents and positions inside them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Segments:
    """The documents of a batch. Attention, retention and occupancy never cross from one to another.

    Attributes:
        document: `(batch, seq_len)` int64, number of the document in its row, -1 on padding.
        position: `(batch, seq_len)` int64, 0-based position of the token in its document, 0 on padding.
        spans: `(row, start, end)` of every document, end exclusive, in order.
    """

    document: torch.Tensor
    position: torch.Tensor
    spans: tuple[tuple[int, int, int], ...]

    @property
    def dense(self) -> bool:
        """True when every row is one document without padding."""
        batch, seq_len = self.document.shape
        return len(self.spans) == batch and all(end - start == seq_len for _, start, end in self.spans)

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The documents as the kernels read them, without a wait for the device: two `(batch, seq_len)` int32.

        Token t attends to columns `start[t] <= i <= t`, and column i is attended to by `i <= t < end[i]`; on padding
        both ranges are empty.
        """
        seq_len = self.document.shape[1]
        index = torch.arange(seq_len, device=self.device).expand_as(self.document)
        real = self.document >= 0
        start = torch.where(real, index - self.position, index + 1)
        is_last = torch.ones_like(real)
        is_last[:, :-1] = self.document.diff(dim=-1) != 0
        end = torch.where(is_last, index + 1, seq_len).flip(-1).cummin(-1).values.flip(-1)
        end = torch.where(real, end, index)
        return start.to(torch.int32).contiguous(), end.to(torch.int32).contiguous()

    @property
    def device(self) -> torch.device:
        return self.document.device

    @classmethod
    def whole(cls, batch: int, seq_len: int, device: torch.device | str = "cpu") -> Segments:
        """Every row is one document of `seq_len` tokens."""
        document = torch.zeros(batch, seq_len, dtype=torch.long, device=device)
        position = torch.arange(seq_len, device=device).expand(batch, seq_len)
        return cls(document, position, tuple((row, 0, seq_len) for row in range(batch)))

    @classmethod
    def from_inputs(
        cls, batch: int, seq_len: int, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, device: torch.device | str = "cpu",
    ) -> Segments:  # fmt: skip
        """Reads documents off a model's inputs, as transformers does.

        Args:
            attention_mask: `(batch, seq_len)`, 0 on padding. Padding may be left or right; each row is one document.
            position_ids: `(batch, seq_len)` or `(1, seq_len)`; without a mask, a position that does not follow the
                one before it starts a new packed document.

        Raises:
            ValueError: a mask that is not 2-D, of another length, with holes, or given together with packing.
        """
        if attention_mask is not None:
            return cls._from_mask(attention_mask, batch, seq_len, device)
        if position_ids is None or position_ids.dim() != 2:
            return cls.whole(batch, seq_len, device)
        starts = position_ids.to(device).expand(batch, seq_len).diff(dim=-1) != 1
        if not bool(starts.any()):
            return cls.whole(batch, seq_len, device)
        document = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))
        return cls._from_documents(document)

    @classmethod
    def _from_mask(cls, attention_mask: torch.Tensor, batch: int, seq_len: int, device: torch.device | str) -> Segments:
        if attention_mask.shape != (batch, seq_len):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; a 2-D mask of shape {(batch, seq_len)} "
                "with 0 on padding is accepted"
            )
        real = attention_mask.to(device) != 0
        if bool((real.long().diff(dim=-1).abs().sum(-1) > (2 - real[:, 0].long() - real[:, -1].long())).any()):
            raise ValueError("attention_mask has a hole between real tokens; only left or right padding is accepted")
        return cls._from_documents(torch.where(real, 0, -1))

    @classmethod
    def _from_documents(cls, document: torch.Tensor) -> Segments:
        """`document` must hold each document as one run per row, -1 on padding."""
        batch, seq_len = document.shape
        index = torch.arange(seq_len, device=document.device).expand(batch, seq_len)
        is_start = torch.ones_like(document, dtype=torch.bool)
        is_start[:, 1:] = document.diff(dim=-1) != 0
        start = torch.where(is_start, index, 0).cummax(-1).values
        position = torch.where(document >= 0, index - start, 0)
        spans = []
        for row, (numbers, begins) in enumerate(zip(document.tolist(), is_start.tolist(), strict=True)):
            bounds = [i for i, begin in enumerate(begins) if begin] + [seq_len]
            spans += [(row, a, b) for a, b in itertools.pairwise(bounds) if numbers[a] >= 0]
        return cls(document, position, tuple(spans))
