"""`tenure calibrate`: the smallest budget that keeps the expected loss of quality below a bound, with a guarantee."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .loading import Dtype, load_model

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..eval import BudgetDecision, Cell, RiskControl
    from ..retention import Calibration, RetentionGates
    from ..training.assets import Document
    from .calibrate_cases import Measured

VALIDATION_SEED = 1_000_003  # added to the seed: other cases than the calibration's


@dataclass
class Config:
    """Find the smallest cache budget whose expected loss of quality is below a bound, and store it with the gates.

    Documents are compressed to every budget before the question is known. Learn-then-Test then accepts budgets from
    the largest down, so that with the stated confidence the expected loss at the budget found is within the bound, for
    documents and questions drawn like those measured. The budget "calibrated" of evict() and `tenure generate` is the
    one found. If none qualifies, nothing is stored and the exit code is 1.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, fetched once)."""
    gates: str = "examples/smollm2-135m-gates"
    """Trained gates: a folder, where calibration.json is written, or with --out a Hub id."""
    out: Path | None = None
    """Save the gates with their calibration to this folder instead."""
    loss: Annotated[str, tyro.conf.arg(metavar="kl|answers|TASK")] = "kl"
    """kl: KL to the full cache over question and answer, in nats; answers: an answer that the full cache gives right
    and the compressed one wrong; needle, phrase, multikey, date: the same for that task alone."""
    bound: float = 0.2
    """Of the expected loss: nats, or the share of answers lost."""
    max_loss: float = 1.0
    """A case's KL counts at most this many nats. Answers are not affected."""
    confidence: float = 0.9
    """That the bound holds (ltt)."""
    method: Literal["ltt", "crc"] = "ltt"
    """ltt: Learn-then-Test, with the stated confidence; crc: conformal risk control, on average over calibrations."""
    budgets: Annotated[tuple[int | float, ...], tyro.conf.arg(metavar="BUDGET ...")] = (
        0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1,
    )  # fmt: skip
    """What is tried: shares of the tokens seen, or entries per head on average."""
    cases: int = 60
    """Documents to measure."""
    length: tuple[int, ...] = (1024,)
    """Tokens of a document; of several numbers each document draws one."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ("needle", "phrase", "multikey")
    """What the questions are about, with the loss kl or answers."""
    policy: str = "retention"
    """Which entries stay; options may follow, as in retention(lookahead=16)."""
    scope: Literal["auto", "global", "layer", "head", "pyramid"] = "auto"
    """Who competes for the budget; auto is the policy's choice."""
    data: str = "demo"
    """Texts to take documents from: `demo` (every other held-out essay), a text file or a folder, used whole."""
    validate: int = 0
    """Also measure this many documents of the other held-out essays (with --data of your own: of the same texts), and
    count how often random splits of all documents measured break the bound."""
    seed: int = 0
    """Chooses documents, facts and where they lie."""
    json: Path | None = None
    """Also write the result and every single case to this file."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    threads: int | None = None
    """CPU threads; by default as many as torch chooses."""

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
class Plan:
    """What a run does, checked before the model is loaded.

    Attributes:
        control: what is asked of a budget.
        cells: the full cache, then every budget, falling.
        tasks: what the questions are about.
        gates: with or without an earlier calibration.
        texts, held_out: what documents are cut from for calibration, and for validation.
        sinks, recent: first and last tokens that always stay: what `evict` protects by default.
    """

    control: RiskControl
    cells: list[Cell]
    tasks: tuple[str, ...]
    gates: RetentionGates
    texts: list[Document]
    held_out: list[Document]
    sinks: int = 4
    recent: int = 32

    @property
    def budgets(self) -> list[float | int]:
        return [cell.budget for cell in self.cells[1:]]


def main(config: Config) -> int:
    from rich.console import Console

    from . import calibrate_output as output
    from .calibrate_cases import long_texts, measure

    console = Console()
    plan = _check(config)
    model, tokenizer = _load(config, plan.gates, console)
    texts = long_texts(config, tokenizer, plan.texts)
    held_out = long_texts(config, tokenizer, plan.held_out) if config.validate else []
    console.print(output.introduction(config, plan.cells, [text.name for text in texts]), markup=False)
    measured = measure(config, plan, model, tokenizer, texts, config.cases, config.seed, console)
    outcome = plan.control.decide(measured.losses, plan.budgets)
    console.print(output.table(config, outcome, measured.losses))
    validation = None
    if config.validate:
        seed = config.seed + VALIDATION_SEED
        validation = measure(config, plan, model, tokenizer, held_out, config.validate, seed, console)
        output.show_validation(console, config, plan.control, outcome, measured, validation)
    calibration = _calibration(config, plan, model, measured, outcome)
    if config.json is not None:
        output.write_json(config.json, calibration, outcome, measured, validation)
    if calibration is None:
        raise ValueError(output.refusal(plan.control, outcome, config.cases))
    console.print(output.conclusion(calibration), markup=False, highlight=False)
    console.print(f"Stored in {_store(config, plan.gates, calibration)}", markup=False, highlight=False)
    return 0


def _check(config: Config) -> Plan:
    """Refuses what cannot work, in one sentence and before the model is loaded.

    Raises:
        ValueError: a wrong loss, task, bound, budget, policy or scope; too few cases for any promise; documents beyond
            the model's context; no gates, nowhere to store a calibration, or no texts.
    """
    from ..eval import Cell, RiskControl, check_inputs, tasks_of
    from ..retention import RetentionGates
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
    if config.out is None and not Path(config.gates).is_dir():
        raise ValueError(f"{config.gates!r} is not a folder here: give --out for the gates with their calibration")
    gates = RetentionGates.from_pretrained(config.gates)
    source = resolve_model(config.model)
    from transformers import AutoConfig

    check_inputs(AutoConfig.from_pretrained(source), cells, max(config.length), gates)
    documents = resolve_texts(config.data, "eval")
    # The gates were trained on the training essays; of the others, sorted by name, one half each.
    halves = (documents[::2], documents[1::2]) if config.data == "demo" else (documents, documents)
    return Plan(control, cells, tasks, gates, *halves)


def _load(config: Config, gates: RetentionGates, console: Console) -> tuple[PreTrainedModel, Any]:
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with console.status(f"loading model {config.model}"):
        model, tokenizer = load_model(config.model, config.device, config.dtype)
        gates.check_model(model)
        gates.to(model.device)
    return model, tokenizer


def _calibration(
    config: Config, plan: Plan, model: PreTrainedModel, measured: Measured, outcome: BudgetDecision
) -> Calibration | None:
    """What is stored; None if no budget qualifies."""
    if outcome.budget is None:
        return None
    from ..eviction import policy_text
    from ..retention import Calibration
    from ..retention.calibration import weights_digest

    cell = plan.cells[-1]
    names = sorted(set(measured.documents))
    return Calibration(
        budget=outcome.budget,
        loss=config.loss,
        bound=config.bound,
        max_loss=plan.control.max_loss,
        confidence=config.confidence if config.method == "ltt" else None,
        method=config.method,
        policy=policy_text(cell.policy),
        scope=cell.scope,
        floor=cell.policy.default_floor,
        sinks=plan.sinks,
        recent=plan.recent,
        model=str(model.config._name_or_path),
        dtype=str(model.dtype).removeprefix("torch."),
        tasks=plan.tasks,
        lengths=(min(config.length), max(config.length)),
        cases=len(measured.losses),
        documents=len(names),
        data=f"{Path(config.data).name}: {', '.join(names[:20])}{', …' * (len(names) > 20)}",
        seed=config.seed,
        weights=weights_digest(plan.gates.state_dict()),
        table=outcome.table,
    )


def _store(config: Config, gates: RetentionGates, calibration: Calibration) -> Path:
    """Writes calibration.json beside the gates, or all files of the gates to `--out`; returns its path."""
    from ..retention.calibration import save_calibration
    from ..retention.checkpoint import CALIBRATION_FILE

    gates.calibration = calibration
    if config.out is None:
        save_calibration(Path(config.gates), calibration)
        return Path(config.gates) / CALIBRATION_FILE
    gates.save_pretrained(config.out)
    return config.out / CALIBRATION_FILE
