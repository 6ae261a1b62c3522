"""`tenure fidelity`: compare compressed caches with the full cache: KL, perplexity, retained attention, evidence."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .loading import Dtype, load_with_gates, pick_device, progress_bar, run_versions
from .output import OutputFolder, make_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..eval import Cell
    from ..retention import RetentionGates

POLICIES = ("full", "retention", "layer_defensive", "snapkv", "streaming_llm")
QUESTION_TOKENS = 256


@dataclass
class FidelityConfig:
    """Measure how eviction changes a model's predictions and attention.

    Documents are read in chunks with the full cache and with compressed ones: KL to the full cache by position,
    agreement on the top token, and perplexity. Then contexts with planted evidence are compressed before the question
    is read: the share of the answer's attention to the context that falls on kept entries, on average and in the worst
    head, and how much of it falls on the evidence compared with the full cache. Tables are printed; fidelity.json in
    `--out` has all rows with bootstrap intervals, and the entries kept per layer and head.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, downloaded once)."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default the gates shipped for the demo model."""
    data: str = "demo"
    """Texts: `demo` (held-out essays), a text file or a folder."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY[:SCOPE] ...")] = POLICIES
    """Policies to compare, with options if any; the scope, after a colon, says which entries compete."""
    budgets: Annotated[tuple[int | float, ...], tyro.conf.arg(metavar="BUDGET ...")] = (0.5, 0.2)
    """Shares of the cache to keep (0.2), or whole numbers: entries per head (256)."""
    length: int = 1024
    """Tokens per document and context."""
    documents: int = 6
    """Documents to read in chunks; 0 skips this part."""
    chunk: int = 128
    """Tokens between two evictions."""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TASK ...")] = ("niah_single_2", "niah_multikey_1")
    """Tasks of the contexts whose attention is measured."""
    cases: int = 6
    """Cases per task; 0 skips this part."""
    seed: int = 0
    """Seed for documents and cases."""
    sinks: int | None = None
    """First tokens that are always kept; by default the policy's own number."""
    recent: int | None = None
    """Last tokens that are always kept; by default the policy's own number."""
    out: OutputFolder = Path("runs/fidelity")
    """Folder for fidelity.json."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""

    def __post_init__(self) -> None:
        if min(self.documents, self.cases) < 0 or self.documents + self.cases == 0:
            raise ValueError("--documents and --cases take 0 or more, and not both 0")
        if not self.policies or not self.budgets or (self.cases and not self.tasks):
            raise ValueError("--policies, --budgets and --tasks take one or more values each")
        if self.length < 2:
            raise ValueError(f"--length is {self.length}; 2 or more is accepted")
        if min(self.sinks or 0, self.recent or 0) < 0:
            raise ValueError("--sinks and --recent take 0 or more")
        if self.chunk < 1:
            raise ValueError(f"--chunk is {self.chunk}; 1 or more is accepted")


def main(config: FidelityConfig) -> int:
    from ..eval import CaseBuilder
    from ..eval.attention_coverage import attention_rows, examine
    from ..eval.perplexity import draw_documents, stream, stream_rows

    console = make_console()
    started = time.perf_counter()
    cells, gates, texts = _check(config)
    model, tokenizer = load_with_gates(config, gates, console)
    result: dict[str, Any] = {"stream": [], "attention": []}
    if config.documents:
        documents = draw_documents(tokenizer, texts, config.documents, config.length, config.seed)
        with _bar(console, "reading", config.documents * len(cells)) as advance:
            streamed = stream(
                model, documents, cells, gates, config.chunk, config.sinks, config.recent, progress=advance
            )
        result["stream"] = stream_rows(streamed)
        console.print(_stream_table(result["stream"]))
    evicting = [cell for cell in cells if cell.evicts]
    if config.cases and evicting:
        cases = CaseBuilder(tokenizer, texts, config.length, config.seed).cases(config.tasks, config.cases)
        with _bar(console, "attending", config.cases * len(config.tasks) * len(evicting)) as advance:
            examined = examine(model, cases, evicting, gates, config.sinks, config.recent, progress=advance)
        result["attention"] = attention_rows(examined)
        console.print(_attention_table(result["attention"]))
    result["settings"] = _settings(config, model, time.perf_counter() - started)
    console.print(f"[dim]{_save(config.out, result)}[/dim]")
    return 0


def _check(config: FidelityConfig) -> tuple[list[Cell], RetentionGates | None, list[str]]:
    """Validates the configuration, with a ValueError for whatever is wrong, before the model is loaded."""
    from ..eval import CaseBuilder, check_inputs, get_task, parse_cells
    from ..eval.harness.options import Options, check_config, find_config
    from ..retention import RetentionGates
    from ..training.assets import resolve_texts
    from .loading import find_gates

    tasks = config.tasks if config.cases else ()
    for task in tasks:
        get_task(task)
    cells = parse_cells(config.policies, config.budgets)
    if not config.documents and not any(cell.evicts for cell in cells):
        raise ValueError("--policies names nothing that evicts, and --documents 0 leaves nothing else to measure")
    if any(cell.prefill_chunk for cell in cells):
        raise ValueError("documents are read in chunks of --chunk tokens anyway: leave out the @CHUNK of --policies")
    gates = None
    if any("log_beta" in cell.policy.needs for cell in cells):
        gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    source, model_config = find_config(config.model, {})
    check_inputs(model_config, cells, config.length, gates, QUESTION_TOKENS)
    check_config(Options(policy="full"), gates, model_config, {})  # decoders only, and gates of the model's shape
    pick_device(config.device)
    texts = [document.text for document in resolve_texts(config.data, "eval")]
    if tasks:
        from transformers import AutoTokenizer

        builder = CaseBuilder(AutoTokenizer.from_pretrained(source), texts, config.length, config.seed)
        for task in tasks:
            builder.case(task, 0)  # refuses a length that cannot hold the task
    return cells, gates, texts


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar; the value of the `with` block is a callback that advances it and ignores its argument."""
    with progress_bar(console, name) as progress:
        task = progress.add_task(name, total=total)
        yield lambda _: progress.advance(task)


