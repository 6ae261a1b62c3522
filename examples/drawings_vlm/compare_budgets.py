"""Full cache, budget per head and global budget on pictures and notes: `compare_budgets.py MODEL GATES --count 24`.

Prints the share of right answers and the KL to the full cache, by the modality of the asked item, with 95 % intervals.
Records go to a JSONL file as they are made; `--table FILE` prints the table of such a file again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tenure.eval.cells import parse_cells
from tenure.eval.intervals import bootstrap_mean, wilson
from tenure.eval.runner import evaluate
from tenure.eval.tasks.picture_tasks import PICTURE_TASKS, PictureCases
from tenure.retention import RetentionGates
from tenure.scripts.loading import load_model, load_processor
from tenure.training.assets import resolve_texts

BUDGETS = (0.5, 0.2, 0.1)


def measure(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    processor = load_processor(options.model)
    model, tokenizer = load_model(options.model, "cpu", "bfloat16")
    gates = RetentionGates.from_pretrained(options.gates, model)
    texts = [document.text for document in resolve_texts("demo", "eval")]
    builder = PictureCases(processor, texts, filler=options.filler, seed=options.seed)
    cases = (builder.case(task, index) for index in range(options.count) for task in PICTURE_TASKS)
    cells = parse_cells(["full", "retention:head", "retention:global"], BUDGETS)
    with options.records.open("w") as file:

        def write(record: Any) -> None:
            file.write(json.dumps(record.to_dict()) + "\n")
            file.flush()

        evaluate(model, tokenizer, cases, cells, gates, progress=write, together=3)


def table(records: list[dict[str, Any]]) -> str:
    """The records of cases that have all cells, as Markdown."""
    cells = sorted({(r["policy"] == "retention", r["scope"], -r["budget"]) for r in records})
    done: dict[Any, int] = {}
    for r in records:
        done[r["task"], r["index"]] = done.get((r["task"], r["index"]), 0) + 1
    whole = {case for case, count in done.items() if count == len(cells)}
    lines = ["| asked about | cases | budget | scope | right | KL to the full cache |", "|---|---|---|---|---|---|"]
    for name, tasks in (("a picture", [t for t in PICTURE_TASKS if t != "mixed_note"]), ("a note", ["mixed_note"])):
        for _, scope, budget in cells:
            rows = [
                r for r in records
                if r["task"] in tasks and (r["task"], r["index"]) in whole
                and (r["scope"], -r["budget"]) == (scope, budget)
            ]  # fmt: skip
            if not rows:
                continue
            right = wilson(sum(r["correct"] for r in rows), len(rows))
            kl = bootstrap_mean([r["kl"] for r in rows])
            kind = "full" if scope == "none" else scope
            lines.append(
                f"| {name} | {len(rows)} | {-budget:.0%} | {kind} | {right.value:.0%} ({right.low:.0%} to "
                f"{right.high:.0%}) | {kl.value:.3f} ({kl.low:.3f} to {kl.high:.3f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("gates", nargs="?", default="examples/smollm2-135m-gates")
    parser.add_argument("--count", type=int, default=24, help="cases of each task")
    parser.add_argument("--filler", type=int, default=2, help="sentences between two items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, default=Path("records.jsonl"))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table is None:
        measure(options)
    lines = (options.table or options.records).read_text().splitlines()
    print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
