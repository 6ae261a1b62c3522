"""Why the rest of a prompt is not found in the cache, from the tree and the record of what has left it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from .eviction_history import ComputedSpan, MissReason, Record
from .radix_tree import TOKEN_BYTES, Node, PrefixTree, encode
from .tiered_cache import TieredCache

MAX_INSPECTED = 64  # nodes below one without data, one of which may hold its KV
# Of these, when and for whom is reported only if the same client has caused them.
CAUSED_BY_CLIENTS = (MissReason.EVICTED, MissReason.RELEASED, MissReason.NOT_STORED, MissReason.NO_ROOM)


class _Known(NamedTuple):
    """A reason for tokens [start, end) of the prompt."""

    start: int
    end: int
    reason: MissReason
    record: Record | None = None


def explain_misses(
    tiers: TieredCache, token_ids: Sequence[int] | Any, namespace: Hashable = None, found: int = 0, client: str = "",
    others: Iterable[tuple[Hashable, MissReason]] = (),
) -> list[ComputedSpan]:  # fmt: skip
    """The reasons, span by span, for the whole pages of a prompt behind the `found` tokens that the cache has.

    Of several reasons for the same tokens, the tree's comes before the record's, the latest record before others, and
    these before another namespace. Costs a checksum a page, and a look-up a namespace; changes nothing.

    Args:
        client: for whom it is explained: when and for whom KV was evicted is reported if that was for the same client.
        others: further namespaces of the same client, and the reason to give for what is cached there.

    Raises:
        ValueError: see `encode`.
    """
    key = encode(token_ids, tiers.page_size)
    with tiers.lock:
        return _explained(tiers, key, namespace, found, client, others)


def _explained(
    tiers: TieredCache, key: bytes, namespace: Hashable, found: int, client: str,
    others: Iterable[tuple[Hashable, MissReason]],
) -> list[ComputedSpan]:  # fmt: skip
    end, tree, history = len(key) // TOKEN_BYTES, tiers.tree, tiers.history
    if found >= end:
        return []
    now = tiers.clock()
    known = [*_in_tree(tree, key, namespace, found)]
    known += (_Known(start, stop, record.reason, record) for start, stop, record in history.find(namespace, key))
    known += (_Known(0, tree.find(key, other).length, reason) for other, reason in others)
    rest = _Known(found, end, MissReason.FORGOTTEN if history.num_dropped else MissReason.NEVER_SEEN)
    spans: list[ComputedSpan] = []
    at = found
    while at < end:
        one = next((each for each in known if each.start <= at < each.end), rest)
        before = known[: known.index(one)] if one is not rest else known
        stop = min([one.end, *(each.start for each in before if each.start > at)])
        spans.append(_span(at, stop, one, client, now))
        at = stop
    return _merged(spans)


def _span(start: int, end: int, known: _Known, client: str, now: float) -> ComputedSpan:
    record = known.record
    if record is None:
        return ComputedSpan(start, end, known.reason)
    own = record.actor is not None and record.actor[0] == client
    if known.reason in CAUSED_BY_CLIENTS and not own:
        return ComputedSpan(start, end, known.reason)
    agent = record.actor[1] if record.actor is not None and known.reason is MissReason.EVICTED else None
    return ComputedSpan(start, end, known.reason, max(0.0, now - record.time_s), agent)


def _merged(spans: list[ComputedSpan]) -> list[ComputedSpan]:
    """Spans that follow each other with the same reason and time as one."""
    merged: list[ComputedSpan] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last is not None and (last.reason, last.seconds_ago, last.evicted_for) == (
            span.reason, span.seconds_ago, span.evicted_for
        ):  # fmt: skip
            merged[-1] = ComputedSpan(last.start, span.end, span.reason, span.seconds_ago, span.evicted_for)
        else:
            merged.append(span)
    return merged


def _in_tree(tree: PrefixTree, key: bytes, namespace: Hashable, found: int) -> Iterator[_Known]:
    """Parts of the prompt that are in the tree, and cannot be used."""
    root = tree.roots.get(namespace)
    if root is None:
        return
    path, part = tree.walk(key, root)
    steps = [(node, node.end) for node in path]
    if part:
        begin = path[-1].end if path else 0
        steps.append((tree.next_child(path[-1] if path else root, key), begin + part * tree.page_size))
    for node, end in steps:
        if end <= found:
            continue
        if node.has_data and (end == node.end or node.can_split):
            yield _Known(max(found, node.end - node.covers), end, MissReason.BEHIND_GAP)
        elif (holder := _holder(tree, node)) is not None:
            whole = all(copy.divisible for copy in holder.copies if copy is not None)
            reason = MissReason.BEING_COPIED if holder.in_transfer and whole else MissReason.NOT_DIVISIBLE
            yield _Known(max(found, node.start), end, reason)


def _holder(tree: PrefixTree, node: Node) -> Node | None:
    """The node whose copies hold the KV of `node`: it, or one below that could not be split."""
    for each in (node, *islice(tree.below(node), MAX_INSPECTED)):
        if each.has_data and each.end - each.covers <= node.start:
            return each
    return None