def _stream_table(rows: Sequence[dict[str, Any]]) -> Table:
    notes = "documents read in chunks with an eviction after each; means over documents with 95% bootstrap intervals"
    columns = ("kl", "KL, nats"), ("top1", "same top token"), ("perplexity", "perplexity"), (
        "perplexity_ratio", "to the full cache's",
    )  # fmt: skip
    return _table(f"{rows[0]['length']} tokens, {rows[0]['n']} documents", notes, rows, columns)


def _attention_table(rows: Sequence[dict[str, Any]]) -> Table:
    notes = (
        "coverage: share of the answer's attention to the context that is on kept entries; evidence: attention on the "
        "planted fact, and its difference to the full cache's; worst head: the least coverage of a case, on average; "
        "least: of all cases; outliers: heads of all cases with a coverage below ½"
    )
    columns = ("coverage", "coverage"), ("worst_head", "worst head"), ("least", "least"), ("outliers", "outliers"), (
        "evidence", "evidence",
    ), ("evidence_gain", "gain")  # fmt: skip
    title = f"{rows[0]['length']} tokens, {rows[0]['n']} cases a task, compressed before the question"
    return _table(title, notes, rows, columns)


def _table(title: str, notes: str, rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> Table:
    from rich import box
    from rich.table import Table

    from ..eval.cells import label
    from ..eval.summary import budget_text

    table = Table(title=title, caption=notes, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for name in ("task", "policy", "kept"):
        table.add_column(name, no_wrap=name != "task")
    for _, heading in columns:
        table.add_column(heading, justify="right", min_width=8)
    for row in rows:
        cells = [_interval_text(row[name]) if name in row else "" for name, _ in columns]
        table.add_row(row["task"], label(row["policy"], row["scope"]), budget_text(row["budget"]), *cells)
    return table


def _interval_text(found: dict[str, float] | float) -> str:
    if not isinstance(found, dict):
        return f"{found:.3f}" if isinstance(found, float) else f"{found:,}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _settings(config: FidelityConfig, model: Any, seconds: float) -> dict[str, Any]:
    return {
        "config": asdict(config) | {"out": str(config.out)},
        "model": model.config._name_or_path,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": run_versions() | {"python": platform.python_version()},
        "seconds": round(seconds, 1),
    }


def _save(folder: Path, result: dict[str, Any]) -> Path:
    from ..retention.checkpoint import write_atomic

    path = folder / "fidelity.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode())
    return path
