"""Explains what of a prompt was reused, and why the rest was computed, in an extra field of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cache_report import CacheReport
from ..kvcache.eviction_history import ComputedSpan, MissReason
from ..request import RequestOutput

HEADER, FIELD = "x-tenure-explain", "cache"
SECOND_DIGITS = 6  # of the seconds in a document
TEXTS = {
    MissReason.NEVER_SEEN: "not seen before by this server",
    MissReason.FORGOTTEN: "not seen before, or evicted so long ago that this is not remembered",
    MissReason.EVICTED: "evicted, as other prompts needed the memory",
    MissReason.RELEASED: "evicted before all else, as its session had ended or a hint had given it up",
    MissReason.FLUSHED: "discarded with everything else when the cache was flushed",
    MissReason.LOST: "its file on disk was missing or damaged",
    MissReason.NOT_STORED: "the call that computed it asked not to store it",
    MissReason.NO_ROOM: "there was no room to store it",
    MissReason.BEHIND_GAP: "cached, but something before it is not",
    MissReason.NOT_DIVISIBLE: "cached within a longer prompt that was compressed as a whole",
    MissReason.BEING_COPIED: "cached within a longer span that was moving between tiers",
    MissReason.OTHER_COMPRESSION: "cached, but compressed otherwise or up to another token",
    MissReason.OTHER_NAMESPACE: "cached for this client in another namespace",
    MissReason.FASTER: "cached, but computing it was faster than loading it",
    MissReason.NO_MEMORY: "cached, but this request needed that memory itself",
    MissReason.LOAD_FAILED: "cached, but loading it failed or took too long",
    MissReason.PART_OF_PAGE: "only whole pages are cached, and the last token is always computed",
}


def is_asked_for(field: bool | None, headers: Mapping[str, str]) -> bool:
    """Whether a call asks for the explanation, by its body's field, which precedes the header.

    Raises:
        ValueError: the header has another value than 0 or 1.
    """
    value = headers.get(HEADER, "0")
    if value not in ("0", "1"):
        raise ValueError(f"got {value[:20]!r} in the header X-Tenure-Explain; accepted: 1 or 0")
    return value == "1" if field is None else field


def explanation(output: RequestOutput | None) -> dict[str, Any]:
    """The field with an answer's explanation; nothing if it was not asked for."""
    return {} if output is None or output.cache is None else {FIELD: cache_document(output.cache)}


def cache_document(report: CacheReport) -> dict[str, Any]:
    """A report as JSON's values."""
    return {
        "prompt_tokens": report.prompt_tokens,
        "reused_tokens": report.reused_tokens,
        "reused": {tier.name.lower(): tokens for tier, tokens in report.reused.items()},
        "queued_s": round(report.queued_s, SECOND_DIGITS),
        "loading_s": round(report.loading_s, SECOND_DIGITS),
        "shared_s": round(report.shared_s, SECOND_DIGITS),
        "computed": [_span_document(span) for span in report.computed],
    }


def _span_document(span: ComputedSpan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "start": span.start, "end": span.end, "reason": span.reason.value, "explanation": TEXTS[span.reason],
    }  # fmt: skip
    if span.seconds_ago is not None:
        found["seconds_ago"] = round(span.seconds_ago, SECOND_DIGITS)
    if span.evicted_for is not None:
        found["evicted_for"] = span.evicted_for
    return found
