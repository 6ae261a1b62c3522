"""What the demo shows and writes: tables, results.json, the heat map and the page."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..eval import Case, Cell, Record, paired_bootstrap, summarise
from ..eval.cells import label
from ..eval.pictures import PagePolicy, kept_mask, kept_share, save_heat_map, save_token_page
from ..eval.prompts import token_texts
from ..eval.summary import (
    accuracy_text,
    budget_text,
    kl_intervals,
    markdown_tables,
    mean_over_tasks,
    table_cases,
    table_rows,
)
from ..retention.checkpoint import write_atomic

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from transformers import PreTrainedModel

    from ..eviction import RaggedCache
    from .demo import Config, Plan

WIDE = 105  # a terminal of so many characters has room for the intervals beside the numbers
PICTURED = (("retention", "global"), ("snapkv", "layer"))
ON_THE_PAGE = (*PICTURED, ("snapkv", "head"))


def introduction(model: str, plan: Plan, cells: Sequence[Cell]) -> RenderableType:
    """One paragraph about what is going to happen."""
    from rich.markup import escape
    from rich.panel import Panel

    budgets = " / ".join(map(budget_text, plan.budgets))
    lengths = " and ".join(map(str, plan.lengths))
    ways = len({cell.label for cell in cells if cell.evicts})
    name = "SmolLM2-135M-Instruct" if model == "demo" else escape(model)
    return Panel(
        f"Facts are hidden in {plan.cases * len(plan.tasks) * len(plan.lengths)} held-out documents of {lengths} "
        f"tokens. {name} reads each document once. Then, [bold]before any question is known[/bold], its KV cache is "
        f"compressed to {budgets} in {ways} ways, and only what is left answers the question. [bold]retention[/bold] "
        "is this library: gates trained on the frozen model score every entry, and all layers and heads compete for "
        "one budget. The others need no training.",
        title="tenure: which tokens earn their place in the cache",
        border_style="dim",
    )


def tables(records: Sequence[Record], plan: Plan, quick: bool, width: int) -> list[Table]:
    """One table a length and budget, for a terminal of `width` characters."""
    rows, kl = summarise(records), kl_intervals(records)
    made = []
    for length in plan.lengths:
        for budget in plan.budgets:
            table = _table(table_rows(rows, length, budget), length, budget, kl, quick)
            table.padding = (0, 1) if width >= WIDE else (0, 0)
            made.append(table)
    return made


def _table(
    rows: dict[tuple[str, str], list[dict[str, Any]]], length: int, budget: float, kl: dict[tuple, Any], quick: bool
) -> Table:
    from rich import box
    from rich.table import Table

    notes = [
        f"accuracy [95% interval], {table_cases(rows)} cases a cell",
        "KL to the full cache in nats",
        "ms: compress the cache, then read question and answer",
    ]
    if quick:
        notes.append("--quick: few cases, so wide intervals")
    title = f"{length} tokens, {budget_text(budget)} of the cache kept"
    table = Table(title=title, caption="; ".join(notes), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("policy", no_wrap=True)
    for row in next(iter(rows.values())):
        table.add_column(row["task"], justify="right")
    for name in ("KL", "entries", "MB", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for (policy, scope), group in rows.items():
        style = "bold green" if (policy, scope) == ("retention", "global") else "dim" if policy == "full" else ""
        table.add_row(
            label(policy, scope),
            *map(accuracy_text, group),
            f"{kl[(length, policy, scope, group[0]['budget'], group[0]['aware'])].value:.3f}",
            f"{mean_over_tasks(group, 'entries'):,.0f}",
            f"{mean_over_tasks(group, 'bytes') / 1e6:.1f}",
            f"{mean_over_tasks(group, 'seconds') * 1e3:.0f}",
            style=style,
        )
    return table


def conclusion(records: Sequence[Record], plan: Plan) -> str:
    """The one sentence to remember, or nothing where retention or a baseline is missing."""
    length, budget = plan.lengths[0], plan.shown_budget
    found = {key: group for key, group in _by_cell(records, length).items() if key[2] == budget or key[0] == "full"}
    ours = found.get(("retention", "global", budget))
    full = next((group for key, group in found.items() if key[0] == "full"), None)
    others = {key: group for key, group in found.items() if key[0] not in ("retention", "full")}
    if ours is None or full is None or not others:
        return ""
    best = max(others, key=lambda key: sum(record.correct for record in others[key]))
    difference = paired_bootstrap(_correct(ours), _correct(others[best]))
    return (
        f"With {budget_text(budget)} of the cache, retention answers {sum(_correct(ours)):.0f} of {len(ours)} "
        f"questions; the full cache answers {sum(_correct(full)):.0f}, the best baseline "
        f"({label(best[0], best[1])}) {sum(_correct(others[best])):.0f}. Paired difference to that "
        f"baseline: {difference.value:+.2f}, 95% interval {difference.low:+.2f} to {difference.high:+.2f}."
    )


def _by_cell(records: Sequence[Record], length: int) -> dict[tuple[str, str, float | int], list[Record]]:
    groups: dict[tuple[str, str, float | int], list[Record]] = {}
    for record in records:
        if record.length == length:
            groups.setdefault((record.policy, record.scope, record.budget), []).append(record)
    return groups


def _correct(records: Sequence[Record]) -> list[float]:
    return [float(record.correct) for record in records]


def where(files: Sequence[Path]) -> str:
    """Where the results are."""
    return "Written: " + ", ".join(str(path) for path in files)


def settings(config: Config, plan: Plan, model: PreTrainedModel, gates: str | None, seconds: float) -> dict[str, Any]:
    """Everything needed to run this again and to judge the timings."""
    import torch

    return {
        "config": asdict(config) | {"out": str(config.out)},
        "plan": asdict(plan),
        "model": model.config._name_or_path,
        "gates": gates,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("tenure", "torch", "transformers")}
        | {"python": platform.python_version()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "evaluation_seconds": round(seconds, 1),
    }


def save_results(folder: Path, records: Sequence[Record], settings: dict[str, Any]) -> Path:
    """results.json: the rows of the tables, the settings, and every single case."""
    document = {
        "rows": summarise(records),
        "settings": settings,
        "records": [record.to_dict() for record in records],
    }
    return _write(folder / "results.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def save_markdown(folder: Path, records: Sequence[Record], settings: dict[str, Any]) -> Path:
    """results.md: the tables as Markdown, with what they were measured on."""
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    head = (
        f"Printed by `tenure demo --full`. Model {settings['model']}, {settings['dtype']} on {settings['device']} "
        f"({settings['threads']} threads), {versions}. Accuracy with Wilson's 95% interval; KL to the full cache over "
        "question and answer with its bootstrap 95% interval; ms is compressing the cache and reading question and "
        "answer."
    )
    return _write(folder / "results.md", f"{head}\n\n{markdown_tables(records)}\n")


def _write(path: Path, text: str) -> Path:
    write_atomic(path, text.encode())
    return path


@dataclass
class Pictures:
    """Looks at compressed caches while the evaluation runs and draws them afterwards.

    Attributes:
        task, length, budget: which cases are drawn; the page shows the first of them.
    """

    task: str
    length: int
    budget: float
    _shares: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _masks: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    _case: Case | None = None

    def look(self, case: Case, cell: Cell, cache: RaggedCache) -> None:
        """Notes what `cell` kept; reads the cache only."""
        name = cell.policy.name, cell.scope
        if case.length != self.length or cell.budget != self.budget or not cell.evicts:
            return
        if name in PICTURED:
            self._shares.setdefault(cell.label, []).append(kept_share(cache))
        if name in ON_THE_PAGE and case.task == self.task and case.index == 0:
            self._case = case
            self._masks[name] = kept_mask(cache)

    def save(
        self, folder: Path, records: Sequence[Record], tokenizer: Any, settings: dict[str, Any]
    ) -> list[Path]:
        """Writes kept.png and kept.html; nothing where no pictured policy took part."""
        files = []
        if self._shares:
            shares = {name: np.mean(seen, axis=0) for name, seen in self._shares.items()}
            count = len(next(iter(self._shares.values())))
            title = f"What each head kept of {self.length} tokens, mean of {count} documents"
            save_heat_map(folder / "kept.png", shares, title)
            files.append(folder / "kept.png")
        if self._case is not None:
            policies = [self._on_page(name, records) for name in ON_THE_PAGE if name in self._masks]
            texts = token_texts(tokenizer, list(self._case.context_ids))
            subtitle = (
                f"{settings['model']}, {self.length} tokens, {budget_text(self.budget)} of the cache kept, compressed "
                "before the question was known"
            )
            save_token_page(folder / "kept.html", self._case, texts, policies, subtitle)
            files.append(folder / "kept.html")
        return files

    def _on_page(self, name: tuple[str, str], records: Sequence[Record]) -> PagePolicy:
        record = next(
            record
            for record in _by_cell(records, self.length)[(*name, self.budget)]
            if record.task == self.task and record.index == 0
        )
        return PagePolicy(label(*name), self._masks[name], record.prediction, record.correct, record.kl)
