"""Log-likelihoods under eviction, and a meter of the caches of lm-eval's requests.

Contexts are read and compressed, then continuations are read as if they were generated.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...eviction import RaggedCache, Session
from ...eviction.selection import layout_of


@dataclass(frozen=True)
class Scored:
    """One request.

    Attributes:
        context: token ids that are read and compressed, at least one.
        question: token ids read after the compression and not scored; may be empty.
        continuation: token ids to be scored, at least one.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens read after the context: all but the last one, which is only predicted."""
        return (self.question + self.continuation)[:-1]


class Scorer:
    """Scores batches of requests on one model inside an `evict` block.

    Args:
        session: of the block.
        meter: counts every compressed context.
        pad: token id that fills short rows; it is masked.
        softmax_dtype: of the log-probabilities; None for the logits' own.
    """

    def __init__(self, session: Session, meter: CacheMeter, pad: int, softmax_dtype: torch.dtype | None = None) -> None:
        self.session, self.meter, self.pad, self.softmax_dtype = session, meter, pad, softmax_dtype
        self.model = session.model

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Scored]]) -> list[list[tuple[float, bool]]]:
        """`(log-likelihood, is greedy)` of every continuation.

        Args:
            groups: a row of the batch each: requests with the same context, which is read once.
        """
        contexts = [group[0].context for group in groups]
        cache, first = self._compress(contexts)
        answers: list[list[tuple[float, bool]]] = [[] for _ in groups]
        for member in range(max(map(len, groups))):
            rows = [row for row, group in enumerate(groups) if len(group) > member]
            fork = cache.fork()
            fork.select_rows(torch.tensor(rows, device=first.device))
            asked = [groups[row][member] for row in rows]
            for row, answer in zip(rows, self._continue(fork, first[rows], asked), strict=True):
                answers[row].append(answer)
            self.meter.seen(fork)
        return answers

    def _compress(self, contexts: Sequence[Sequence[int]]) -> tuple[RaggedCache, torch.Tensor]:
        """(compressed cache, logits `(batch, vocab)` after the last token) of the contexts."""
        ids, mask = left_padded(contexts, self.pad, self.model.device)
        cache = self.session.new_cache()
        logits = self.session.extend(cache, ids, mask, logits_to_keep=1)[:, -1]
        self.meter.compressed(cache, [len(context) for context in contexts])
        return cache, logits

    def _continue(self, cache: RaggedCache, first: torch.Tensor, asked: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Reads what follows the contexts in pieces that end where an eviction is due, as generating would."""
        device = first.device
        totals = torch.zeros(len(asked), dtype=torch.float64, device=device)
        greedy = torch.ones(len(asked), dtype=torch.bool, device=device)
        longest = max(len(one.read) for one in asked)
        # The token that the logits at each column of the read tokens predict; -1 for none.
        targets = torch.full((len(asked), longest + 1), -1, device=device)
        ids = torch.full((len(asked), longest), self.pad, device=device)
        valid = torch.zeros_like(ids)
        for row, one in enumerate(asked):
            ids[row, : len(one.read)] = torch.tensor(one.read, device=device)
            valid[row, : len(one.read)] = 1
            start = len(one.question)
            targets[row, start : start + len(one.continuation)] = torch.tensor(one.continuation, device=device)
        self._count(first.unsqueeze(1), targets[:, :1], totals, greedy)
        start = 0
        while start < longest:
            part = slice(start, start + tokens_until_due(cache, longest - start))
            start = part.stop
            logits = self.session.extend(cache, ids[:, part], valid[:, part])
            self._count(logits, targets[:, part.start + 1 : part.stop + 1], totals, greedy)
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def _count(self, logits: torch.Tensor, targets: torch.Tensor, totals: torch.Tensor, greedy: torch.Tensor) -> None:
        """Adds log-probabilities of `targets` `(batch, n)` under `logits` `(batch, n, vocab)` to `totals`."""
        wanted = targets >= 0
        if not bool(wanted.any()):
            return
        chosen = targets.clamp(min=0).unsqueeze(-1)
        log_probs = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype).gather(-1, chosen).squeeze(-1)
        totals += torch.where(wanted, log_probs, 0.0).sum(1).double()
        greedy &= ((logits.argmax(-1) == targets) | ~wanted).all(1)


def tokens_until_due(cache: RaggedCache, most: int) -> int:
    """Tokens that every row can take, at most `most`, up to the one that makes a row evict."""
    layout = layout_of(cache.ragged)

    def due(stored: int, tokens: int, count: int) -> bool:
        return cache.plan.due(stored + count * layout.segments, tokens + count, count, layout)

    left = most
    for stored, tokens in zip(cache.lengths().sum((1, 2)).tolist(), cache.tokens_seen.tolist(), strict=True):
        # A budget that is a share grows with the tokens, but never as fast as they come: due stays due.
        left = min(left, 1 + bisect_left(range(1, left), True, key=lambda count: due(stored, tokens, count)))
    return left


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both int64 `(batch, longest)`; the mask is 0 where a row is padded on its left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@dataclass
class CacheMeter:
    """Sums over the contexts that were compressed.

    Attributes:
        contexts: rows counted.
        entries: entries they held after the compression, in all layers and heads.
        full_entries: entries that a cache without eviction would have held.
        bytes: bytes allocated for the entries.
        peak_bytes: the most bytes that one call's cache, a batch, held at any time.
        tokens: tokens of the contexts.
    """

    contexts: int = 0
    entries: int = 0
    full_entries: int = 0
    bytes: int = 0
    peak_bytes: int = 0
    tokens: int = 0

    def compressed(self, cache: RaggedCache, lengths: list[int]) -> None:
        """Counts a cache right after its contexts were read and compressed.

        Args:
            lengths: the contexts' real tokens, one number a row.
        """
        report = cache.report()
        self.contexts += len(lengths)
        self.tokens += sum(lengths)
        self.entries += report.entries
        self.full_entries += report.full_entries
        self.bytes += report.bytes
        self.seen(cache)

    def full(self, cache: RaggedCache, lengths: list[int]) -> None:
        """Counts contexts that were read together with their continuations, so that nothing could be counted between.

        Args:
            cache: of the last of them, which evicts nothing: it gives the bytes of an entry.
            lengths: the contexts' real tokens.
        """
        report = cache.report()
        heads = report.lengths.shape[1] * report.lengths.shape[2]
        entries = sum(lengths) * heads
        self.contexts += len(lengths)
        self.tokens += sum(lengths)
        self.entries += entries
        self.full_entries += entries
        self.bytes += round(entries * report.bytes / max(1, report.entries))
        self.seen(cache)

    def seen(self, cache: RaggedCache) -> None:
        """Notes the peak of a cache that has been used."""
        self.peak_bytes = max(self.peak_bytes, cache.report().peak_bytes)

    def summary(self) -> dict[str, Any]:
        """Means over the contexts by name: `contexts, context_tokens, entries, bytes, kept_share`; and `peak_bytes`."""
        count = max(1, self.contexts)
        return {
            "contexts": self.contexts,
            "context_tokens": self.tokens / count,
            "entries": self.entries / count,
            "bytes": self.bytes / count,
            "kept_share": self.entries / self.full_entries if self.full_entries else 1.0,
            "peak_bytes": self.peak_bytes,
        }
