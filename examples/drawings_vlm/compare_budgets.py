"""Full cache, budget per head and global budget on pictures and notes: `compare_budgets.py MODEL GATES --count 24`.

Prints, by the modality of the asked item, the share of right answers, the KL to the full cache, both with 95 %
intervals, and what was kept of the entries of images and of text. Three tasks ask about a picture and one about a note,
which has three times as many cases, so that both modalities have equally many.

Records go to a JSONL file as they are made; `--table FILE` prints the table of such a file again, and of several that
were joined, with seeds of their own. `--against FILE` prints what these gates change against those of the other file,
paired by case.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tenure.eval.cells import parse_cells
from tenure.eval.intervals import bootstrap_mean, paired_bootstrap, wilson
from tenure.eval.runner import evaluate
from tenure.eval.tasks.picture_tasks import PICTURE_TASKS, PictureCases
from tenure.eviction import kept_by_modality, modality_ranges
from tenure.retention import RetentionGates
from tenure.scripts.loading import load_model, load_processor
from tenure.training.assets import resolve_texts

BUDGETS = (0.5, 0.2, 0.1)
CASES = {name: 3 if name == "mixed_note" else 1 for name in PICTURE_TASKS}  # of each task, to one of the others
MODALITIES = {"a picture": [name for name in PICTURE_TASKS if name != "mixed_note"], "a note": ["mixed_note"]}
Rows = list[dict[str, Any]]


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    processor = load_processor(options.model)
    model, tokenizer = load_model(options.model, "cpu", "bfloat16")
    gates = RetentionGates.from_pretrained(options.gates, model)
    texts = [document.text for document in resolve_texts("demo", "eval")]
    builder = PictureCases(processor, texts, filler=options.filler, seed=options.seed)
    cases = (
        builder.case(task, index * times + again)
        for index in range(options.count) for task, times in CASES.items() for again in range(times)
    )  # fmt: skip
    kept: dict[tuple[str, float], dict[str, float]] = {}

    def inspect(case: Any, cell: Any, cache: Any) -> None:
        ranges = modality_ranges(model.config, torch.tensor(case.context_ids))[0]
        kept[cell.scope, cell.budget] = {one.modality: one.kept_share for one in kept_by_modality(cache, ranges)}

    with options.records.open("w") as file:

        def write(record: Any) -> None:
            file.write(json.dumps(record.to_dict() | {"kept": kept[record.scope, record.budget]}) + "\n")
            file.flush()

        cells = parse_cells(["full", "retention:head", "retention:global"], BUDGETS)
        evaluate(model, tokenizer, cases, cells, gates, progress=write, inspect=inspect, together=3)


def case_of(record: dict[str, Any]) -> tuple[str, int, int]:
    return record["task"], record["seed"], record["index"]


def by_cell(records: Rows) -> dict[str, dict[tuple[str, float], Rows]]:
    """For each modality the records of each scope and budget, of the cases that have all of them, in the same order."""
    cells = sorted({(r["scope"], r["budget"]) for r in records}, key=lambda cell: (cell[0] != "none", -cell[1], cell))
    done: dict[Any, int] = {}
    for r in records:
        done[case_of(r)] = done.get(case_of(r), 0) + 1
    whole = [r for r in records if done[case_of(r)] == len(cells)]
    whole.sort(key=case_of)
    return {
        name: {cell: [r for r in whole if r["task"] in tasks and (r["scope"], r["budget"]) == cell] for cell in cells}
        for name, tasks in MODALITIES.items()
    }


def table(records: Rows) -> str:
    """The records as Markdown."""
    lines = [
        "| asked about | cases | budget | scope | right | KL to the full cache | images kept | text kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cells in by_cell(records).items():
        for (scope, budget), rows in cells.items():
            right = wilson(sum(r["correct"] for r in rows), len(rows))
            kl = bootstrap_mean([r["kl"] for r in rows])
            images, text = (sum(r["kept"][kind] for r in rows) / len(rows) for kind in ("image", "text"))
            lines.append(
                f"| {name} | {len(rows)} | {budget:.0%} | {'full' if scope == 'none' else scope} | {right.value:.0%} "
                f"({right.low:.0%} to {right.high:.0%}) | {kl.value:.3f} ({kl.low:.3f} to {kl.high:.3f}) | "
                f"{images:.0%} | {text:.0%} |"
            )
    return "\n".join(lines)


def changes(records: Rows, before: Rows) -> str:
    """`records` minus `before`, paired by case, as Markdown."""
    lines = ["| asked about | cases | budget | scope | right, points | KL |", "|---|---|---|---|---|---|"]
    old, new = by_cell(before), by_cell(records)
    for name, cells in new.items():
        for cell, rows in cells.items():
            others = {case_of(r): r for r in old[name].get(cell, [])}
            pairs = [(r, others[case_of(r)]) for r in rows if case_of(r) in others]
            if cell[0] == "none" or not pairs:
                continue

            def difference(value: Callable[[dict[str, Any]], float], pairs: Any = pairs) -> Any:
                return paired_bootstrap(*([value(r) for r in side] for side in zip(*pairs, strict=True)))

            right, kl = difference(lambda r: 100.0 * r["correct"]), difference(lambda r: r["kl"])
            lines.append(
                f"| {name} | {len(pairs)} | {cell[1]:.0%} | {cell[0]} | {right.value:+.0f} ({right.low:+.0f} to "
                f"{right.high:+.0f}) | {kl.value:+.3f} ({kl.low:+.3f} to {kl.high:+.3f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("gates", nargs="?", default="examples/smollm2-135m-gates")
    parser.add_argument("--count", type=int, default=24, help="cases of each task about a picture")
    parser.add_argument("--filler", type=int, default=2, help="sentences between two items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, default=Path("records.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    if options.table is None:
        measure(options)
    files = [options.table or options.records, *([options.against] if options.against else [])]
    given = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    print(table(given[0]))
    if options.against:
        print("\n" + changes(*given))


if __name__ == "__main__":
    main()
