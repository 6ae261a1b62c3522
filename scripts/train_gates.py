"""Train retention gates: `accelerate launch scripts/train_gates.py --config examples/smollm2.yaml`.

Every setting in the config file is also a flag; flags override the file. `tenure train` does the same on one device.
Imports are absolute because accelerate runs this file as a script.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tyro

from tenure.scripts.output import make_console
from tenure.training.train_config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedModel

    from tenure.retention import RetentionGates
    from tenure.training.data import DatasetSource, Example, ExampleSource

logger = logging.getLogger(__name__)
MAX_TEMPLATE_BYTES = 1 << 20


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


def build_source(config: TrainConfig, tokenizer: Any) -> tuple[ExampleSource, list[Example]]:
    """The training examples named by `config.data` or `config.mixture`, and those held out of them.

    Args:
        tokenizer: gets the chat template of `config.chat_template`.

    Raises:
        ValueError: no such data, or columns, weights or lengths that cannot be used; no such template.
    """
    from tenure.training.data import MixtureSource

    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)

    if config.concatenate:
        return _concatenated(config, tokenizer)
    if not config.mixture:
        return _one_source(config, config.data, tokenizer)
    sources: dict[str, ExampleSource] = {}
    weights = parse_mixture(config.mixture)
    held_out: list[Example] = []
    for name in weights:
        sources[name], held = _one_source(config, name, tokenizer)
        held_out += held
    return MixtureSource(sources, weights, config.seed), held_out


def read_template(path: str) -> str:
    """A chat template of a file.

    Raises:
        ValueError: it is absent, empty, too large, or no text.
    """
    from tenure.documents import file_bytes

    try:
        text = file_bytes(path, MAX_TEMPLATE_BYTES).decode()
    except FileNotFoundError:
        raise ValueError(f"no chat template at {path!r}") from None
    except UnicodeDecodeError:
        raise ValueError(f"got the chat template {path!r}, which is no text in UTF-8") from None
    if not text.strip():
        raise ValueError(f"got the chat template {path!r}, which is empty")
    return text


def parse_mixture(entries: Sequence[str]) -> dict[str, float]:
    """Weights by data, of WEIGHT:DATA entries.

    Raises:
        ValueError: an entry of another form, a weight that is not positive, or data that is named twice.
    """
    weights: dict[str, float] = {}
    for entry in entries:
        text, _, name = entry.partition(":")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"got {entry!r} in the mixture; accepted: WEIGHT:DATA, such as 0.7:chat.jsonl")
        if name in weights:
            raise ValueError(f"got {name} twice in the mixture; accepted: every data set once")
        weights[name] = weight
    return weights


def _one_source(config: TrainConfig, data: str, tokenizer: Any) -> tuple[ExampleSource, list[Example]]:
    from tenure.training.assets import resolve_texts
    from tenure.training.batching import PackedSource
    from tenure.training.synthetic import RetrievalDocuments

    if data == "synthetic":
        if config.pack and not config.mixture:
            raise ValueError("pack is for data sets; synthetic documents are made at their full length already")
        texts = [document.text for document in resolve_texts(config.texts, "train")]
        documents = RetrievalDocuments(
            texts, tokenizer, lengths=config.lengths, seed=config.seed, facts=config.facts, questions=config.questions,
            group_share=config.group_share, text_share=config.text_share, prompt_share=config.prompt_share,
            dialogue_share=config.dialogue_share, repetition_share=config.repetition_share,
        )  # fmt: skip
        return documents, []
    if config.images:
        from tenure.scripts.loading import load_processor
        from tenure.training.image_chats import load_image_chats

        images = load_image_chats(
            data, load_processor(config.model, config.revision), max_length=max(config.lengths),
            prompt_share=config.prompt_share, seed=config.seed, bad_records=config.bad_records,
        )  # fmt: skip
        return images.held_out(config.held_out) if config.held_out else (images, [])
    if config.stream:
        return _stream(config, data, tokenizer)
    source, held_out = _data_set(config, data, tokenizer)
    return (PackedSource(source, max(config.lengths)) if config.pack else source), held_out


def _concatenated(config: TrainConfig, tokenizer: Any) -> tuple[ExampleSource, list[Example]]:
    from tenure.training.batching import PackedSource
    from tenure.training.data import ConcatenatedSource

    if "synthetic" in config.concatenate or len(set(config.concatenate)) < len(config.concatenate):
        raise ValueError(
            f"got {', '.join(config.concatenate)} to concatenate; accepted: different data sets, without synthetic "
            "documents, which have no end (see mixture)"
        )
    parts: list[DatasetSource] = []
    held_out: list[Example] = []
    for data in config.concatenate:
        part, held = _data_set(config, data, tokenizer)
        parts.append(part)
        held_out += held
    source = ConcatenatedSource(parts, config.seed)
    return (PackedSource(source, max(config.lengths)) if config.pack else source), held_out


def _data_set(config: TrainConfig, data: str, tokenizer: Any) -> tuple[DatasetSource, list[Example]]:
    """One data set, and the examples held out of it."""
    from tenure.training.data import load_examples

    source = load_examples(data, tokenizer, workers=config.data_workers, **_reading(config))
    return source.held_out(config.held_out) if config.held_out else (source, [])


def _stream(config: TrainConfig, data: str, tokenizer: Any) -> tuple[ExampleSource, list[Example]]:
    """One data set as a stream, and the examples held out of it."""
    from tenure.training.streaming import stream_examples

    source = stream_examples(data, tokenizer, buffer=config.stream_buffer, pack=config.pack, **_reading(config))
    return source.held_out(config.held_out) if config.held_out else (source, [])


def _reading(config: TrainConfig) -> dict[str, Any]:
    """The settings of one data set, as `load_examples` and `stream_examples` take them."""
    names = ("format", "loss_on", "split", "seed", "overlong", "columns", "bad_records", "keep_thoughts")
    settings = {name: getattr(config, name) for name in names}
    return settings | {"max_length": max(config.lengths), "min_length": max(2, config.min_length)}


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
    from tenure.training.launch import RUN_AGAIN, TrainingInterrupted, loading, with_launcher

    config = with_launcher(config)  # first: what it refuses needs neither model nor data
    if config.chat_template is not None:
        read_template(config.chat_template)
    try:
        with loading():
            import torch

            from tenure.scripts.loading import load_model
            from tenure.training import train

            dtype = config.dtype
            if dtype == "auto":  # for the device that accelerate moves the model to, not for the CPU it is loaded on
                dtype = "bfloat16" if torch.cuda.is_available() else "float32"
            model, tokenizer = load_model(config.model, device="cpu", dtype=dtype, revision=config.revision)
            source, held_out = build_source(config, tokenizer)
            pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            evaluation = build_evaluation(config, tokenizer)
        with progress_of(config) as show:
            train(config, model, source, pad_token_id, evaluation, show, held_out)
    except TrainingInterrupted as interrupted:
        _say(f"{interrupted} (exit status {RUN_AGAIN}).")
        return RUN_AGAIN
    _say(f"The gates are in {config.output_dir}/gates, the log in {config.output_dir}/metrics.jsonl.")
    return 0


@contextmanager
def progress_of(config: TrainConfig) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that shows steps: a bar on a terminal, else a line every `log_seconds`; called by rank 0 only."""
    if sys.stderr.isatty() and _rank() == 0:
        with _bar() as bar:
            task = bar.add_task("training", total=config.last_step, losses="")
            yield lambda step, values: bar.update(task, completed=step, losses=_losses(values))
    else:
        yield LogLines(config.last_step, config.log_seconds)


class LogLines:
    """Prints a line on stderr at the first step, the last one, and every so many seconds.

    Args:
        last_step: the end of the run.
        seconds: between lines.
        clock: seconds; replaced in tests.
    """

    def __init__(self, last_step: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.last_step, self.seconds, self.clock = last_step, seconds, clock
        self.first: tuple[int, float] | None = None  # the step and time that the speed is measured from
        self.printed_at = -math.inf

    def __call__(self, step: int, values: dict[str, float]) -> None:
        now = self.clock()
        if self.first is None:
            self.first = (step, now)
        if now - self.printed_at < self.seconds and step < self.last_step:
            return
        self.printed_at = now
        done, passed = step - self.first[0], now - self.first[1]
        left = f", {_duration((self.last_step - step) * passed / done)} to go" if done and passed else ""
        print(f"step {step} of {self.last_step}: {_losses(values)}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _losses(values: dict[str, float]) -> str:
    return f"quality {values['quality']:.3f}  capacity {values['capacity']:.3f}"


def _bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[losses]}"), console=make_console(stderr=True))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    from tenure.scripts.cli import run_config

    sys.exit(run_config("train_gates.py", lambda: main(parse(sys.argv[1:], "train_gates.py"))))
