"""A forward of several sequences as one row of tokens, on keys and values in pages that the sequences share.

The tokens of all sequences, a chunk of a prompt or the last token of an answer each, are one batch row `(1, tokens)`:
the model's linear layers see one matrix, without padding, and the attention keeps the sequences apart. A sequence's
context is a compressed prompt, whose heads keep different numbers of entries, then whole tokens, of which every head
keeps each (`storage/page_lists.py`). How it is read is in `storage/page_reads.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..retention.attention_arguments import refuse_dropout, refuse_unknown, softmax_of
from ..retention.decoder_layers import UnsupportedModelError
from ..retention.seams import AttentionCall
from .storage.page_lists import PageLists
from .storage.page_reads import ListReads, PageReads, ReadsConfig, read_pages
from .storage.partial_attention import attend_part, merged

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PackedTokens:
    """New tokens of a sequence in a forward.

    Attributes:
        sequence: its pages, with room for the new tokens.
        ids: the tokens, int64 `(n,)`.
    """

    sequence: PageLists
    ids: np.ndarray


class PackedLayer(CacheLayerMixin):
    """A cache layer as transformers needs it: the packed attention reads the pages itself."""

    is_sliding = is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values of the running forward

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.given = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """0, as every sequence's positions are given to the model."""
        return 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        return query_length if isinstance(query_length, int) else query_length.shape[0], 0

    def get_max_cache_shape(self) -> int:
        return -1

    def get_max_length(self) -> int:
        return -1


