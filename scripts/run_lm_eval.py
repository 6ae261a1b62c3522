"""`tenure eval`: lm-eval's own command line, with the model type `tenure` and the generated long-context tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HELP_FLAGS = ("-h", "--help")
HELP = """usage: tenure eval [lm-eval's ARGUMENTS]

{docstring}

what --model_args take beside those of lm-eval's own `hf`:
  pretrained=NAME        Hub id, local folder, or `demo` (SmolLM2-135M-Instruct)
  policy=NAME            who is evicted; `full` is lm-eval's `hf` to the last digit (default: retention)
  budget=0.2             share of the tokens that stays, entries per head (256), or text (512MiB)
  scope=NAME             who competes: head, layer, global, pyramid (default: the policy's)
  gates=PATH             trained gates, for retention
  prefill_chunk=N        read contexts in chunks of N tokens, with an eviction after each
  sinks, recent, buffer  tokens that always stay, and room for what is generated (4, 32, 128)
  floor=0.2              share of its own budget that no head loses to others (default: the policy's)
  question=auto          agnostic: compress before the question is read; aware: after; auto: what the task says
  question_field=NAME, question_pattern=REGEX
                         with question=agnostic: where the question begins in tasks that do not say so

what --metadata take for the generated tasks:
  length=4096 cases=100 seed=0 texts=demo|pydoc|PATH

generated tasks (each also as NAME_aware): {tasks}

lm-eval's own help:
"""


@dataclass(frozen=True)
class Config:
    """Run lm-eval under a KV-cache budget: `--model tenure`, its own tasks and the generated ones, all its flags."""

    arguments: tuple[str, ...] = ()


def parse(arguments: Sequence[str], prog: str) -> Config:
    """All arguments are lm-eval's: it has the flags and the last word on what is wrong."""
    return Config(tuple(arguments))


def main(config: Config) -> int:
    from ..eval.harness.command import run
    from ..eval.harness.generated_tasks import task_names

    arguments = config.arguments
    if not arguments or (len(arguments) == 1 and arguments[0] in HELP_FLAGS):
        names = ", ".join(name for name in task_names() if not name.endswith("_aware"))
        print(HELP.format(docstring=Config.__doc__, tasks=names), flush=True)
        arguments = ("run", "--help")
    run(arguments)
    return 0
