"""`tenure turns`: several questions or turns on one context whose cache is kept (SCBench, LongMemEval, MMDU)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .loading import Dtype, load_with_gates, pick_device, progress_bar, run_versions
from .output import OutputFolder, make_console

if TYPE_CHECKING:
    from rich.table import Table

    from ..eval import Cell
    from ..eval.turns import Protocol
    from ..retention import RetentionGates

POLICIES = ("full", "retention", "layer_defensive", "layer_defensive(mass=0)", "snapkv")
ROOM = 512  # tokens of the model's context that turns may take beyond the context, in the first check


@dataclass
class TurnsConfig:
    """Ask several questions on one context, whose cache is compressed and kept.

    SOURCE is a family of generated conversations (kv: SCBench's retrieval of values; sessions: LongMemEval's dated
    chats; album: MMDU's dialogue, its pictures described in words) or a released file of SCBench (scbench_kv.jsonl), of
    LongMemEval (longmemeval_s.json) or of MMDU without images. A table is printed; turns.jsonl in `--out` has every
    answer, and hypotheses-N.jsonl, for LongMemEval's own judge, those of cell N.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A family (kv, sessions, album) or a file."""
    format: Literal["scbench", "longmemeval", "mmdu"] | None = None
    """The file's format; by default by its name."""
    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, downloaded once)."""
    gates: str | None = None
    """Trained gates: a folder or Hub id; by default the gates shipped for the demo model."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY[:SCOPE] ...")] = POLICIES
    """Policies to compare, with options if any."""
    budgets: Annotated[tuple[int | float, ...], tyro.conf.arg(metavar="BUDGET ...")] = (0.2,)
    """Shares of the cache to keep (0.2), or whole numbers: entries per head (256)."""
    questions: Literal["turns", "shared"] = "turns"
    """In turns, each of which sees those before it; or each on its own copy of the shared context."""
    history: Literal["gold", "own"] | None = None
    """Answers in the history: gold, or the model's own; by default own for album and MMDU."""
    compress: Literal["once", "each"] | None = None
    """Compress once, behind the context, or at each end of a turn; by default each for album and MMDU."""
    length: int = 1024
    """Tokens of a generated context."""
    turns: int = 5
    """Turns of a generated conversation; the first so many of a file's."""
    conversations: int = 10
    """Generated conversations, or the first so many of a file."""
    texts: str = "demo"
    """Filler of generated conversations: `demo` (held-out essays), a text file or a folder."""
    seed: int = 0
    """Seed of generated conversations."""
    out: OutputFolder = Path("runs/turns")
    """Folder for turns.jsonl."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""

    def __post_init__(self) -> None:
        if min(self.turns, self.conversations, self.length) < 1:
            raise ValueError("--turns, --conversations and --length take 1 or more")
        if not self.policies or not self.budgets:
            raise ValueError("--policies and --budgets take one or more values each")

    @property
    def protocol(self) -> Protocol:
        from ..eval.turns import Protocol

        dialogue = self.questions == "turns" and (self.source == "album" or self.format == "mmdu")
        history = self.history or ("own" if dialogue else "gold")
        return Protocol(self.questions, history, self.compress or ("each" if dialogue else "once"))


def main(config: TurnsConfig) -> int:
    from ..eval.turns import TurnRecord, run_turns, turn_rows

    console = make_console()
    started = time.perf_counter()
    cells, gates, conversations = _check(config)
    config.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_with_gates(config, gates, console)
    total = len(cells) * sum(len(conversation.turns) for conversation in conversations)
    with (config.out / "turns.jsonl").open("w", encoding="utf-8") as file, progress_bar(console, "asking") as progress:
        task = progress.add_task("asking", total=total)

        def done(record: TurnRecord) -> None:
            file.write(json.dumps(record.to_dict()) + "\n")
            progress.advance(task)

        records = run_turns(model, tokenizer, conversations, cells, gates, config.protocol, progress=done)
    for row, cell in enumerate(cells):
        mine = [one for one in records if (one.policy, one.scope, one.budget) == cell.key]
        lines = [json.dumps({"question_id": one.conversation, "hypothesis": one.prediction}) for one in mine]
        (config.out / f"hypotheses-{row}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(_table(config, turn_rows(records), turn_rows(records, by_turn=True)))
    settings = {
        "config": asdict(config) | {"out": str(config.out)}, "protocol": asdict(config.protocol),
        "cells": [cell.key for cell in cells], "model": model.config._name_or_path, "versions": run_versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    (config.out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return 0


def _check(config: TurnsConfig) -> tuple[list[Cell], RetentionGates | None, list[Any]]:
    """Validates the configuration, with a ValueError for whatever is wrong, before the model is loaded."""
    from dataclasses import replace

    from transformers import AutoTokenizer

    from ..eval import check_inputs, parse_cells
    from ..eval.harness.options import Options, check_config, find_config
    from ..eval.turns import FAMILIES, ConversationBuilder, read_conversations
    from ..retention import RetentionGates
    from ..training.assets import resolve_texts
    from .loading import find_gates

    _ = config.protocol
    if config.source not in FAMILIES and not Path(config.source).is_file():
        raise ValueError(f"got {config.source!r}; accepted: {', '.join(FAMILIES)}, or a file")
    cells = parse_cells(config.policies, config.budgets)
    gates = None
    if any("log_beta" in cell.policy.needs for cell in cells):
        gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    source, model_config = find_config(config.model, {})
    check_config(Options(policy="full"), gates, model_config, {})
    pick_device(config.device)
    if config.source in FAMILIES:
        check_inputs(model_config, cells, config.length, gates, ROOM)
        texts = [document.text for document in resolve_texts(config.texts, "eval")]
        builder = ConversationBuilder(
            AutoTokenizer.from_pretrained(source), texts, config.length, config.turns, config.seed
        )
        return cells, gates, [builder.conversation(config.source, index) for index in range(config.conversations)]
    check_inputs(model_config, cells, 1, gates, ROOM)
    found = read_conversations(config.source, config.format)[: config.conversations]
    return cells, gates, [replace(one, turns=one.turns[: config.turns]) for one in found]


def _table(config: TurnsConfig, rows: Sequence[dict[str, Any]], by_turn: Sequence[dict[str, Any]]) -> Table:
    from rich import box
    from rich.table import Table

    from ..eval.cells import label
    from ..eval.summary import budget_text

    protocol = config.protocol
    notes = "mean score of all turns with the 95% bootstrap interval over conversations, then of each turn"
    title = (
        f"{config.source}: {rows[0]['n']} conversations; questions {protocol.questions}, history {protocol.history}, "
        f"compressed {protocol.compress}"
    )
    table = Table(title=title, caption=notes, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    turns = sorted({row["turn"] for row in by_turn})
    for name in ("policy", "kept", "score", *(f"turn {turn + 1}" for turn in turns), "entries held"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    cell = ("source", "policy", "scope", "budget")
    for row in rows:
        own = [one for one in by_turn if all(one[name] == row[name] for name in cell)]
        found = {one["turn"]: f"{one['score']:.2f}" for one in own}
        table.add_row(
            label(row["policy"], row["scope"]), budget_text(row["budget"]),
            f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", *(found.get(turn, "") for turn in turns),
            f"{row['kept_share']:.1%}",
        )  # fmt: skip
    return table
