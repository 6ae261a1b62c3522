"""`tenure demo`: evaluate the shipped gates on a real model, show what they keep, and train new ones briefly."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .loading import Dtype, find_gates, load_with_gates, progress_bar, run_versions
from .output import WrittenFolder, make_console

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console, RenderableType
    from rich.table import Table
    from transformers import PreTrainedModel

    from ..eval import Case, Cell, Record
    from ..eval.pictures import PagePolicy
    from ..eval.runner import Inspect
    from ..eviction import RaggedCache
    from ..retention import RetentionGates

POLICIES = (
    "full",
    "retention:global",
    "retention:head",
    "snapkv:head",
    "snapkv:layer",
    "keydiff",
    "knorm",
    "streaming_llm",
    "random",
)
QUICK_CASES, QUICK_STEPS = 5, 2
WIDE = 105  # terminal width from which tables have padding between columns
PICTURED = (("retention", "global"), ("snapkv", "layer"))
ON_THE_PAGE = (*PICTURED, ("snapkv", "head"))
FULL_LENGTHS, FULL_BUDGETS, FULL_TASK = (1024, 2048), (0.5, 0.2, 0.1), "date"


@dataclass
class DemoConfig:
    """Compare how well policies answer questions when only a fifth of the KV cache is kept.

    Facts are hidden in held-out documents. Each document is read once; its cache is compressed by several policies
    before the question is known; then the question is asked. Afterwards new gates are trained for a few steps. Results,
    a heat map and a page that shows the kept tokens are written to `--out`.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, downloaded once)."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default the gates shipped for the demo model."""
    data: str = "demo"
    """Documents: `demo` (held-out essays), a text file or a folder."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ("needle", "phrase", "multikey")
    """Kinds of facts to hide: needle (a number), phrase (three words), multikey (four similar numbers), date."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY[:SCOPE][@CHUNK] ...")] = POLICIES
    """Policies to compare, with options as in snapkv(window=16). The scope after a colon (global, layer or head) says
    which entries compete for the budget; a number after @ is the chunk size for chunked prefill. snapkv:layer is AdaKV
    without its floor."""
    length: int = 1024
    """Tokens per document."""
    budgets: tuple[float, ...] = (0.2,)
    """Shares of the cache to keep."""
    cases: int = 20
    """Documents per task."""
    seed: int = 0
    """Seed for documents, facts and their positions."""
    quick: bool = False
    """At most 5 cases per cell and 2 training steps: under three minutes on two cores."""
    full: bool = False
    """Also keep 50% and 10%, use documents of 2048 tokens and the task date, and write results.md: up to an hour."""
    train_steps: int = 6
    """Training steps at the end; 0 skips training."""
    out: Annotated[Path, WrittenFolder("demo")] = Path("runs/demo")
    """Folder for results.json, kept.png, kept.html and the short training run."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    threads: int | None = None
    """CPU threads; by default torch decides."""

    def __post_init__(self) -> None:
        if self.quick and self.full:
            raise ValueError("--quick and --full exclude each other: give one of them")
        if self.cases < 1 or self.train_steps < 0:
            raise ValueError("--cases takes 1 or more, --train-steps 0 or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads is {self.threads}; 1 or more is accepted")
        if not self.budgets or not self.tasks or not self.policies:
            raise ValueError("--budgets, --tasks and --policies take one or more values each")


@dataclass(frozen=True)
class DemoPlan:
    """Settings of a run after `--quick` and `--full` are applied."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[float, ...]
    cases: int
    train_steps: int

    @classmethod
    def of(cls, config: DemoConfig) -> DemoPlan:
        plan = cls(tuple(config.tasks), (config.length,), tuple(config.budgets), config.cases, config.train_steps)
        if config.quick:
            return replace(plan, cases=min(plan.cases, QUICK_CASES), train_steps=min(plan.train_steps, QUICK_STEPS))
        if config.full:
            tasks = tuple(dict.fromkeys((*plan.tasks, FULL_TASK)))
            return replace(plan, tasks=tasks, lengths=FULL_LENGTHS, budgets=FULL_BUDGETS)
        return plan

    @property
    def shown_budget(self) -> float:
        """The budget shown in the pictures: 0.2 if it is among the budgets."""
        return 0.2 if 0.2 in self.budgets else self.budgets[0]


