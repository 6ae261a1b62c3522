"""The attention that eviction keeps: retained mass (coverage), and dilution on planted evidence.

* **Coverage** (the defensive paper's figure): of the attention that the answer's queries pay to the context with the
  full cache, the share on the entries that a cell keeps; the mean, and the worst head and query.
* **Dilution** (the retention paper's claim): `δ = 1 − Σ_{i ∈ evidence} α_i` over the queries that predict the answer,
  with the full cache and with what a cell keeps; a lower δ under eviction means that distractors took attention away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..eviction import LayerView, Policy, RaggedCache, evict
from ..retention import RetentionGates
from .cases import Case
from .cells import Cell
from .intervals import paired_bootstrap
from .perplexity import mean_interval
from .pictures import kept_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Watch(Policy):
    """Evicts nothing: it only makes a session remember the last `window` queries."""

    window: int = 64

    name: ClassVar[str] = "watch"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "queries"})
    evicts: ClassVar[bool] = False

    @property
    def window_size(self) -> int:
        return self.window

    def score(self, view: LayerView) -> torch.Tensor:
        return torch.zeros(view.shape)


@dataclass(frozen=True)
class Examined:
    """The attention of one case's answer under one cell.

    Attributes:
        task, length, index: the case.
        cell: how its context was compressed.
        coverage: float64 `(layers, heads)`, the mean over the queries and the query heads of a group.
        worst: float64 `(layers, heads)`, the least of them.
        evidence, full_evidence: attention on the planted evidence, compressed and full, the mean over layers, heads and
            queries; NaN for a case without evidence.
        kept: float64 `(layers, heads)`, the share of the context that each head kept.
    """

    task: str
    length: int
    index: int
    cell: Cell
    coverage: np.ndarray = field(repr=False)
    worst: np.ndarray = field(repr=False)
    evidence: float
    full_evidence: float
    kept: np.ndarray = field(repr=False)


@torch.no_grad()
def examine(
    model: PreTrainedModel, cases: Iterable[Case], cells: Sequence[Cell], gates: RetentionGates | None = None,
    sinks: int | None = None, recent: int | None = None, most_queries: int = 64,
    progress: Callable[[Examined], None] | None = None,
) -> list[Examined]:  # fmt: skip
    """Every evicting cell on every case; a context is read once, as in `evaluate`, and layers are inspected in turn.

    Args:
        model: in eval mode, outside any `attach` or `evict` block.
        cells: question-agnostic ones; cells that evict nothing are left out.
        most_queries: queries of the answer that are inspected, its first ones.

    Raises:
        ValueError: question-aware cells, gates of another model, or retention without gates.
    """
    if any(cell.aware or cell.prefill_chunk for cell in cells):
        raise ValueError("coverage needs contexts read in one piece and before the question: leave out other cells")
    evicting = [cell for cell in cells if cell.evicts]
    observe = (Watch(most_queries), *{cell.policy for cell in evicting})
    results = []
    with evict(model, "full", 1.0, gates=gates, sinks=sinks, recent=recent, observe=observe) as session:
        for case in cases:
            context = session.new_cache()
            session.extend(context, case.context_ids, logits_to_keep=1)
            asked = (case.question_ids + case.answer_ids)[:-1]
            queries = min(len(case.answer_ids), len(asked), most_queries)
            full = context.fork()
            session.extend(full, asked, logits_to_keep=1)
            caches = [context.fork() for _ in evicting]
            for cell, cache in zip(evicting, caches, strict=True):
                cache.plan = cell.plan(cache.plan, len(asked))
                cache.compress()
            masks = [kept_mask(cache) for cache in caches]
            coverage, worst = _coverage(full, queries, case.length, masks)
            before = _on_evidence(full, queries, case)
            for number, (cell, cache) in enumerate(zip(evicting, caches, strict=True)):
                session.extend(cache, asked, logits_to_keep=1)
                results.append(
                    Examined(
                        case.task,
                        case.length,
                        case.index,
                        cell,
                        coverage[number],
                        worst[number],
                        _on_evidence(cache, queries, case),
                        before,
                        masks[number].mean(-1),
                    )
                )
                if progress is not None:
                    progress(results[-1])
    return results


def _views(cache: RaggedCache, queries: int) -> Iterable[LayerView]:
    """The layers of a cache with its last queries, one after the other."""
    for layer in cache.ragged:
        yield Watch(queries).view(layer, cache.tokens_seen, cache.query_positions)


def _coverage(
    full: RaggedCache, queries: int, length: int, masks: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of the attention to the first `length` tokens, the share on kept ones: mean and least over queries and groups.

    `masks`: of each cell, bool `(layers, heads, length)`. Both results are float64 `(cells, layers, heads)`.
    """
    means, least = [], []
    for number, view in enumerate(_views(full, queries)):
        attention = view.window_attention[0, ..., :length]  # (heads, groups, queries, length)
        total = attention.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        kept = [torch.from_numpy(mask[number]).to(attention.device) for mask in masks]
        shares = torch.stack([(attention * mask[:, None, None]).sum(-1) / total for mask in kept]).double().cpu()
        means.append(shares.mean((2, 3)).numpy())
        least.append(shares.amin((2, 3)).numpy())
    return np.stack(means, 1), np.stack(least, 1)


