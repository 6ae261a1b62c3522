"""`tenure eval`: lm-eval's own command line, with the model type `tenure` and the generated long-context tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .help_layout import fitted_help

HELP_FLAGS = ("-h", "--help")
HELP = """usage: tenure eval [lm-eval's ARGUMENTS]

{docstring}

--model_args in addition to those of lm-eval's own `hf`:
  pretrained=NAME       Hub id, local folder, or `demo` (SmolLM2-135M-Instruct)
  policy=NAME           eviction policy (default: retention); `full` matches lm-eval's `hf` to the last digit
  budget=0.2            share of the tokens to keep, entries per head (256), or bytes (512MiB)
  scope=NAME            which entries compete: head, layer, global, pyramid, preference (default: the policy's)
  gates=PATH            gates, for the retention policies: a folder, demo for the shipped ones, or hub:OWNER/NAME
  prefill_chunk=N       process contexts in chunks of N tokens, with an eviction after each
  preset=NAME           evict as a released code does: defensivekv, trimkv, dbtrimkv, kvpress
  sinks, recent         protected first and last tokens (default: the policy's)
  schedule=once         bounded: evict again after every `buffer` (128) tokens that are written
  floor=0.2             share of a head's own budget that other heads cannot take (default: the policy's)
  question=auto         agnostic: compress before the question is read; aware: after it; auto: as the task says
  question_field=NAME   with question=agnostic, for tasks that do not mark it: the field whose text begins the question
  question_pattern=REGEX  the same: its last match in the prompt begins the question

--metadata for the generated tasks:
  length=4096 cases=100 seed=0 texts=demo|pydoc|PATH

generated tasks (each also as NAME_aware): {tasks}

lm-eval's own help:
"""


@dataclass(frozen=True)
class LmEvalArguments:
    """Run lm-eval under a KV-cache budget: `--model tenure`, its own tasks and the generated ones, all its flags."""

    arguments: tuple[str, ...] = ()


def parse(arguments: Sequence[str], prog: str) -> LmEvalArguments:
    """Passes all arguments on to lm-eval, which defines the flags and reports errors."""
    return LmEvalArguments(tuple(arguments))


def main(config: LmEvalArguments) -> int:
    from ..eval.harness.command import run
    from ..eval.harness.generated_tasks import task_names

    arguments = config.arguments or ("--help",)
    if not any(flag in arguments for flag in HELP_FLAGS):
        _show(run(arguments))
        return 0
    with fitted_help(arguments, whole=True):
        if len(arguments) == 1:
            names = ", ".join(name for name in task_names() if not name.endswith("_aware"))
            print(HELP.format(docstring=LmEvalArguments.__doc__, tasks=names))
            arguments = ("run", "--help")
        run(arguments)
    return 0


def _show(models: Sequence[Mapping[str, Any]]) -> None:
    """A table below lm-eval's own, which does not say what was evicted."""
    for found in models:
        if not found["contexts"]:
            continue
        rows = {
            "policy": f"{found['policy']} ({found['scope']}), budget {found['budget']}, {found['schedule']}",
            "preset": found["preset"] or "none",
            "kept of the contexts": f"{found['kept_share']:.1%} of {found['contexts']:,}",
            "memory": f"{found['bytes'] / 1e6:.1f} MB, at most {found['peak_bytes'] / 1e6:.1f} MB in one batch",
        }
        width = max(map(len, rows))
        print("\n".join(f"|{name:<{width}}|{value}|" for name, value in rows.items()), flush=True)
