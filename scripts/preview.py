"""`tenure preview`: the examples that `tenure train` would train on, with the same flags and files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tenure.training.train_config import TrainConfig

from .output import make_console
from .train_gates import build_source
from .train_gates import parse as parse_train

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tenure.training.data import Example

SAMPLE = 256  # examples that the numbers of the table are taken over, at most
SAMPLE_TOKENS = 4_000_000  # after which no further one is read
SHOWN = 2  # examples that are printed
SHOWN_TOKENS = 400  # of each, from its start

__all__ = ["TrainConfig", "main", "parse"]


def parse(arguments: Sequence[str], prog: str) -> TrainConfig:
    """The settings of `tenure train`, which are also those of the preview."""
    return parse_train(arguments, prog)


def main(config: TrainConfig) -> int:
    from ..training.data import example_names
    from .loading import load_tokenizer

    tokenizer = load_tokenizer(config.model, config.revision)
    source, held_out = build_source(config, tokenizer)
    examples, names, tokens = [], [], 0
    while len(examples) < SAMPLE and tokens < SAMPLE_TOKENS:
        number = len(examples)
        examples.append(source[number])
        if number < SHOWN:  # names are asked for as the examples are read: a stream would have to begin again
            names.append(example_names(source, [number]) or examples[-1].kind)
        tokens += len(examples[-1].input_ids)
    console = make_console()
    console.print(summary(config, source, examples, len(held_out)))
    for number, (name, example) in enumerate(zip(names, examples, strict=False)):
        console.rule(f"example {number}: {name}", align="left")
        console.print(marked(example, tokenizer))
    return 0


def summary(config: TrainConfig, source: Any, examples: Sequence[Example], held_out: int) -> Table:
    """Numbers of the first examples, and of the whole data where it has an end.

    Warnings about cut, short and faulty documents come from reading the data.
    """
    from rich.table import Table

    from tenure.training.batching import PackedSource
    from tenure.training.data import MixtureSource
    from tenure.training.streaming import StreamedSource

    lengths = [len(example.input_ids) for example in examples]
    targets = [sum(example.loss_mask) for example in examples]
    longest = max(config.lengths)
    rows: list[tuple[str, str]] = []
    whole = ", ".join(config.concatenate) or config.data
    for name, part in (source.sources if isinstance(source, MixtureSource) else {whole: source}).items():
        inner: Any = getattr(part, "source", part)  # of a packed source
        if hasattr(inner, "epoch_lengths"):
            tokens = sum(inner.epoch_lengths(0))
            rows.append((f"{name}: examples, tokens an epoch", f"{len(inner):,}, {tokens:,}"))
        if isinstance(part, PackedSource):
            fill = sum(inner.epoch_lengths(0)) / (part.rows(0) * part.length)
            rows.append((f"{name}: packed rows an epoch, their fill", f"{part.rows(0):,}, {fill:.1%}"))
        if isinstance(part, StreamedSource):
            rows.append((f"{name}: examples, tokens an epoch", "not counted, as it is streamed"))
    if held_out:
        rows.append(("held-out examples", f"{held_out:,}"))
    rows += [
        (f"tokens of an example: least, median, most (first {len(examples)})",
         f"{min(lengths):,}, {statistics.median(lengths):,.0f}, {max(lengths):,}"),
        ("of them targets", f"{sum(targets) / sum(lengths):.1%}"),
        (f"of the longest length, {longest:,}", f"{statistics.mean(lengths) / longest:.1%}"),
    ]  # fmt: skip
    table = Table("training data", "", title=None)
    for row in rows:
        table.add_row(*row)
    return table


def marked(example: Example, tokenizer: Any, tokens: int = SHOWN_TOKENS) -> Text:
    """The first tokens of an example as text: targets in bold green, a gap between packed documents."""
    from rich.text import Text

    text = Text()
    place = 0
    while place < min(tokens, len(example.input_ids)):
        stop = place + 1
        while stop < len(example.input_ids) and example.loss_mask[stop] == example.loss_mask[place] and not (
            _begins(example, stop)
        ):
            stop += 1
        if place and _begins(example, place):
            text.append("\n⸻\n", style="dim")
        shown = tokenizer.decode(example.input_ids[place : min(stop, tokens)])
        text.append(shown, style="bold green" if example.loss_mask[place] else "")
        place = stop
    if len(example.input_ids) > tokens:
        text.append(f" … {len(example.input_ids) - tokens:,} more tokens", style="dim")
    return text


def _begins(example: Example, place: int) -> bool:
    return example.position_ids is not None and example.position_ids[place] == 0
