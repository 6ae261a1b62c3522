"""Perplexity and KL under eviction: a document is read in chunks by the full cache and by compressed ones in parallel.

After every chunk each compressed cache is evicted down to its budget, a share being counted from the tokens read so
far; the next chunk is then predicted from the kept entries and from the chunk itself. So no cache ever holds more than
its budget and a chunk, only one chunk's logits exist at a time, and a document may be as long as the full cache allows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..eviction import RaggedCache, evict
from ..retention import RetentionGates
from .cells import Cell
from .intervals import Interval, bootstrap_mean
from .predictions import kl_to_full, top1_agreement
from .prompts import encode
from .tasks.documents import SourceTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASK = "stream"  # the name of these rows among those of tasks


@dataclass(frozen=True)
class Streamed:
    """The predictions of one cell on one document of n tokens; arrays have a number for each of the n − 1 predictions.

    Attributes:
        document: its number.
        length: n.
        cell: how the cache was compressed.
        nll: float32, negative log-likelihood of the document's own token, nats.
        full_nll: float32, the same by the full cache.
        kl: float32, KL to the full cache, nats.
        top1: bool, both have the same most likely token.
        entries, bytes: held at the end, in all layers and heads.
        kept: float64 `(layers, heads)`, the share of the tokens that each head kept.
    """

    document: int
    length: int
    cell: Cell
    nll: np.ndarray = field(repr=False)
    full_nll: np.ndarray = field(repr=False)
    kl: np.ndarray = field(repr=False)
    top1: np.ndarray = field(repr=False)
    entries: int
    bytes: int
    kept: np.ndarray = field(repr=False)


def draw_documents(
    tokenizer: Any, texts: Sequence[str], count: int, length: int, seed: int = 0
) -> list[tuple[int, ...]]:
    """`count` runs of consecutive sentences from random places, cut to exactly `length` tokens, without special tokens.

    Raises:
        ValueError: there is no text, or a length below 2.
    """
    if length < 2:
        raise ValueError(f"a document must have at least 2 tokens to predict one, got {length}")
    source = SourceTexts(texts)
    documents = []
    for number in range(count):
        run = source.run(random.Random(f"{seed}/stream/{number}"))
        sentences, ids = max(1, length // 20), []
        while len(ids) < length:
            ids = encode(tokenizer, " ".join(run(sentences)), plain=True)
            sentences *= 2
        documents.append(tuple(ids[:length]))
    return documents


@torch.no_grad()
def stream(
    model: PreTrainedModel, documents: Iterable[Sequence[int]], cells: Sequence[Cell],
    gates: RetentionGates | None = None, chunk: int = 128, sinks: int | None = None, recent: int | None = None,
    progress: Callable[[Streamed], None] | None = None,
) -> list[Streamed]:  # fmt: skip
    """Reads every document with every cell.

    Args:
        model: in eval mode, outside any `attach` or `evict` block.
        documents: token ids, at least 2 each.
        cells: the full cache, if it is among them, is the reference itself.
        gates: for the retention policy.
        chunk: tokens read between two evictions.
        sinks, recent: first and last tokens that always stay; None for each policy's own.

    Returns:
        One result for each document and cell, in that order.
    Raises:
        ValueError: a chunk below 1, a cell that reads its question first, gates of another model, or retention without.
    """
    if chunk < 1:
        raise ValueError(f"a chunk must have at least 1 token, got {chunk}")
    if any(cell.aware for cell in cells):
        raise ValueError("a streamed document has no question: leave out the question-aware cells")
    policies = tuple({cell.policy for cell in cells if cell.evicts})
    results = []
    with evict(model, "full", 1.0, gates=gates, sinks=sinks, recent=recent, observe=policies) as session:
        for number, ids in enumerate(documents):
            full = session.new_cache()
            runs = [_StreamedCell(cell, session.new_cache() if cell.evicts else full) for cell in cells]
            reference = _StreamedCell(Cell.of("full"), full)
            for start in range(0, len(ids), chunk):
                part, following = ids[start : start + chunk], ids[start + 1 : start + chunk + 1]
                logits = session.extend(full, part)[0, : len(following)]
                targets = torch.tensor(following, device=logits.device)
                reference.predicted(logits, logits, targets)
                for run in runs:
                    own = session.extend(run.cache, part)[0, : len(following)] if run.cell.evicts else logits
                    run.predicted(own, logits, targets)
            for run in runs:
                results.append(run.result(number, len(ids), reference))
                if progress is not None:
                    progress(results[-1])
    return results


class _StreamedCell:
    """One cell on one document, while it is read."""

    def __init__(self, cell: Cell, cache: RaggedCache) -> None:
        self.cell, self.cache = cell, cache
        if cell.evicts:
            cache.plan = cell.plan(cache.plan, 0)
        self._parts: dict[str, list[torch.Tensor]] = {"nll": [], "kl": [], "top1": []}

    def predicted(self, logits: torch.Tensor, full: torch.Tensor, targets: torch.Tensor) -> None:
        """Notes predictions: logits `(n, vocab)` of this cell and of the full cache, for `targets` `(n,)`."""
        chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1).double()
        self._parts["nll"].append(torch.logsumexp(logits.float(), -1).double() - chosen)
        self._parts["kl"].append(kl_to_full(full, logits))
        self._parts["top1"].append(top1_agreement(full, logits))

    def result(self, document: int, length: int, reference: _StreamedCell) -> Streamed:
        report = self.cache.report()
        seen = self.cache.tokens_seen.view(-1, 1, 1).double().cpu()
        return Streamed(
            document=document, length=length, cell=self.cell,
            nll=self._array("nll"), full_nll=reference._array("nll"), kl=self._array("kl"),
            top1=torch.cat(self._parts["top1"]).cpu().numpy(), entries=report.entries, bytes=report.bytes,
            kept=(report.lengths.double() / seen).mean(0).numpy(),
        )  # fmt: skip

    def _array(self, name: str) -> np.ndarray:
        return torch.cat(self._parts[name]).float().cpu().numpy()


def stream_rows(results: Sequence[Streamed], bins: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """One row for each length and cell, with 95% bootstrap intervals over the documents.

    A row has the columns of the tasks' rows, `task, length, policy, scope, budget, aware`; `n` (documents);
    `kl`, `top1`, `perplexity`, `perplexity_ratio` (to the full cache's on the same documents), each a dictionary of
    `value, low, high`; `entries, bytes, kept_share` (means); `by_position`: KL and agreement in equal parts of the
    document, a list of `start, stop, kl, top1`; and `heads`: the kept share of every `[layer][head]`.
    """
    groups: dict[tuple, list[Streamed]] = {}
    for result in results:
        groups.setdefault((result.length, result.cell.key), []).append(result)
    rows = []
    for (length, _), group in groups.items():
        cell = group[0].cell
        heads = np.mean([one.kept for one in group], axis=0)
        rows.append(
            {"task": TASK, "length": length, "policy": cell.name, "scope": cell.scope, "budget": cell.budget}
            | {"aware": False, "n": len(group)}
            | {
                "kl": mean_interval([one.kl.mean() for one in group], seed).to_dict(),
                "top1": mean_interval([one.top1.mean() for one in group], seed).to_dict(),
                "perplexity": mean_interval([one.nll.mean() for one in group], seed).to_dict(math.exp),
                "perplexity_ratio": mean_interval([(one.nll - one.full_nll).mean() for one in group], seed).to_dict(
                    math.exp
                ),
                "entries": float(np.mean([one.entries for one in group])),
                "bytes": float(np.mean([one.bytes for one in group])),
                "kept_share": float(heads.mean()),
                "by_position": _by_position(group, bins, seed),
                "heads": heads.round(4).tolist(),
            }
        )
    return rows


def mean_interval(values: Sequence[Any], seed: int) -> Interval:
    """`bootstrap_mean` of anything that is a number."""
    return bootstrap_mean([float(value) for value in values], seed)


def _by_position(group: Sequence[Streamed], bins: int, seed: int) -> list[dict[str, Any]]:
    edges = np.linspace(0, group[0].length - 1, bins + 1).astype(int)
    parts = [(int(start), int(stop)) for start, stop in pairwise(edges) if stop > start]
    return [
        {"start": start, "stop": stop}
        | {"kl": mean_interval([one.kl[start:stop].mean() for one in group], seed).to_dict()}
        | {"top1": mean_interval([one.top1[start:stop].mean() for one in group], seed).to_dict()}
        for start, stop in parts
    ]
