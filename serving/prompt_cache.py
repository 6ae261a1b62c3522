"""Converts between the caches of an eviction session and the payloads that the tiered cache stores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..eviction import Budget, Policy, RaggedCache, Session, get_policy
from ..eviction.serialization import cache_of_slices, check_sliceable, export_cache, import_cache, slice_of
from .kvcache.base import KVPayload, TensorPayload

HEADER = "header.json"  # name of a compressed prompt's header, stored as bytes and checksummed with the tensors


@dataclass(frozen=True)
class Compression:
    """How an agent's fixed prompt is compressed: once, right after it was computed, before any other token.

    Attributes:
        policy, budget, scope, sinks, recent: as in `evict`; the budget counts tokens of the fixed prompt.

    Raises:
        ValueError: an unknown policy, or no budget.
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
    """Exports caches to payloads and imports payloads into caches; each side owns the tensors it gets.

    A plain prompt becomes a payload that can be split at any token. A compressed one is indivisible: its last tokens
    decided which entries of its first ones were kept.

    Args:
        session: inside its `evict` block; its caches have one row here.
    Raises:
        ValueError: the model or the policy keeps KV that cannot be separated by tokens, see `check_sliceable`.
    """

    def __init__(self, session: Session) -> None:
        check_sliceable(session.recording)
        self.session = session

    def bytes_per_token(self) -> int:
        """Bytes of KV per token of a plain prompt."""
        state = torch.float32.itemsize * len(self.session.entry_states)
        widths = self.session.model.dtype.itemsize
        return sum(
            layer.attention.num_kv_heads * (2 * layer.attention.head_dim * widths + state)
            for layer in self.session.new_cache().ragged
        )

    def export_plain(self, cache: RaggedCache, start: int, stop: int, row: int | None = None) -> TensorPayload:
        """The KV of the tokens [start, stop) of a row, see `slice_of`.

        Raises:
            ValueError: the cache has evicted entries.
        """
        return TensorPayload(slice_of(cache, start, stop, row), stop - start, token_dim=-2)

    def export_compressed(self, cache: RaggedCache) -> TensorPayload:
        """All entries that `cache` has kept of the tokens it has seen."""
        header, tensors = export_cache(cache)
        owned = {name: value if ".entries." in name else value.clone() for name, value in tensors.items()}
        text = json.dumps(header, separators=(",", ":")).encode()
        owned[HEADER] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.session.model.device)
        return TensorPayload(owned, cache.columns_seen, token_dim=None)

    def forward(self, cache: RaggedCache, ids: Sequence[int] | Any) -> torch.Tensor:
        """Extends `cache` by a row of tokens; returns the logits `(vocab,)` of the last one."""
        tokens = torch.as_tensor(ids, dtype=torch.long).view(1, -1)
        return self.session.extend(cache, tokens, logits_to_keep=1)[0, -1]

    @staticmethod
    def compress(cache: RaggedCache, how: Compression) -> None:
        """Compresses the entries of `cache`; tokens that follow are kept whole."""
        cache.compress(how.policy, how.budget, how.scope, sinks=how.sinks, recent=how.recent)
        cache.compress("full", 1.0)

    def compute(self, prompt: Sequence[int], how: Compression | None = None) -> TensorPayload:
        """Computes the KV of a prompt, compressed by `how`; None: plain."""
        cache = self.session.new_cache()
        self.forward(cache, prompt)
        if how is None:
            return self.export_plain(cache, 0, len(prompt))
        self.compress(cache, how)
        return self.export_compressed(cache)

    def import_payloads(self, payloads: Sequence[KVPayload]) -> RaggedCache:
        """A cache with the entries of the payloads; without payloads an empty one.

        Raises:
            ValueError: payloads of another kind of session, or further payloads after a compressed prompt.
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
