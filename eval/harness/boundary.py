"""Finding the end of a prompt's context and the beginning of its question.

lm-eval hands a model the whole prompt as text, with the document it was made of. A question-agnostic model must know
where the question begins: everything before is compressed first. For a task, one of three rules gives it, tried in this
order: `question_field` or `question_pattern` in `--model_args`, the table `KNOWN` for tasks that lm-eval ships,
and fields `context` and `question` in the task's documents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

_INSTRUCTION = r"\n\nAnswer the question based on the given passages\."

# Tasks that lm-eval ships, by name or pattern: (kind, what begins the question). "field" names the document's field
# whose text begins it, "pattern" is a regular expression whose last match does.
KNOWN: tuple[tuple[str, str, str], ...] = (
    ("niah_*", "pattern", r"\nWhat (?:are all|is) the special magic"),
    ("ruler_vt", "pattern", r"\nQuestion: Find all variables"),
    ("ruler_cwe", "pattern", r"\nQuestion: What are the 10 most common words"),
    ("ruler_fwe", "pattern", r"\nQuestion: Do not provide any explanation\."),
    ("ruler_qa_*", "pattern", r"\n\nAnswer the question based on the given documents\."),
    ("longbench_gov_report*", "pattern", r"\n\nNow, write a one-page summary"),
    ("longbench_multi_news*", "pattern", r"\n\nNow, write a one-page summary"),
    ("longbench_vcsum*", "pattern", r"\n\n会议总结："),
    ("longbench_passage_count*", "pattern", r"\n\nPlease enter the final count"),
    ("longbench_lcc*", "pattern", r"Next line of code:"),
    ("longbench_hotpotqa*", "pattern", _INSTRUCTION),
    ("longbench_2wikimqa*", "pattern", _INSTRUCTION),
    ("longbench_musique*", "pattern", _INSTRUCTION),
    ("longbench_*", "field", "question"),
    ("longbench2_*", "pattern", r"\n\nWhat is the correct answer to this question:"),
    ("babilong_*", "field", "question"),
    ("infinitebench_code_run", "pattern", r"\n\nPlease give me the exact number of the return value"),
    ("infinitebench_code_debug", "pattern", r"\n\nWhich funtion has deliberate error\?"),
    ("infinitebench_longbook_choice*", "pattern", r"\n\nQuestion: "),
    ("infinitebench_longdialogue*", "pattern", r"\n\n---\n\nEnd of dialogue\."),
    ("infinitebench_*", "field", "input"),
)

FAMILIES = ("ruler", "longbench", "longbench2", "babilong", "infinitebench")  # lm-eval's groups of these tasks


@dataclass(frozen=True)
class Boundaries:
    """Finds the place where a prompt's question begins.

    Attributes:
        question: see `Options`.
        field, pattern: the user's rule for all tasks, at most one of them.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    question: str = "auto"
    field: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"question_pattern {self.pattern!r} is no regular expression: {error}") from None

    def agnostic(self, doc: Any) -> bool:
        """Whether the context of this document is compressed before its question is read."""
        if self.question != "auto":
            return self.question == "agnostic"
        return isinstance(doc, Mapping) and doc.get("aware") is False

    def find(self, prompt: str, doc: Any, task: str) -> int | None:
        """The index of the prompt's character where the question begins; None if the whole prompt is the context.

        Raises:
            ValueError: the task is to be question-agnostic and its prompt has no recognisable question.
        """
        if not self.agnostic(doc):
            return None
        kind, rule = self.rule(task, doc)
        if kind == "pattern":
            places = [match.start() for match in re.finditer(rule, prompt)]
            if places and places[-1] > 0:
                return places[-1]
            raise ValueError(f"task {task!r}: no context before a match of {rule!r} in its prompt; give another one")
        if not isinstance(doc, Mapping) or rule not in doc:
            names = ", ".join(sorted(doc)) if isinstance(doc, Mapping) else "none"
            raise ValueError(f"task {task!r} has no field {rule!r} to find the question by; its fields are {names}")
        text = str(doc[rule])
        # As it is, or as a chat template or the task has trimmed it.
        place = prompt.rfind(text) if text.strip() else -1
        place = prompt.rfind(text.strip()) if place < 0 and text.strip() else place
        if place <= 0:
            raise ValueError(f"task {task!r}: the text of its field {rule!r} is not found after a context")
        return place

    def rule(self, task: str, doc: Any) -> tuple[str, str]:
        """("field", name) or ("pattern", regular expression) for a task.

        Raises:
            ValueError: there is no rule for the questions of this task.
        """
        if self.field:
            return "field", self.field
        if self.pattern:
            return "pattern", self.pattern
        for name, kind, rule in KNOWN:
            if fnmatch(task, name):
                return kind, rule
        if isinstance(doc, Mapping) and {"context", "question"} <= set(doc):
            return "field", "question"
        raise ValueError(
            f"task {task!r} has no rule for where its question begins, which question=agnostic needs: add "
            "question_field=NAME or question_pattern=REGEX to --model_args"
        )
