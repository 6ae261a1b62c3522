"""Batches: several documents packed into a row, several rows into a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from .data import Example, example_names
from .digests import data_digest


@dataclass
class Batch:
    """Model inputs and targets, all tensors `(batch, seq_len)`.

    `input_ids`, `position_ids`: int64; positions restart at 0 with every document. `attention_mask`: int64, 0 on
    padding; None when nothing is padded or rows are packed (which transformers sees with `use_cache=False` only).
    `loss_mask`: bool, True at tokens that are to be predicted from those before them; False at the first token of every
    document and on padding. `prompt_tokens`: tokens of each row's prompt, see `Example`. `inputs`: what the model takes
    of each row's images, None for rows without; empty if no row has any.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    loss_mask: torch.Tensor
    prompt_tokens: tuple[int, ...] = ()
    inputs: tuple[Mapping[str, Any] | None, ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return Batch(
            self.input_ids.to(device), self.position_ids.to(device), mask, self.loss_mask.to(device),
            self.prompt_tokens,
            tuple(row and {name: value.to(device) for name, value in row.items()} for row in self.inputs),
        )  # fmt: skip

    def row(self, index: int) -> "Batch":
        """One row as a batch, without its padding."""
        real = slice(None) if self.attention_mask is None else self.attention_mask[index] != 0
        input_ids, position_ids, loss_mask = (
            tensor[index, real][None] for tensor in (self.input_ids, self.position_ids, self.loss_mask)
        )
        own = slice(index, index + 1)
        return Batch(input_ids, position_ids, None, loss_mask, self.prompt_tokens[own], self.inputs[own])


def collate(examples: Sequence[Example], pad_token_id: int, padding_side: Literal["left", "right"] = "right") -> Batch:
    """Rows of one length out of examples; shorter ones are padded.

    When any row is packed the batch has no attention mask, since transformers recognises packed documents by
    restarting positions only without one. Padding then has position 0, each token a document of its own: no
    document sees it, and one entry of one token exceeds no budget.

    Raises:
        ValueError: no examples, an empty one, or an unknown `padding_side`.
    """
    if not examples:
        raise ValueError("collate needs at least one example")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    lengths = [len(example.input_ids) for example in examples]
    if min(lengths) == 0:
        raise ValueError("an example without tokens cannot be put into a batch")
    shape = (len(examples), max(lengths))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        part = slice(shape[1] - length, None) if padding_side == "left" else slice(length)
        positions = example.position_ids if example.position_ids is not None else range(length)
        input_ids[row, part] = torch.tensor(example.input_ids)
        position_ids[row, part] = torch.tensor(list(positions))
        attention_mask[row, part] = 1
        loss_mask[row, part] = torch.tensor(example.loss_mask)
    packed = any(example.position_ids is not None for example in examples)
    if not packed:
        # A packed document's first token is at position 0, and so is padding: in both cases nothing predicts it.
        return Batch(
            input_ids, position_ids, None if min(lengths) == shape[1] else attention_mask,
            loss_mask & (position_ids > 0), tuple(example.prompt_tokens for example in examples),
            tuple(example.inputs for example in examples) if any(example.inputs for example in examples) else (),
        )  # fmt: skip
    return Batch(input_ids, position_ids, None, loss_mask & (position_ids > 0))


class EpochSource(Protocol):
    """Examples in epochs: `len()` of them each, in an order of its own; indices run on through the epochs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def epoch_lengths(self, epoch: int) -> Sequence[int]:
        """Number of tokens of each example of an epoch, in that epoch's order."""
        ...


@dataclass
class PackedSource:
    """Rows of at most `length` tokens, each holding whole documents of `source`; row `i` depends on `i` only.

    An epoch is planned from the documents' lengths, first-fit in the epoch's order, and no document is cut or lost.
    The number of rows of an epoch depends on its order, so a row is found by planning the epochs before it
    (lengths only).

    Raises:
        ValueError: a source without epochs (generated documents have their length already), or with longer documents.
    """

    source: EpochSource
    length: int
    _starts: list[int] = field(default_factory=lambda: [0], init=False, repr=False)
    _plans: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not hasattr(self.source, "epoch_lengths"):
            raise ValueError(
                f"{type(self.source).__name__} has no epochs to pack; packing is for data sets of documents"
            )
        longest = max(self.source.epoch_lengths(0))
        if longest > self.length:
            raise ValueError(
                f"a document of {longest} tokens does not fit into rows of {self.length}; lower max_length"
            )

    def __getitem__(self, index: int) -> Example:
        return concatenate([self.source[document] for document in self.documents(index)])

    def documents(self, index: int) -> list[int]:
        """The numbers in `source` of a row's documents."""
        epoch = 0
        while index >= self._start(epoch + 1):
            epoch += 1
        first = epoch * len(self.source)
        return [first + place for place in self._plan(epoch)[index - self._starts[epoch]]]

    def name(self, index: int) -> str:
        """The names of a row's documents in their data."""
        return example_names(self.source, self.documents(index))

    def digest(self) -> str:
        return data_digest(self.source)

    def rows(self, epoch: int) -> int:
        """Number of rows of an epoch."""
        return self._start(epoch + 1) - self._start(epoch)

    def _start(self, epoch: int) -> int:
        """Index of the first row of an epoch."""
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._plan(len(self._starts) - 1)))
        return self._starts[epoch]

    def _plan(self, epoch: int) -> list[list[int]]:
        if epoch not in self._plans:
            if len(self._plans) > 1:
                del self._plans[min(self._plans)]
            self._plans[epoch] = first_fit(self.source.epoch_lengths(epoch), self.length)
        return self._plans[epoch]


def first_fit(lengths: Sequence[int], capacity: int, open_limit: int = 64) -> list[list[int]]:
    """Places of `lengths` in rows of at most `capacity`, every place into the first open row with room for it.

    Args:
        open_limit: rows that stay open; bounds planning to O(documents), with hardly any space lost.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []  # [row number, room]
    for place, length in enumerate(lengths):
        for entry in open_rows:
            if length <= entry[1]:
                break
        else:
            entry = [len(rows), capacity]
            rows.append([])
            open_rows.append(entry)
            if len(open_rows) > open_limit:
                open_rows.remove(min(open_rows[:-1], key=lambda candidate: candidate[1]))
        rows[entry[0]].append(place)
        entry[1] -= length
    return rows


def concatenate(examples: Sequence[Example]) -> Example:
    """One packed row: positions restart with every document, whose first token is never a target."""
    input_ids: list[int] = []
    loss_mask: list[bool] = []
    position_ids: list[int] = []
    for example in examples:
        input_ids += example.input_ids
        loss_mask += [False, *example.loss_mask[1:]]
        position_ids += range(len(example.input_ids))
    return Example(input_ids, loss_mask, examples[0].kind, position_ids)