def main(config: DemoConfig) -> int:
    from ..eval import CaseBuilder

    console = make_console()
    plan = DemoPlan.of(config)
    started = time.perf_counter()
    cells, gates, texts = _check(config, plan)
    model, tokenizer = load_with_gates(config, gates, console, config.threads)
    builders = [CaseBuilder(tokenizer, texts, length, config.seed) for length in plan.lengths]
    cases = [case for builder in builders for case in builder.cases(plan.tasks, plan.cases)]
    console.print(introduction(config.model, plan, cells))
    pictures = KeptPictures(plan.tasks[0], plan.lengths[0], plan.shown_budget)
    records = _evaluate(model, tokenizer, cases, cells, gates, console, pictures.look)
    source = None if gates is None else str(find_gates(config.model, config.gates))
    settings = run_settings(config, plan, model, source, time.perf_counter() - started)
    files = [save_results(config.out, records, settings)]
    if config.full:
        files.append(save_markdown(config.out, records, settings))
    files += pictures.save(config.out, records, tokenizer, settings)
    for table in tables(records, plan, config.quick, console.width):
        console.print(table)
    console.print(conclusion(records, plan), markup=False)
    console.print(where(files), markup=False)
    if plan.train_steps:
        _train_a_few_steps(config, plan.train_steps, console)
    console.print(f"[dim]{time.perf_counter() - started:.0f} seconds altogether.[/dim]")
    return 0


def _check(config: DemoConfig, plan: DemoPlan) -> tuple[list[Cell], RetentionGates | None, list[str]]:
    """Validates the configuration, with a ValueError for whatever is wrong, before the model is loaded."""
    from ..eval import RETRIEVAL, check_inputs, get_task, parse_cells
    from ..retention import RetentionGates
    from ..training.assets import resolve_model, resolve_texts

    for task in plan.tasks:
        get_task(task, RETRIEVAL)
    cells = parse_cells(config.policies, plan.budgets)
    gates = None
    if any("log_beta" in cell.policy.needs for cell in cells):
        gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    source = resolve_model(config.model)
    from transformers import AutoConfig

    check_inputs(AutoConfig.from_pretrained(source), cells, max(plan.lengths), gates)
    texts = [document.text for document in resolve_texts(config.data, "eval")]
    config.out.mkdir(parents=True, exist_ok=True)
    return cells, gates, texts


def _evaluate(
    model: PreTrainedModel, tokenizer: Any, cases: Sequence[Case], cells: Sequence[Cell], gates: RetentionGates | None,
    console: Console, look: Inspect,
) -> list[Record]:  # fmt: skip
    from ..eval import evaluate

    with progress_bar(console, "{task.description}") as progress:
        bar = progress.add_task("asking", total=len(cases) * len(cells))

        def advance(record: Record) -> None:
            place = f"{record.length} tokens, {record.task} {record.index + 1}"
            progress.update(bar, advance=1, description=f"asking ({place})")

        records = evaluate(model, tokenizer, cases, cells, gates, progress=advance, inspect=look, together=8)
        progress.update(bar, description="asked")
    return records


def _train_a_few_steps(config: DemoConfig, steps: int, console: Console) -> None:
    """Trains new gates for the same model, so that the demo covers the whole pipeline."""
    from tenure.training import TrainConfig  # absolute as in train_gates, so that type checkers see one class

    from .train_gates import main as train_gates

    folder = config.out / "training"
    shutil.rmtree(folder, ignore_errors=True)  # otherwise the previous run would be resumed
    console.print(f"\nNow {steps} steps of training fresh gates; the shipped ones took hundreds.")
    train_gates(
        TrainConfig(
            model=config.model,
            texts=config.data,
            output_dir=str(folder),
            gate_width=64,
            initial_bias=12.0,
            lengths=(256,),
            steps=steps,
            learning_rate=1e-3,
            warmup_steps=1,
            gradient_checkpointing=False,
            log_every=1,
            save_every=steps,
            seed=config.seed,
        )
    )


def introduction(model: str, plan: DemoPlan, cells: Sequence[Cell]) -> RenderableType:
    """One paragraph that explains the experiment."""
    from rich.markup import escape
    from rich.panel import Panel

    from ..eval.summary import budget_text

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


def tables(records: Sequence[Record], plan: DemoPlan, quick: bool, width: int) -> list[Table]:
    """One table per length and budget, for a terminal of `width` characters."""
    from ..eval import summarise
    from ..eval.summary import kl_intervals, table_rows

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

    from ..eval.cells import label
    from ..eval.summary import accuracy_text, budget_text, mean_over_tasks, table_cases

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
            label(policy, scope), *map(accuracy_text, group),
            f"{kl[(length, policy, scope, group[0]['budget'], group[0]['aware'])].value:.3f}",
            f"{mean_over_tasks(group, 'entries'):,.0f}", f"{mean_over_tasks(group, 'bytes') / 1e6:.1f}",
            f"{mean_over_tasks(group, 'seconds') * 1e3:.0f}", style=style,
        )  # fmt: skip
    return table


