"""`tenure calibrate`: find the smallest budget that keeps the expected quality loss below a bound, with a guarantee."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .loading import Dtype, load_with_gates, progress_bar
from .output import OutputFile, OutputFolder, make_console

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from transformers import PreTrainedModel

    from ..eval import BudgetDecision, Cell, Record, Resplits, RiskControl
    from ..retention import Calibration, RetentionGates
    from ..training.assets import Document

VALIDATION_SEED = 1_000_003  # added to the seed: other cases than the calibration's
SPLITS = 200  # random halves of all measured documents, with --validate


@dataclass
class CalibrateConfig:
    """Find the smallest cache budget whose expected quality loss is below a bound, and store it with the gates.

    Documents are compressed to every budget before the question is known. Learn-then-Test then accepts budgets from
    the largest down: with the stated confidence, the expected loss at the chosen budget is within the bound for
    documents and questions from the same distribution. evict() and `tenure generate` use the stored budget if given
    the budget "calibrated". If no budget qualifies, nothing is stored and the exit code is 1.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, downloaded once)."""
    gates: str = "demo"
    """Trained gates: a folder, to which calibration.json is written, or with --out hub:OWNER/NAME or demo."""
    out: OutputFolder | None = None
    """Save the gates with their calibration to this folder instead."""
    loss: Annotated[str, tyro.conf.arg(metavar="kl|answers|TASK")] = "kl"
    """kl: KL to the full cache over question and answer, in nats; answers: the share of answers that are right with the
    full cache and wrong with the compressed one; needle, phrase, multikey, date: the same for a single task."""
    bound: float = 0.2
    """Bound on the expected loss: nats, or the share of lost answers."""
    max_loss: float = 1.0
    """Clip the KL of a case at this many nats. Does not affect losses about answers."""
    confidence: float = 0.9
    """Probability that the bound holds (ltt)."""
    method: Literal["ltt", "crc"] = "ltt"
    """ltt: Learn-then-Test, with the stated confidence; crc: conformal risk control, on average over calibrations."""
    budgets: Annotated[tuple[int | float, ...], tyro.conf.arg(metavar="BUDGET ...")] = (
        0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1,
    )  # fmt: skip
    """Budgets to try: shares of the tokens seen, or average entries per head."""
    cases: int = 60
    """Number of documents to measure."""
    length: tuple[int, ...] = (1024,)
    """Tokens per document; with several values, one is drawn for each document."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ("needle", "phrase", "multikey")
    """Tasks of the questions, for the losses kl and answers."""
    policy: str = "retention"
    """Eviction policy, with options as in retention(lookahead=16)."""
    scope: Literal["auto", "global", "layer", "head", "pyramid", "preference"] = "auto"
    """The entries that compete for the budget; auto is the policy's default."""
    data: str = "demo"
    """Texts to take documents from: `demo` (every other held-out essay), a text file or a folder."""
    validate: int = 0
    """Also measure this many documents of the remaining held-out essays (with your own --data: of the same texts), and
    count how often random splits of all documents violate the bound."""
    seed: int = 0
    """Seed for documents, facts and their positions."""
    json: OutputFile | None = None
    """Also write the result and all cases to this file."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    threads: int | None = None
    """CPU threads; by default torch decides."""

    def __post_init__(self) -> None:
        if self.cases < 1 or self.validate < 0:
            raise ValueError("--cases takes 1 or more, --validate 0 or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads is {self.threads}; 1 or more is accepted")
        if not self.budgets or not self.length or not self.tasks:
            raise ValueError("--budgets, --length and --tasks take one or more values each")
        if len({type(budget) for budget in self.budgets}) > 1:
            raise ValueError("--budgets takes shares (0.2) or numbers of entries (256), not both")


@dataclass(frozen=True)
class CalibrationPlan:
    """The validated inputs of a calibration.

    Attributes:
        control: decides which budgets qualify.
        cells: the full cache, then the budgets in descending order.
        tasks: of the questions.
        gates: possibly with an earlier calibration, which is replaced.
        texts, held_out: sources of documents for calibration and for validation.
        sinks, recent: protected first and last tokens: the policy's own.
    """

    control: RiskControl
    cells: list[Cell]
    tasks: tuple[str, ...]
    gates: RetentionGates
    texts: list[Document]
    held_out: list[Document]
    sinks: int
    recent: int

    @property
    def budgets(self) -> list[float | int]:
        return [cell.budget for cell in self.cells[1:]]


@dataclass(frozen=True)
class MeasuredCases:
    """Evaluated cases.

    Attributes:
        documents: name of each case's source text.
        records: one for each cell and case.
        losses: float64 `(cases, budgets)`.
    """

    documents: list[str]
    records: list[Record]
    losses: np.ndarray


def main(config: CalibrateConfig) -> int:
    console = make_console()
    plan = _check(config)
    model, tokenizer = load_with_gates(config, plan.gates, console, config.threads)
    texts = long_texts(config, tokenizer, plan.texts)
    held_out = long_texts(config, tokenizer, plan.held_out) if config.validate else []
    console.print(introduction(config, plan.cells, [text.name for text in texts]), markup=False)
    measured = measure(config, plan, model, tokenizer, texts, config.cases, config.seed, console)
    outcome = plan.control.decide(measured.losses, plan.budgets)
    console.print(budget_table(config, outcome, measured.losses))
    validation = None
    if config.validate:
        seed = config.seed + VALIDATION_SEED
        validation = measure(config, plan, model, tokenizer, held_out, config.validate, seed, console)
        show_validation(console, config, plan.control, outcome, measured, validation)
    calibration = _calibration(config, plan, model, measured, outcome)
    if config.json is not None:
        write_result(config.json, calibration, outcome, measured, validation)
    if calibration is None:
        raise ValueError(refusal(plan.control, outcome, config.cases))
    console.print(conclusion(calibration), markup=False, highlight=False)
    console.print(f"Stored in {_store(config, plan.gates, calibration)}", markup=False, highlight=False)
    return 0


def _check(config: CalibrateConfig) -> CalibrationPlan:
    """Validates the configuration, with a ValueError for whatever is wrong, before the model is loaded."""
    from ..eval import Cell, RiskControl, check_inputs, tasks_of
    from ..retention import RetentionGates
    from ..retention.checkpoint import SHIPPED_GATES
    from ..training.assets import resolve_model, resolve_texts

    tasks = tasks_of(config.loss, config.tasks)
    binary = config.loss != "kl"
    largest = 1.0 if binary else config.max_loss
    control = RiskControl(config.bound, largest, config.confidence, config.method, binary)
    if config.cases < control.least_cases:
        raise ValueError(
            f"--cases {config.cases} cannot show a bound of {config.bound:g} even if none loses anything: "
            f"{control.least_cases} or more can"
        )
    scope = None if config.scope == "auto" else config.scope
    budgets = sorted(set(config.budgets), reverse=True)
    cells = [Cell.of("full"), *(Cell.of(config.policy, budget, scope) for budget in budgets)]
    if not cells[-1].evicts:
        raise ValueError(f"policy {config.policy!r} evicts nothing: there is no budget to calibrate")
    if config.out is None and (config.gates in SHIPPED_GATES or not Path(config.gates).expanduser().is_dir()):
        raise ValueError(f"{config.gates!r} is not a folder here: give --out for the gates with their calibration")
    gates = RetentionGates.from_pretrained(config.gates)
    source = resolve_model(config.model)
    from transformers import AutoConfig

    check_inputs(AutoConfig.from_pretrained(source), cells, max(config.length), gates)
    documents = resolve_texts(config.data, "eval")
    # The gates were trained on the training essays; of the others, sorted by name, one half each.
    halves = (documents[::2], documents[1::2]) if config.data == "demo" else (documents, documents)
    own = cells[-1].policy.default_protection
    return CalibrationPlan(control, cells, tasks, gates, *halves, own.sinks, own.recent)


def long_texts(config: CalibrateConfig, tokenizer: Any, texts: Sequence[Document]) -> list[Document]:
    """The texts that are long enough for a document.

    Raises:
        ValueError: none is.
    """
    from ..eval import long_enough

    found = long_enough(tokenizer, [text.text for text in texts], max(config.length))
    if not found:
        raise ValueError(
            f"none of the {len(texts)} texts in {config.data!r} has {max(config.length)} tokens: give a smaller "
            "--length, or longer texts (files may be joined)"
        )
    return [texts[number] for number in found]


def measure(
    config: CalibrateConfig, plan: CalibrationPlan, model: PreTrainedModel, tokenizer: Any, texts: Sequence[Document],
    count: int, seed: int, console: Console,
) -> MeasuredCases:  # fmt: skip
    """Compresses `count` documents cut from `texts` to every budget and asks, under a progress bar."""
    from ..eval import draw_cases, evaluate, losses_of

    draws = draw_cases(tokenizer, [text.text for text in texts], count, config.length, plan.tasks, seed)
    numbers, cases = zip(*draws, strict=True)
    with progress_bar(console, "measuring") as progress:
        bar = progress.add_task("measuring", total=count * len(plan.cells))
        records = evaluate(
            model, tokenizer, cases, plan.cells, plan.gates, plan.sinks, plan.recent, lambda _: progress.advance(bar),
            together=8,
        )  # fmt: skip
    losses = losses_of(records, plan.budgets, config.loss, plan.control.max_loss)
    return MeasuredCases([texts[number].name for number in numbers], records, losses)


def _calibration(
    config: CalibrateConfig, plan: CalibrationPlan, model: PreTrainedModel, measured: MeasuredCases,
    outcome: BudgetDecision,
) -> Calibration | None:  # fmt: skip
    """The calibration to store; None if no budget qualifies."""
    if outcome.budget is None:
        return None
    from ..eviction import policy_text
    from ..retention import Calibration
    from ..retention.calibration import weights_digest

    cell = plan.cells[-1]
    names = sorted(set(measured.documents))
    return Calibration(
        budget=outcome.budget, loss=config.loss, bound=config.bound, max_loss=plan.control.max_loss,
        confidence=config.confidence if config.method == "ltt" else None, method=config.method,
        policy=policy_text(cell.policy), scope=cell.scope, floor=cell.policy.default_floor, sinks=plan.sinks,
        recent=plan.recent, model=str(model.config._name_or_path), dtype=str(model.dtype).removeprefix("torch."),
        tasks=plan.tasks, lengths=(min(config.length), max(config.length)), cases=len(measured.losses),
        documents=len(names), data=f"{Path(config.data).name}: {', '.join(names[:20])}{', …' * (len(names) > 20)}",
        seed=config.seed, weights=weights_digest(plan.gates.state_dict()), table=outcome.table,
    )  # fmt: skip


def _store(config: CalibrateConfig, gates: RetentionGates, calibration: Calibration) -> Path:
    """Writes calibration.json next to the gates, or gates and calibration to `--out`; returns its path."""
    from ..retention.calibration import save_calibration
    from ..retention.checkpoint import CALIBRATION_FILE

    gates.calibration = calibration
    if config.out is None:
        folder = Path(config.gates).expanduser()
        save_calibration(folder, calibration)
        return folder / CALIBRATION_FILE
    gates.save_pretrained(config.out)
    return config.out / CALIBRATION_FILE


def introduction(config: CalibrateConfig, cells: Sequence[Cell], names: Sequence[str]) -> str:
    """Describes the measurement and the population that the guarantee covers."""
    lengths = " or ".join(str(length) for length in config.length)
    shown = f"{', '.join(names[:8])}{', …' * (len(names) > 8)}"
    lines = [
        f"{cells[-1].label}: {config.cases} documents of {lengths} tokens from {len(names)} texts ({shown}), each "
        f"compressed to {len(cells) - 1} budgets before its question is known."
    ]
    if config.cases > len(names):
        lines.append(
            "Several documents share a text: the promise is for further passages of these texts, and for other texts "
            "only as far as they are like them."
        )
    return "\n".join(lines)


def budget_table(config: CalibrateConfig, outcome: BudgetDecision, losses: np.ndarray) -> Table:
    """One row per budget, the largest first."""
    from rich.table import Table

    from ..eval.summary import budget_text

    statistic = "p-value" if config.method == "ltt" else "bound on the mean"
    rows = Table(title=f"Loss: {loss_text(config)}; bound {config.bound:g}", title_justify="left")
    for name in ("budget", "mean loss", "largest", statistic):
        rows.add_column(name, justify="right")
    rows.add_column("accepted")
    for row, largest in zip(outcome.table, losses.max(0), strict=True):
        mark = "yes" if row.accepted else "no"
        rows.add_row(budget_text(row.budget), f"{row.mean_loss:.4f}", f"{largest:.3f}", f"{row.statistic:.2g}", mark)
    return rows


def loss_text(config: CalibrateConfig) -> str:
    """The loss in words."""
    if config.loss == "kl":
        return f"KL to the full cache in nats, at most {config.max_loss:g} a case"
    kind = "" if config.loss == "answers" else f" ({config.loss})"
    return f"answers{kind} that the full cache gives right and the compressed one wrong"


def conclusion(calibration: Calibration) -> str:
    """The chosen budget and its guarantee."""
    from ..eval.summary import budget_text

    return f"{budget_text(calibration.budget)} of the cache: {calibration.promise} drawn like these."


def refusal(control: RiskControl, outcome: BudgetDecision, cases: int) -> str:
    """One sentence on why no budget qualifies, and what would help."""
    from ..eval.summary import budget_text

    first = outcome.table[0]
    needed = control.cases_needed(first.mean_loss)
    if needed is None:
        help_ = "no number of cases would do: raise the bound or try larger budgets"
    else:
        help_ = f"{needed} cases would do for {control.bound:g} if its mean stayed as it is"
    reachable = control.reachable(first.mean_loss, cases)
    return (
        f"no budget qualifies and nothing is stored: {budget_text(first.budget)}, the largest, has a mean loss of "
        f"{first.mean_loss:.4f}; with {cases} cases it meets a bound of {reachable:.4f} or more, and {help_}"
    )


def show_validation(
    console: Console, config: CalibrateConfig, control: RiskControl, outcome: BudgetDecision, measured: MeasuredCases,
    validation: MeasuredCases,
) -> None:  # fmt: skip
    """Tests the chosen budget on held-out documents, and the guarantee on random splits of all documents."""
    import numpy as np
    from rich.table import Table

    from ..eval import bootstrap_mean, resplit
    from ..eval.summary import budget_text

    names = ", ".join(dict.fromkeys(sorted(validation.documents)))
    if outcome.accepted is not None:
        found = bootstrap_mean(list(validation.losses[:, outcome.accepted]), config.seed)
        budget = budget_text(outcome.table[outcome.accepted].budget)
        verdict = "within" if found.value <= config.bound else "above"
        console.print(
            f"Held out, {len(validation.losses)} documents of {names}: mean loss {found.value:.4f} at {budget} (95% "
            f"interval {found.low:.4f} to {found.high:.4f}), {verdict} the bound.",
            markup=False,
            highlight=False,
        )
    losses = np.concatenate([measured.losses, validation.losses])
    documents = measured.documents + validation.documents
    budgets = [row.budget for row in outcome.table]
    rows = Table(title=f"{SPLITS} random halves of all {len(losses)} documents, calibrated on one, judged by the other")
    rows.title_justify = "left"
    for name in ("halves of", "bound broken", "promised", "none accepted", "held-out mean", "chosen"):
        rows.add_column(name, justify="left" if name == "chosen" else "right")
    promised = f"≤ {1 - config.confidence:.0%}" if config.method == "ltt" else "mean ≤ bound"
    groups: dict[str, Sequence[int]] = {"documents": range(len(losses))}
    if len(set(documents)) > 1:
        order = {name: number for number, name in enumerate(sorted(set(documents)))}
        groups["texts"] = [order[name] for name in documents]
    for name, labels in groups.items():
        found = resplit(losses, budgets, labels, control, SPLITS, config.seed)
        rows.add_row(name, *_split_cells(found, promised))
    console.print(rows)


def _split_cells(found: Resplits, promised: str) -> list[str]:
    from ..eval.summary import budget_text

    chosen = ", ".join(f"{budget_text(budget)} ({times})" for budget, times in found.chosen.items())
    return [f"{found.rate:.1%}", promised, str(found.none), f"{found.mean_loss:.4f}", chosen]


def write_result(
    path: Path, calibration: Calibration | None, outcome: BudgetDecision, measured: MeasuredCases,
    validation: MeasuredCases | None,
) -> None:  # fmt: skip
    """Writes the calibration (null if there is none), the table, and all cases of both sets."""
    from ..retention.checkpoint import write_atomic

    document: dict[str, Any] = {
        "calibration": None if calibration is None else calibration.to_dict(),
        "table": [asdict(row) for row in outcome.table],
    }
    for name, cases in (("measured", measured), ("validation", validation)):
        if cases is not None:
            document[name] = {
                "documents": cases.documents,
                "losses": cases.losses.tolist(),
                "records": [record.to_dict() for record in cases.records],
            }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
