"""Reports where the KV of a request's prompt came from, what it waited for, and why the rest was computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .kvcache.base import TIERS, Tier
from .kvcache.eviction_history import ComputedSpan, MissReason


@dataclass(frozen=True)
class CacheReport:
    """The part of the cache in one request, as it was when the request was admitted.

    Attributes:
        prompt_tokens: length of the prompt.
        reused: tokens whose KV was used, by the tier in which it was found.
        computed: the other tokens of the prompt, span by span in order, with the reason of each.
        queued_s: seconds in the queue, for memory or a place in the batch.
        loading_s: seconds of waiting for loads.
        shared_s: seconds of waiting for pages that another request was computing, and that were then reused.
    """

    prompt_tokens: int
    reused: Mapping[Tier, int]
    computed: tuple[ComputedSpan, ...]
    queued_s: float
    loading_s: float
    shared_s: float

    @property
    def reused_tokens(self) -> int:
        """Tokens whose KV was used, in whatever tier it was."""
        return sum(self.reused.values())


@dataclass(frozen=True)
class AdmittedPrompt:
    """A prompt's KV as its request was admitted; `report` adds what followed.

    Attributes:
        reused, computed: as in `CacheReport`.
    """

    reused: Mapping[Tier, int]
    computed: tuple[ComputedSpan, ...]

    def report(
        self, prompt_tokens: int, cached_tokens: int, queued_s: float, loading_s: float, shared_s: float
    ) -> CacheReport:
        """The whole report.

        Args:
            cached_tokens: that were used in the end: the engine may have had more, on the device.
        """
        at_once = sum(self.reused.values())
        more = max(0, min(cached_tokens, prompt_tokens) - at_once)
        reused = {tier: self.reused.get(tier, 0) for tier in TIERS}
        reused[Tier.DEVICE] += more
        computed = tuple(_behind(each, at_once + more) for each in self.computed if each.end > at_once + more)
        return CacheReport(prompt_tokens, reused, computed, queued_s, loading_s, shared_s)


def _behind(span: ComputedSpan, begin: int) -> ComputedSpan:
    """The part of a span that is not before `begin`."""
    if span.start >= begin:
        return span
    return ComputedSpan(begin, span.end, span.reason, span.seconds_ago, span.evicted_for)


def part_of_page(begin: int, prompt_tokens: int) -> tuple[ComputedSpan, ...]:
    """The end of a prompt behind its last page that could be cached."""
    return (ComputedSpan(begin, prompt_tokens, MissReason.PART_OF_PAGE),) if begin < prompt_tokens else ()
