"""Between the caches of an eviction session and the payloads of the tiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..eviction import Budget, Policy, get_policy
from ..eviction.serialization import cache_of_slices, check_sliceable, export_cache, import_cache, slice_of
from .kvcache.base import KVPayload, TensorPayload

if TYPE_CHECKING:
    from ..eviction import RaggedCache, Session


HEADER = "header.json"  # of a compressed prompt, as bytes: it travels and is checksummed with the tensors


@dataclass(frozen=True)
class Compression:
    """How an agent's fixed prompt is compressed: once, when it has been computed, before anything follows it.

    Attributes:
        policy, budget, scope, sinks, recent: as in `evict`; the budget is counted from the fixed prompt's tokens.
    """

    policy: str | Policy = "retention"
    budget: float | int | str = 0.25
    scope: str | None = None
    sinks: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        get_policy(self.policy)
        Budget(self.budget)


class PromptKV:
    """Makes payloads of caches, and caches of payloads; each side owns what it gets.

    A plain prompt becomes a payload that can be cut at any token. A compressed one stays whole: which entries it has
    at its beginning was decided at its end.

    Args:
        session: inside its `evict` block; its caches hold one row here.
    Raises:
        ValueError: a model or a policy whose KV is not a matter of single tokens, see `check_sliceable`.
    """

    def __init__(self, session: Session) -> None:
        check_sliceable(session.recording)
        self.session = session

    def bytes_per_token(self) -> int:
        """Of a plain prompt's KV."""
        state = torch.float32.itemsize * len(self.session.entry_states)
        widths = self.session.model.dtype.itemsize
        return sum(
            layer.attention.num_kv_heads * (2 * layer.attention.head_dim * widths + state)
            for layer in self.session.new_cache().ragged
        )

    def plain(self, cache: RaggedCache, start: int, stop: int, row: int | None = None) -> TensorPayload:
        """The KV of the tokens [start, stop) of a row, see `slice_of`; ValueError if it has evicted something."""
        return TensorPayload(slice_of(cache, start, stop, row), stop - start, token_dim=-2)

    def compressed(self, cache: RaggedCache) -> TensorPayload:
        """Everything that `cache` holds of the tokens it has seen."""
        header, tensors = export_cache(cache)
        owned = {name: value if ".entries." in name else value.clone() for name, value in tensors.items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        owned[HEADER] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.session.model.device)
        return TensorPayload(owned, cache.columns_seen, token_dim=None)

    def forward(self, cache: RaggedCache, ids: Sequence[int] | Any) -> torch.Tensor:
        """Extends `cache` by one row of tokens; logits `(vocab,)` of the last one."""
        tokens = torch.as_tensor(ids, dtype=torch.long).view(1, -1)
        return self.session.extend(cache, tokens, logits_to_keep=1)[0, -1]

    @staticmethod
    def compress(cache: RaggedCache, how: Compression) -> None:
        """Compresses what `cache` holds; what follows stays."""
        cache.compress(how.policy, how.budget, how.scope, sinks=how.sinks, recent=how.recent)
        cache.compress("full", 1.0)

    def computed(self, prompt: Sequence[int], how: Compression | None = None) -> TensorPayload:
        """The KV of a prompt that is computed now, compressed if `how` says so."""
        cache = self.session.new_cache()
        self.forward(cache, prompt)
        if how is None:
            return self.plain(cache, 0, len(prompt))
        self.compress(cache, how)
        return self.compressed(cache)

    def cache(self, payloads: Sequence[KVPayload]) -> RaggedCache:
        """A cache that goes on where the payloads end; an empty one if there are none.

        Raises:
            ValueError: payloads of another session, or parts behind a compressed prompt.
        """
        contents = [self._read(payload) for payload in payloads]
        if not contents:
            return self.session.new_cache()
        if all(payload.divisible for payload in payloads):
            return cache_of_slices(self.session.recording, contents)
        if len(contents) > 1 or HEADER not in contents[0]:
            raise ValueError(f"got {len(contents)} payloads; accepted: parts of one prompt, or one compressed prompt")
        (content,) = contents
        header = json.loads(bytes(content[HEADER].cpu().numpy().tobytes()))
        owned = {name: tensor.clone() for name, tensor in content.items() if name != HEADER}
        return import_cache(self.session.recording, header, owned)

    @staticmethod
    def _read(payload: KVPayload) -> dict[str, torch.Tensor]:
        return {name: tensor for layer in range(len(payload.layers)) for name, tensor in payload.read(layer).items()}