class PackedCache(Cache):
    """The cache argument of one packed forward.

    Args:
        buffers: `key` and `value` `(slots, dim)`, and states fp32 `(slots,)`; slot = page * page_size + place.
        layer_indices: decoder indices of the layers, in the order of the segments.
        tokens: new tokens of each sequence; a sequence once.
        gated: indices of the sequences whose new tokens get their log β as a state.
    Attributes:
        tokens: as given, single tokens first.
        last: by index of a sequence, the column of its last new token.
        gated: int64, the columns of the tokens that get a log β; None if there are none.
    """

    def __init__(
        self, buffers: Mapping[str, torch.Tensor], layer_indices: Sequence[int], tokens: Sequence[PackedTokens],
        gated: Sequence[int] = (), config: ReadsConfig | None = None,
    ) -> None:  # fmt: skip
        self.packed_layers = [PackedLayer() for _ in range(max(layer_indices) + 1)]
        super().__init__(layers=list(self.packed_layers))
        self.buffers, self._place = buffers, {index: i for i, index in enumerate(layer_indices)}
        # Single tokens first: they are attended for together.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i].ids) > 1)
        self.tokens = [tokens[i] for i in order]
        sizes = [len(one.ids) for one in self.tokens]
        ends = np.cumsum(sizes)
        self.last = {i: int(ends[place]) - 1 for place, i in enumerate(order)}
        self._heads, device = tokens[0].sequence.heads, buffers["key"].device
        self._single = sum(size == 1 for size in sizes)
        sequences = [one.sequence for one in self.tokens]
        self._decoding, self._config = sequences[: self._single], config
        self._decodes: PageReads | None = None  # of the single tokens, once a query is known
        self._prefills = [
            (int(end) - size, int(end), read_pages(buffers, [sequence], 0, config))
            for sequence, size, end in zip(sequences, sizes, ends, strict=True)
            if size > 1
        ]
        slots = [each.slots(each.tokens, each.tokens + size) for each, size in zip(sequences, sizes, strict=True)]
        flat = np.concatenate(slots, axis=1).reshape(-1, self._heads, int(ends[-1]))
        self._slots = torch.from_numpy(flat).to(device)
        wanted = set(gated)
        chosen = [np.arange(end - size, end) for i, size, end in zip(order, sizes, ends, strict=True) if i in wanted]
        self.gated = torch.from_numpy(np.concatenate(chosen)).to(device) if chosen else None

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions, int64 `(1, tokens)`."""
        ids = np.concatenate([one.ids for one in self.tokens])
        positions = [np.arange(one.sequence.end, one.sequence.end + len(one.ids)) for one in self.tokens]
        device = self.buffers["key"].device
        both = torch.from_numpy(np.stack([ids, np.concatenate(positions)])).to(device)
        return both[:1], both[1:]

    def open_layer(self, layer_idx: int, state: dict[str, torch.Tensor]) -> AttentionCall:
        """The attention of a layer; `state`: log β of the gated tokens, `(1, heads, gated tokens)`."""
        layer = self._place[layer_idx]

        def call(
            base: AttentionCall, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            attention_mask: Any, **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:  # fmt: skip
            refuse_unknown(module, kwargs)
            refuse_dropout(kwargs)
            if not softmax_of(kwargs).ordinary:
                raise UnsupportedModelError(
                    f"{type(module).__name__} is not supported in packed forwards: its softmax is not the ordinary one"
                )
            given = self.packed_layers[layer_idx].given
            if given is None or key is not given[0] or value is not given[1]:
                raise UnsupportedModelError(
                    f"{type(module).__name__} is not supported: it attends over other keys and values than it caches"
                )
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            if self._single == query.shape[2] and not state:
                return self._decode(layer, query, key, value, scaling), None
            self._write(layer, key, value, state)
            return self._attend(layer, query, key, value, scaling), None

        return call

    def end_step(self, completed: bool) -> None:
        """Counts the new tokens as written, unless the forward has raised."""
        if completed:
            for one in self.tokens:
                one.sequence.tokens += len(one.ids)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        slots = self._slots[layer].flatten()
        for name, new in (("key", key), ("value", value)):
            buffer = self.buffers[name]
            buffer.index_copy_(0, slots, new.detach().reshape(-1, new.shape[-1]).to(buffer.dtype))
        for name, new in state.items():
            self.buffers[name].index_copy_(0, self._slots[layer][:, self.gated].flatten(), new.flatten())

    def _single_reads(self, query: torch.Tensor) -> PageReads:
        """How the context of the single tokens is read; query `(rows, heads, group, head_dim)`."""
        if self._decodes is None:
            self._decodes = read_pages(self.buffers, self._decoding, 1, self._config, query)
        return self._decodes

    def _decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Writes and attends where every sequence has one new token; as `_attend`."""
        num_heads, count, dim = query.shape[1:]
        reads = self._single_reads(rows := query[0].transpose(0, 1).reshape(count, self._heads, -1, dim))
        if not isinstance(reads, ListReads):
            self._write(layer, key, value, {})
            return self._attend(layer, query, key, value, scaling)
        dtype = self.buffers["key"].dtype
        new_key, new_value = key[0].transpose(0, 1).to(dtype), value[0].transpose(0, 1).to(dtype)
        return reads.write_and_attend(layer, rows, new_key, new_value, scaling).view(1, count, num_heads, -1)

    def _attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention of all new tokens: `(1, num_heads, tokens, dim)` in, `(1, tokens, num_heads, value_dim)` out."""
        num_heads, count, dim = query.shape[1:]
        group = num_heads // self._heads
        out = query.new_empty(count, num_heads, value.shape[-1])
        if self._single:
            rows = query[0, :, : self._single].transpose(0, 1).reshape(self._single, self._heads, group, dim)
            outputs, log_sums = self._single_reads(rows).attend(layer, rows, scaling)
            out[: self._single] = merged(outputs, log_sums).reshape(self._single, num_heads, -1)
        for start, end, reads in self._prefills:
            own = query[0, :, start:end].reshape(self._heads, group, end - start, dim)
            new_key, new_value = (each[0, :, None, start:end].expand(-1, group, -1, -1) for each in (key, value))
            result, log_sum = attend_part(own, new_key, new_value, scaling, causal=True)
            if reads.num_parts:
                outputs, log_sums = reads.attend(layer, own.reshape(1, self._heads, -1, dim), scaling, more=1)
                outputs[-1, 0], log_sums[-1, 0] = result.flatten(1, 2), log_sum.flatten(1, 2)
                result = merged(outputs, log_sums)[0].reshape(result.shape)
            out[start:end] = result.flatten(0, 1).transpose(0, 1)
        return out.unsqueeze(0)


def forward(model: PreTrainedModel, cache: PackedCache, rows: Sequence[int]) -> torch.Tensor:
    """Runs a model over the new tokens of a packed cache, inside its `evict` block.

    Args:
        rows: indices of the sequences, in the order in which they were given to the cache, whose next token is wanted.

    Returns:
        Logits `(rows, vocab_size)` after each one's last new token.
    """
    ids, positions = cache.inputs()
    keep = torch.tensor([cache.last[row] for row in rows], dtype=torch.long, device=ids.device)
    return model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=keep
    ).logits[0]
