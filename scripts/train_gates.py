"""Train retention gates: `accelerate launch scripts/train_gates.py --config examples/smollm2.yaml`.

Every setting in the config file is also a flag; flags override the file. `tenure train` does the same on one device.
Imports are absolute because accelerate runs this file as a script.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tyro

from tenure.scripts.output import make_console
from tenure.training.train_config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from tenure.retention import RetentionGates
    from tenure.training.data import ExampleSource

logger = logging.getLogger(__name__)


def parse(arguments: Sequence[str], prog: str) -> TrainConfig:
    """Flags override the values of `--config FILE`, which override the defaults.

    Raises:
        ValueError: the file is absent, not YAML, or names unknown settings.
    """
    rest, path = [], None
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--config":
            if not pending:
                raise ValueError("--config needs the path of a YAML file")
            path = pending.pop(0)
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    default = TrainConfig() if path is None else TrainConfig.from_yaml(path)
    summary = inspect.cleandoc(TrainConfig.__doc__ or "")
    description = f"{summary}\n\n--config FILE: a YAML file with these settings; flags override it."
    return tyro.cli(TrainConfig, prog=prog, args=rest, default=default, description=description)


def build_source(config: TrainConfig, tokenizer: Any) -> ExampleSource:
    """The training examples named by `config.data`.

    Raises:
        ValueError: no such data, or columns or lengths that cannot be used.
    """
    from tenure.training.assets import resolve_texts
    from tenure.training.batching import PackedSource
    from tenure.training.data import load_examples
    from tenure.training.synthetic import RetrievalDocuments

    if config.data == "synthetic":
        if config.pack:
            raise ValueError("pack is for data sets; synthetic documents are made at their full length already")
        texts = [document.text for document in resolve_texts(config.texts, "train")]
        return RetrievalDocuments(
            texts, tokenizer, lengths=config.lengths, seed=config.seed, facts=config.facts, questions=config.questions,
            group_share=config.group_share, text_share=config.text_share, prompt_share=config.prompt_share,
            dialogue_share=config.dialogue_share, repetition_share=config.repetition_share,
        )  # fmt: skip
    source = load_examples(
        config.data, tokenizer, max_length=max(config.lengths), min_length=max(2, config.min_length),
        format=config.format, loss_on=config.loss_on, split=config.split, seed=config.seed,
    )  # fmt: skip
    return PackedSource(source, max(config.lengths)) if config.pack else source


def build_evaluation(
    config: TrainConfig, tokenizer: Any
) -> Callable[[PreTrainedModel, RetentionGates], dict[str, float]] | None:
    """KL to the full cache and retrieval accuracy under real eviction, on held-out essays."""
    if not config.eval_every:
        return None
    from tenure.eval import RetrievalProbe
    from tenure.training.assets import resolve_texts

    texts = [document.text for document in resolve_texts(config.texts, "eval")]
    return RetrievalProbe(
        tokenizer, texts, length=config.eval_length, cases=config.eval_cases, budgets=config.eval_budgets
    )


def main(config: TrainConfig) -> int:
    import torch

    from tenure.scripts.loading import load_model
    from tenure.training import train

    dtype = config.dtype
    if dtype == "auto":  # for the device that accelerate moves the model to, not for the CPU it is loaded on
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model, tokenizer = load_model(config.model, device="cpu", dtype=dtype, revision=config.revision)
    source = build_source(config, tokenizer)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with _progress() as bar:
        task = bar.add_task("training", total=config.steps, losses="")

        def show(step: int, values: dict[str, float]) -> None:
            losses = f"quality {values['quality']:.3f}  capacity {values['capacity']:.3f}"
            bar.update(task, completed=step, losses=losses)

        train(config, model, source, pad_token_id, build_evaluation(config, tokenizer), show)
    _say(f"The gates are in {config.output_dir}/gates, the log in {config.output_dir}/metrics.jsonl.")
    return 0


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[losses]}"), console=make_console(stderr=True))


def _say(text: str) -> None:
    import os

    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


if __name__ == "__main__":
    from tenure.scripts.cli import run_config

    sys.exit(run_config("train_gates.py", lambda: main(parse(sys.argv[1:], "train_gates.py"))))