def _on_evidence(cache: RaggedCache, queries: int, case: Case) -> float:
    """Attention on the asked evidence, the mean over layers, heads and queries; NaN without evidence."""
    if not case.facts:
        return float("nan")
    start, stop = case.facts[0]
    masses = []
    for view in _views(cache, queries):
        inside = (view.positions >= start) & (view.positions < stop)
        masses.append((view.window_attention * inside[:, :, None, None]).sum(-1).double().mean())
    return float(torch.stack(masses).mean())


def attention_rows(results: Sequence[Examined], seed: int = 0) -> list[dict[str, Any]]:
    """One row for each task, length and cell, with 95% bootstrap intervals over the cases.

    A row has the columns of the tasks' rows, then `n`; `coverage`; `worst_head` and `worst_query`, the least of a
    case; `least`: the least of all; `below_half`: the share of heads with a coverage under a half; `outliers`: their
    number in all cases (DefensiveKV's figure); and, where evidence was planted, `evidence` and `full_evidence`
    (attention on it), `dilution` and `full_dilution` (one minus that), and `evidence_gain`: their difference, with the
    p-value of the paired bootstrap. `heads` has the kept share of every `[layer][head]`.
    """
    groups: dict[tuple, list[Examined]] = {}
    for result in results:
        groups.setdefault((result.task, result.length, result.cell.key), []).append(result)
    rows = []
    for (task, length, _), group in groups.items():
        cell = group[0].cell
        row: dict[str, Any] = {"task": task, "length": length, "policy": cell.name, "scope": cell.scope}
        row |= {"budget": cell.budget, "aware": False, "n": len(group)}
        row |= {
            "coverage": mean_interval([one.coverage.mean() for one in group], seed).to_dict(),
            "worst_head": mean_interval([one.coverage.min() for one in group], seed).to_dict(),
            "worst_query": mean_interval([one.worst.min() for one in group], seed).to_dict(),
            "least": float(min(one.coverage.min() for one in group)),
            "below_half": mean_interval([(one.coverage < 0.5).mean() for one in group], seed).to_dict(),
            "outliers": int(sum((one.coverage < 0.5).sum() for one in group)),
            "heads": np.mean([one.kept for one in group], axis=0).round(4).tolist(),
        }
        if not any(np.isnan(one.evidence) for one in group):
            row |= _evidence(group, seed)
        rows.append(row)
    return rows


def _evidence(group: Sequence[Examined], seed: int) -> dict[str, Any]:
    now, before = [one.evidence for one in group], [one.full_evidence for one in group]
    gain = paired_bootstrap(now, before, seed)
    return {
        "evidence": mean_interval(now, seed).to_dict(),
        "full_evidence": mean_interval(before, seed).to_dict(),
        "dilution": mean_interval([1 - one for one in now], seed).to_dict(),
        "full_dilution": mean_interval([1 - one for one in before], seed).to_dict(),
        "evidence_gain": gain.to_dict() | {"p_value": gain.p_value},
    }