def conclusion(records: Sequence[Record], plan: DemoPlan) -> str:
    """The main result in one sentence; empty if retention or every baseline is missing."""
    from ..eval import paired_bootstrap
    from ..eval.cells import label
    from ..eval.summary import budget_text

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
    """Names the files that were written."""
    return "Written: " + ", ".join(str(path) for path in files)


def run_settings(
    config: DemoConfig, plan: DemoPlan, model: PreTrainedModel, gates: str | None, seconds: float
) -> dict[str, Any]:
    """Everything needed to repeat the run and to interpret its timings."""
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
        "versions": run_versions() | {"python": platform.python_version()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "evaluation_seconds": round(seconds, 1),
    }


def save_results(folder: Path, records: Sequence[Record], settings: dict[str, Any]) -> Path:
    """results.json: table rows, settings, and all cases."""
    from ..eval import summarise

    document = {
        "rows": summarise(records),
        "settings": settings,
        "records": [record.to_dict() for record in records],
    }
    return _write(folder / "results.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def save_markdown(folder: Path, records: Sequence[Record], settings: dict[str, Any]) -> Path:
    """results.md: the tables as Markdown, with model, machine and versions."""
    from ..eval.summary import markdown_tables

    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    head = (
        f"Printed by `tenure demo --full`. Model {settings['model']}, {settings['dtype']} on {settings['device']} "
        f"({settings['threads']} threads), {versions}. Accuracy with Wilson's 95% interval; KL to the full cache over "
        "question and answer with its bootstrap 95% interval; ms is compressing the cache and reading question and "
        "answer."
    )
    return _write(folder / "results.md", f"{head}\n\n{markdown_tables(records)}\n")


def _write(path: Path, text: str) -> Path:
    from ..retention.checkpoint import write_atomic

    write_atomic(path, text.encode())
    return path


@dataclass
class KeptPictures:
    """Collects what compressed caches kept during the evaluation, and draws it afterwards.

    Attributes:
        task, length, budget: the cases to draw; the page shows the first.
    """

    task: str
    length: int
    budget: float
    _shares: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _masks: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    _case: Case | None = None

    def look(self, case: Case, cell: Cell, cache: RaggedCache) -> None:
        """Records what `cell` kept; does not modify the cache."""
        from ..eval.pictures import kept_mask, kept_share

        name = cell.policy.name, cell.scope
        if case.length != self.length or cell.budget != self.budget or not cell.evicts:
            return
        if name in PICTURED:
            self._shares.setdefault(cell.label, []).append(kept_share(cache))
        if name in ON_THE_PAGE and case.task == self.task and case.index == 0:
            self._case = case
            self._masks[name] = kept_mask(cache)

    def save(self, folder: Path, records: Sequence[Record], tokenizer: Any, settings: dict[str, Any]) -> list[Path]:
        """Writes kept.png and kept.html, or nothing if none of the pictured policies ran."""
        import numpy as np

        from ..eval.pictures import PageDocument, save_heat_map, save_token_page
        from ..eval.prompts import token_texts
        from ..eval.summary import budget_text

        files = []
        if self._shares:
            shares = {name: np.mean(seen, axis=0) for name, seen in self._shares.items()}
            count = len(next(iter(self._shares.values())))
            title = f"What each head kept of {self.length} tokens, mean of {count} documents"
            save_heat_map(folder / "kept.png", shares, title)
            files.append(folder / "kept.png")
        if self._case is not None:
            policies = [self._on_page(name, records) for name in ON_THE_PAGE if name in self._masks]
            case = self._case
            texts = token_texts(tokenizer, list(case.context_ids))
            subtitle = (
                f"{settings['model']}, {self.length} tokens, {budget_text(self.budget)} of the cache kept, compressed "
                "before the question was known"
            )
            document = PageDocument(texts, case.question, case.answer, case.facts)
            save_token_page(folder / "kept.html", document, policies, subtitle)
            files.append(folder / "kept.html")
        return files

    def _on_page(self, name: tuple[str, str], records: Sequence[Record]) -> PagePolicy:
        from ..eval.cells import label
        from ..eval.pictures import PagePolicy

        record = next(
            record
            for record in _by_cell(records, self.length)[(*name, self.budget)]
            if record.task == self.task and record.index == 0
        )
        return PagePolicy(label(*name), self._masks[name], record.prediction, record.correct, record.kl)
