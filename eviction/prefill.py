"""Chunked prefill: a long input is read in several forwards with an eviction after each, to bound the stored entries.

Implemented by hooks on the decoder, so that it applies wherever the model is called, in `model.generate` too: before a
long forward the pre-hook runs all chunks but the last as separate forwards, then the forward itself reads the last one,
and the forward hook joins the hidden states. Only as many are kept as the caller requested logits for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..retention.attention_arguments import is_causal, padding_mask, refuse_tokens
from ..retention.decoder_layers import text_config, text_decoder
from ..retention.seams import named_arguments
from .cache import RaggedCache
from .forward_state import new_tokens
from .session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of a decoder that have one column per new token, and the dimension of the columns.
SPLIT = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "token_type_ids": 1,
         "mm_token_type_ids": 1, "per_layer_inputs": 1, "visual_pos_masks": 1}  # fmt: skip
# Tensors that are shared by all chunks, or sliced differently.
WHOLE = ("attention_mask", "past_key_values", "deepstack_visual_embeds")


@contextmanager
def chunked_prefill(model: PreTrainedModel, session: Session) -> Iterator[None]:
    """Within the block, inputs longer than `plan.prefill_chunk` run in chunks; entered after `intercept`."""
    decoder = text_decoder(model)
    chunks = _ChunkedForwards(session, list(inspect.signature(decoder.forward).parameters))
    with ExitStack() as stack:
        # Ahead of the hook that opens a forward; after the one that closes it.
        stack.callback(decoder.register_forward_pre_hook(chunks.before, with_kwargs=True, prepend=True).remove)
        stack.callback(decoder.register_forward_hook(chunks.after, always_call=True).remove)
        yield


class _ChunkedForwards:
    """The hooks of one decoder."""

    def __init__(self, session: Session, names: list[str]) -> None:
        self.session = session
        self.names = names
        self._inside = False  # one of our own forwards is running
        self._cache: RaggedCache | None = None  # of the input that is running in chunks
        self._hidden: list[torch.Tensor] = []

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Runs all chunks but the last; returns the arguments of that one."""
        if self._inside:
            return None
        if self._cache is not None:  # Ctrl-C ended the last chunk: torch runs no hooks for a KeyboardInterrupt
            self.session.end(completed=False)
            self._finish(completed=False)
        bound = named_arguments(self.names, args, kwargs)
        refuse_tokens(bound)
        given = bound.get("past_key_values")
        plan = given.plan if isinstance(given, RaggedCache) else self.session.plan
        source = bound.get("inputs_embeds")
        source = bound.get("input_ids") if source is None else source
        size = plan.prefill_chunk
        if size is None or source is None or source.shape[1] <= size or not self.session.uses_cache(bound):
            return None
        self._check_arguments(bound)
        cache = self.session.cache_for(given)
        seen, (batch, total) = cache.columns_seen, source.shape[:2]
        bound["attention_mask"] = mask = padding_mask(bound.get("attention_mask"), self.session.call_mask)
        valid = new_tokens(mask, batch, total, seen)
        drafts = self.session.drafts if cache.made_by_generate or cache.drafting else 0
        last = (total - 1) // size * size
        if drafts:
            last = min(last, _start_before_drafts(total, size, drafts))
        known = total - drafts
        cache.begin_input([known] * batch if valid is None else valid[:, :known].sum(1).tolist())
        self._cache = cache
        bound |= {"past_key_values": cache, "use_cache": True}
        try:
            self._inside = True
            for start in range(0, last, size):
                output = module(**_part(bound, seen, start, min(start + size, last)))
                self._keep(output[0])
        except BaseException:
            self.session.end(completed=False)  # not closed yet if Ctrl-C ended it
            self._finish(completed=False)
            raise
        finally:
            self._inside = False
        return (), _part(bound, seen, last, total)

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Adds the hidden states of the earlier chunks to the output of the last one."""
        if self._inside or self._cache is None:
            return None
        if output is None:  # it raised
            self._finish(completed=False)
            return None
        self._keep(output[0])
        hidden = torch.cat(self._hidden, dim=1)
        self._finish(completed=True)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    def _check_arguments(self, bound: dict[str, Any]) -> None:
        """Raises ValueError for arguments, and settings, that cannot be split into chunks."""
        config = text_config(self.session.model)
        given = {name: bound.get(name) for name in ("output_hidden_states", "output_attentions")}
        requested = [name for name, value in given.items() if (getattr(config, name, None) if value is None else value)]
        known = (*SPLIT, *WHOLE)
        requested += [name for name, value in bound.items() if name not in known and _holds_tensor(value)]
        if requested:
            raise ValueError(
                f"a prompt longer than prefill_chunk runs in chunks, which {', '.join(requested)} cannot follow; "
                "leave it out, or leave prefill_chunk unset"
            )
        masks = bound.get("attention_mask")
        columns = bound["input_ids" if bound.get("input_ids") is not None else "inputs_embeds"].shape[1]
        if isinstance(masks, dict) and not all(is_causal(mask, columns) for mask in masks.values()):
            raise ValueError(
                "a prompt longer than prefill_chunk runs in chunks, which an image that attends in both directions "
                "cannot follow; leave prefill_chunk unset"
            )

    def _keep(self, hidden: torch.Tensor) -> None:
        """Appends the hidden states `(batch, chunk, hidden_size)`; discards those whose logits are not requested."""
        self._hidden.append(hidden)
        count = self.session.logits_to_keep
        if not isinstance(count, int) or count == 0:
            return
        while sum(one.shape[1] for one in self._hidden[1:]) >= count:
            del self._hidden[0]

    def _finish(self, completed: bool) -> None:
        cache, self._cache, self._hidden = self._cache, None, []
        if cache is not None:
            cache.end_input(completed)


def _start_before_drafts(total: int, size: int, drafts: int) -> int:
    """The first column of the last chunk of `total` columns, so that no draft is evicted before it can be removed."""
    if drafts >= size:
        raise ValueError(
            f"got {drafts} drafted tokens at once; accepted: at most {size - 1}, one less than prefill_chunk; raise "
            "prefill_chunk, or draft fewer"
        )
    return total - drafts - 1


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def _part(bound: dict[str, Any], seen: int, start: int, stop: int) -> dict[str, Any]:
    """The decoder's arguments for the new columns `start` to `stop`, after `seen` columns in the cache."""
    part = dict(bound)
    for name, dim in SPLIT.items():
        if part.get(name) is not None:
            part[name] = part[name].narrow(dim, start, stop - start)
    if part.get("attention_mask") is not None:
        part["attention_mask"] = part["attention_mask"][:, : seen + stop]
    images = bound.get("visual_pos_masks")
    if images is not None and bound.get("deepstack_visual_embeds") is not None:
        # One embedding for each image token, row after row: those of this part's tokens.
        inside = torch.zeros_like(images)
        inside[:, start:stop] = True
        part["deepstack_visual_embeds"] = [embeds[inside[images]] for embeds in bound["deepstack_visual_embeds"]]
    return part
