"""`tenure demo`: judge the shipped gates on a real model, see what they keep, then train fresh ones for a few steps."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .loading import Dtype, load_model

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..eval import Case, Cell, Record
    from ..eval.runner import Inspect
    from ..retention import RetentionGates

SHIPPED_GATES = Path("examples") / "smollm2-135m-gates"
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
FULL_LENGTHS, FULL_BUDGETS, FULL_TASK = (1024, 2048), (0.5, 0.2, 0.1), "date"


@dataclass
class Config:
    """Compare what a model still finds when a fifth of its KV cache is left.

    Facts are hidden in held-out documents. Each document is read once; its cache is compressed in several ways before
    the question is known; then the question is asked. Afterwards fresh gates are trained for a few steps. The numbers,
    a heat map and a page that shows what was kept go to `--out`.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, fetched once)."""
    gates: str | None = None
    """Trained gates: a folder or Hub id; by default those shipped for the demo model."""
    data: str = "demo"
    """Documents: `demo` (held-out essays), a text file or a folder."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ("needle", "phrase", "multikey")
    """What is hidden: needle (a number), phrase (three words), multikey (four similar numbers), date."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY[:SCOPE][@CHUNK] ...")] = POLICIES
    """What is compared: a policy, its options if any, e.g. snapkv(window=16); after a colon who competes (global, layer
    or head); after an @ the tokens of the chunks in which the document is read. snapkv:layer is AdaKV without its
    floor."""
    length: int = 1024
    """Tokens of a document."""
    budgets: tuple[float, ...] = (0.2,)
    """Shares of the cache that stay."""
    cases: int = 20
    """Documents per task."""
    seed: int = 0
    """Chooses documents, facts and where they lie."""
    quick: bool = False
    """At most 5 cases a cell and 2 training steps: under three minutes on two cores."""
    full: bool = False
    """Also 50% and 10% kept, documents of 2048 tokens, the task date, and results.md: up to an hour."""
    train_steps: int = 6
    """Steps of the training at the end; 0 skips it."""
    out: Path = Path("runs/demo")
    """Folder for results.json, kept.png, kept.html and the short training run."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    threads: int | None = None
    """CPU threads; by default as many as torch chooses."""

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
class Plan:
    """What a run does, after `--quick` and `--full` have had their say."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[float, ...]
    cases: int
    train_steps: int

    @classmethod
    def of(cls, config: Config) -> Plan:
        plan = cls(tuple(config.tasks), (config.length,), tuple(config.budgets), config.cases, config.train_steps)
        if config.quick:
            return replace(plan, cases=min(plan.cases, QUICK_CASES), train_steps=min(plan.train_steps, QUICK_STEPS))
        if config.full:
            tasks = tuple(dict.fromkeys((*plan.tasks, FULL_TASK)))
            return replace(plan, tasks=tasks, lengths=FULL_LENGTHS, budgets=FULL_BUDGETS)
        return plan

    @property
    def shown_budget(self) -> float:
        """The budget of the pictures: the demo's own, a fifth, if it is among them."""
        return 0.2 if 0.2 in self.budgets else self.budgets[0]


def main(config: Config) -> int:
    from rich.console import Console

    from ..eval import CaseBuilder
    from . import demo_output

    console = Console()
    plan = Plan.of(config)
    started = time.perf_counter()
    cells, gates, texts = _check(config, plan)
    model, tokenizer = _load(config, gates, console)
    builders = [CaseBuilder(tokenizer, texts, length, config.seed) for length in plan.lengths]
    cases = [case for builder in builders for case in builder.cases(plan.tasks, plan.cases)]
    console.print(demo_output.introduction(config.model, plan, cells))
    pictures = demo_output.Pictures(plan.tasks[0], plan.lengths[0], plan.shown_budget)
    records = _evaluate(model, tokenizer, cases, cells, gates, console, pictures.look)
    source = None if gates is None else str(find_gates(config.model, config.gates))
    settings = demo_output.settings(config, plan, model, source, time.perf_counter() - started)
    files = [demo_output.save_results(config.out, records, settings)]
    if config.full:
        files.append(demo_output.save_markdown(config.out, records, settings))
    files += pictures.save(config.out, records, tokenizer, settings)
    for table in demo_output.tables(records, plan, config.quick, console.width):
        console.print(table)
    console.print(demo_output.conclusion(records, plan), markup=False)
    console.print(demo_output.where(files), markup=False)
    if plan.train_steps:
        _train_a_few_steps(config, plan.train_steps, console)
    console.print(f"[dim]{time.perf_counter() - started:.0f} seconds altogether.[/dim]")
    return 0


def _check(config: Config, plan: Plan) -> tuple[list[Cell], RetentionGates | None, list[str]]:
    """Refuses what cannot work, in one sentence and before the model is loaded.

    Raises:
        ValueError: unknown policy, scope or task; a budget out of range; documents beyond the model's context; no
            gates; no texts.
    """
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


def find_gates(model: str, gates: str | None) -> str | Path:
    """The gates to use: those given, or the shipped ones of the demo model.

    Raises:
        ValueError: none are given and the shipped ones are not for this model, or are not there.
    """
    if gates is not None:
        return gates
    if model != "demo":
        raise ValueError(f"the shipped gates fit the demo model only: give --gates for {model!r}")
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / SHIPPED_GATES).is_dir():
            return root / SHIPPED_GATES
    raise ValueError(
        f"the shipped gates ({SHIPPED_GATES}) are part of the repository and not of the installed package: run this in "
        "a checkout, or give --gates"
    )


def _load(config: Config, gates: RetentionGates | None, console: Console) -> tuple[PreTrainedModel, Any]:
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with console.status(f"loading model {config.model}"):
        model, tokenizer = load_model(config.model, config.device, config.dtype)
        if gates is not None:
            gates.check_model(model)
            gates.to(model.device)
    return model, tokenizer


def _evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    cases: Sequence[Case],
    cells: Sequence[Cell],
    gates: RetentionGates | None,
    console: Console,
    look: Inspect,
) -> list[Record]:
    from rich import progress as bars

    from ..eval import evaluate

    columns = bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), bars.TimeRemainingColumn()
    with bars.Progress(bars.TextColumn("{task.description}"), *columns, console=console) as progress:
        bar = progress.add_task("asking", total=len(cases) * len(cells))

        def advance(record: Record) -> None:
            place = f"{record.length} tokens, {record.task} {record.index + 1}"
            progress.update(bar, advance=1, description=f"asking ({place})")

        records = evaluate(model, tokenizer, cases, cells, gates, progress=advance, inspect=look, together=8)
        progress.update(bar, description="asked")
    return records


def _train_a_few_steps(config: Config, steps: int, console: Console) -> None:
    """Trains fresh gates for the same model, so that the whole path has been walked once."""
    from .train_gates import Config as TrainConfig
    from .train_gates import main as train_gates

    folder = config.out / "training"
    shutil.rmtree(folder, ignore_errors=True)  # else the run before this one would be resumed
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
