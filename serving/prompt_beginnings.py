"""The beginnings of fixed prompts that were given up before they could be compressed: a retry continues from there.

A compressed prompt is stored when it is complete. What a request has computed of it before it is cancelled, or times
out, is plain KV, whole pages of which are stored in a namespace of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from itertools import takewhile
from typing import Any

from .kvcache.base import Tier
from .kvcache.page_pool import PagePool
from .kvcache.paged_sequence import PagedSequence
from .kvcache.tiered_cache import TieredCache

logger = logging.getLogger(__name__)


class PromptBeginnings:
    """Plain KV of fixed prompts to be compressed, states included; the same however they will be compressed.

    Args:
        tiers: the cache that holds it, as any other prompt.
    """

    def __init__(self, tiers: TieredCache) -> None:
        self.tiers = tiers

    def begin(self, pool: PagePool, prompt: Any, namespace: Hashable) -> PagedSequence:
        """A sequence with the pages that the device holds of the beginning of `prompt`, int32 `(tokens,)`."""
        with self.tiers.open(prompt, self._namespace(namespace), retry=True) as handle:
            on_device = takewhile(lambda node: node.copies[Tier.DEVICE] is not None, handle.nodes() or ())
            return PagedSequence(pool, [payload for node in on_device if (payload := node.copies[Tier.DEVICE])])

    def keep(self, prompt: Any, namespace: Hashable, sequence: PagedSequence) -> None:
        """Stores the whole pages that `sequence` has computed of `prompt`, whose bytes nobody has reserved any more.

        A failure is logged: a cache may forget.
        """
        end = self.tiers.whole_pages(min(sequence.end, len(prompt)))
        try:
            with self.tiers.open(prompt[:end], self._namespace(namespace), retry=True) as handle:
                if handle.length < end:
                    self.tiers.store(handle, prompt[:end], sequence.span(handle.length, end))
        except Exception as error:
            logger.warning("the beginning of a fixed prompt is not stored: %r", error.with_traceback(None))

    @staticmethod
    def _namespace(namespace: Hashable) -> Hashable:
        return "to be compressed", namespace
