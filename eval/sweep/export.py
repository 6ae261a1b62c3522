"""The cases of a sweep as a file, so that another program can run the same ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..cases import Case
from ..retrieval import CaseBuilder
from .units import Unit


def export_cases(
    path: Path, units: Iterable[Unit], builder: Callable[[int, int], CaseBuilder], tokenizer: Any
) -> int:
    """Writes one line a unit and returns how many; the file appears when all are written.

    A line has `task, length, seed, index`; `context_ids, question_ids, answer_ids`, what the model reads and the gold
    continuation, which is teacher-forced for the KL; `context, prompt_end, question`: the texts of the first two and
    the question alone; `answers, match`: what must be found in the generation, see `Case.score`; `max_new_tokens`; and
    `evidence`: token ranges of the planted facts. The ids are exact; the texts need not split into the same ids again.
    """
    builders: dict[tuple[int, int], CaseBuilder] = {}
    temporary = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for unit in units:
                place = unit.length, unit.seed
                if place not in builders:
                    builders[place] = builder(*place)
                line = case_line(builders[place].case(unit.task, unit.index), tokenizer)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def case_line(case: Case, tokenizer: Any) -> dict[str, Any]:
    """A case as plain values, see `export_cases`."""
    return {
        "task": case.task, "length": case.length, "seed": case.seed, "index": case.index,
        "context_ids": list(case.context_ids), "question_ids": list(case.question_ids),
        "answer_ids": list(case.answer_ids),
        "context": tokenizer.decode(case.context_ids), "prompt_end": tokenizer.decode(case.question_ids),
        "question": case.question, "answer": case.answer, "answers": list(case.answers or (case.answer,)),
        "match": case.match, "max_new_tokens": len(case.answer_ids) + case.extra_tokens,
        "evidence": [list(span) for span in case.facts],
    }  # fmt: skip
