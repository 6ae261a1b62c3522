"""`tenure bench decode`: decoding speed with a fifth of the cache kept, against full cache, floor and kvpress."""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..output import OutputFile, Python, write_rows
from .benching import BenchRow, alternate, essay_prompts, median_ratio, show

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ...eviction import RaggedCache
    from ...eviction.session import Session
    from ...retention import RetentionGates


@dataclass(frozen=True)
class DecodePoint:
    """One measurement: context, batch and dtype, and the target speed-up over the full cache, if there is one."""

    context: int
    batch: int
    dtype: str
    aim: float | None = None

    @property
    def name(self) -> str:
        return f"decode/ctx{self.context}/b{self.batch}" + ("/fp32" if self.dtype == "float32" else "")


POINTS = (
    DecodePoint(1024, 1, "bfloat16", 1.2),
    DecodePoint(4096, 1, "bfloat16", 2.0),
    DecodePoint(4096, 4, "bfloat16", 2.5),
    DecodePoint(4096, 1, "float32", 1.15),
    DecodePoint(4096, 4, "float32", 2.0),
    DecodePoint(16384, 1, "bfloat16"),
    DecodePoint(16384, 4, "bfloat16"),
    DecodePoint(16384, 1, "float32"),
    DecodePoint(16384, 4, "float32"),
)
KVPRESS = DecodePoint(4096, 1, "bfloat16", 1.5)
FLOOR_AIM = 0.9  # of the floor's speed
READ_BYTES = 2**28  # read to measure the memory's bandwidth; far more than caches hold


@dataclass
class DecodeBenchConfig:
    """Time decoding from a compressed cache, against transformers' full cache and against the floor.

    All sides decode greedily, in alternation; caches hold the same essays. The floor (rows `…/of_floor`) is the time of
    the same model's steps from an empty cache, plus the time to read the kept keys and values once at the memory
    bandwidth measured in the same run: what no cache of these entries could beat. How many times the full cache's speed
    a compressed one reaches depends on the CPU, the share of the floor's speed much less.

    Prompts are computed in float32 and their caches converted. Four rows of 16384 tokens are copies of one prompt.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo`."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default the gates shipped for the demo model."""
    share: float = 0.2
    """Share of the cache to keep."""
    threads: int = 1
    """CPU threads on each side."""
    runs: int = 5
    """Measured runs per side; medians are reported."""
    decode_tokens: int = 32
    """Tokens decoded per run."""
    kvpress_python: Python | None = None
    """Python of an environment with kvpress: adds a row against its AdaKV."""
    contexts: tuple[int, ...] = (1024, 4096, 16384)
    """Measure at these contexts only."""
    quick: bool = False
    """Measure at 1024 tokens only."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.threads, self.runs, self.decode_tokens) < 1:
            raise ValueError("--threads, --runs and --decode-tokens accept 1 or more")
        if not 0 < self.share < 1:
            raise ValueError(f"--share accepts a number between 0 and 1, got {self.share}")
        known = sorted({point.context for point in POINTS})
        if not set(self.contexts) <= set(known):
            raise ValueError(
                f"--contexts accepts {', '.join(map(str, known))}, got {' '.join(map(str, self.contexts))}"
            )


def main(config: DecodeBenchConfig) -> int:
    import torch

    from ...retention import RetentionGates
    from ..loading import find_gates, load_model

    torch.set_num_threads(config.threads)
    gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    model, tokenizer = load_model(config.model, "cpu", "float32")
    gates.check_model(model)
    tokens = essay_prompts(tokenizer, 1, 16384)[0]
    rows = []
    for context in (1024,) if config.quick else config.contexts:
        points = [point for point in POINTS if point.context == context]
        prompt = PromptStates.read(model, gates, split_prompts(tokens, context, max(point.batch for point in points)))
        for point in points:
            rows += decode_rows(model, gates, prompt.batched(point.batch), point, config)
        if config.kvpress_python is not None and context == KVPRESS.context:
            with kvpress_decoder(prompt.ids[:1], config) as peer:
                rows += decode_rows(model, gates, prompt.batched(1), KVPRESS, config, peer)
        del prompt
    title = f"{config.model}, {config.share:.0%} kept, {config.threads} threads, torch {torch.__version__}"
    show(rows, title)
    if config.json:
        write_rows(rows, config.json)
    return 0


def split_prompts(tokens: torch.Tensor, context: int, batch: int) -> torch.Tensor:
    """int64 `(up to batch, context)`: as many prompts of the length as `tokens` `(n,)` has, one after the other."""
    rows = min(batch, len(tokens) // context)
    return tokens[: rows * context].view(rows, context)


@dataclass(frozen=True)
class PromptStates:
    """A prompt's whole cache in float32, layer by layer: `(batch, heads, n, dim)`, log β `(batch, heads, n)`."""

    ids: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    log_beta: list[torch.Tensor]

    @classmethod
    def read(cls, model: PreTrainedModel, gates: RetentionGates, ids: torch.Tensor) -> PromptStates:
        from ...eviction import evict

        with evict(model, "full", gates=gates, observe=["retention"]) as session:
            cache = session.new_cache()
            session.extend(cache, ids, logits_to_keep=1)
        keys, values, log_beta = (
            [store.dense(store.buffers[name]) for store in cache.stores] for name in ("key", "value", "log_beta")
        )
        return cls(ids, keys, values, log_beta)

    def batched(self, batch: int) -> PromptStates:
        """The first `batch` prompts; if there is only one, copies of it."""
        rows = range(batch) if batch <= len(self.ids) else [0] * batch
        chosen = [[one[list(rows)] for one in several] for several in (self.keys, self.values, self.log_beta)]
        return PromptStates(self.ids[list(rows)], *chosen)

    def plain(self, config: Any, dtype: torch.dtype) -> Any:
        """As transformers' own cache."""
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(key.to(dtype), value.to(dtype), index)
        return cache

    def evicted(self, session: Session, dtype: torch.dtype) -> RaggedCache:
        """As a cache of `session`, which evicts when the prompt has been written."""
        cache = session.new_cache()
        batch, n = self.ids.shape
        cache.begin_step(batch, n, None, self.ids.device)
        for layer, key, value, log_beta in zip(cache.ragged, self.keys, self.values, self.log_beta, strict=True):
            cache.open_layer(layer.layer_idx, {"log_beta": log_beta})
            layer.update(key.to(dtype), value.to(dtype))
        cache.end_step(completed=True)
        return cache


def decode_rows(
    model: PreTrainedModel,
    gates: RetentionGates,
    prompt: PromptStates,
    point: DecodePoint,
    config: DecodeBenchConfig,
    kvpress: Callable[[], object] | None = None,
) -> list[BenchRow]:
    """Greedy decoding with retention under one global budget.

    Returns:
        The row against transformers' own cache and the row against the floor; with `kvpress` the row against it alone.
    """
    import torch
    from transformers import DynamicCache

    from ...eviction import evict

    dtype = getattr(torch, point.dtype)
    first, count = prompt.ids[:, -1:], config.decode_tokens
    with torch.no_grad():
        runner = copy.deepcopy(model).to(dtype)
        plain_runner = copy.deepcopy(runner, {id(weight): weight for weight in runner.parameters()})  # the same weights
        with evict(runner, "retention", config.share, gates=gates) as session:
            kept = prompt.evicted(session, dtype)
            sides: dict[str, Callable[[], object]] = {"ours": lambda: decode(runner, kept, first, count)}
            if kvpress is not None:
                sides["peer"] = kvpress
            else:
                plain, empty = prompt.plain(model.config, dtype), DynamicCache(config=model.config)
                memory = torch.ones(READ_BYTES // torch.float32.itemsize)
                sides["peer"] = lambda: decode(plain_runner, plain, first, count)
                sides["empty"] = lambda: decode(plain_runner, empty, first, count)
                sides["read"] = memory.sum
            del prompt
            seconds = alternate(sides, config.runs)
        stored = sum(store.entries * (store.key[0].nbytes + store.value[0].nbytes) for store in kept.stores)
    tokens = point.batch * count

    def row(name: str, peer: list[float], target: str) -> BenchRow:
        ours, other = (tokens / statistics.median(side) for side in (seconds["ours"], peer))
        return BenchRow(name, ours, other, median_ratio(peer, seconds["ours"]), "tokens/s", config.runs, target)

    target = "" if point.aim is None else f">= {point.aim} times the speed"
    if kvpress is not None:
        return [row(f"{point.name}/vs_kvpress", seconds["peer"], target)]
    reading = count * stored / READ_BYTES
    floor = [step + reading * read for step, read in zip(seconds["empty"], seconds["read"], strict=True)]
    return [
        row(point.name, seconds["peer"], target),
        row(f"{point.name}/of_floor", floor, f">= {FLOOR_AIM} of the floor's speed"),
    ]


def decode(model: Any, cache: Any, token: torch.Tensor, count: int) -> None:
    """Decodes `count` tokens greedily after `token` `(batch, 1)` and removes them again."""
    for _ in range(count):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    cache.crop(-count)


@contextlib.contextmanager
def kvpress_decoder(prompt: torch.Tensor, config: DecodeBenchConfig) -> Iterator[Callable[[], object]]:
    """A process with kvpress that has compressed `prompt` `(1, n)`; each call lets it decode once.

    Raises:
        ValueError: that Python does not run it; the message ends with the last line it wrote.
    """
    from ...training.assets import resolve_model

    job = {
        "model": str(resolve_model(config.model)),
        "prompt": prompt[0].tolist(),
        "share": config.share,
        "tokens": config.decode_tokens,
        "dtype": KVPRESS.dtype,
        "threads": config.threads,
    }
    script = Path(__file__).with_name("kvpress_decode.py")
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder, "job.json"), Path(folder, "errors")
        file.write_text(json.dumps(job))
        command = [str(config.kvpress_python), "-I", str(script), str(file)]
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None

            def answer() -> str:
                assert process.stdout is not None
                line = process.stdout.readline()
                if not line:
                    last = (errors.read_text().strip().splitlines() or ["no output"])[-1]
                    raise ValueError(f"--kvpress-python {config.kvpress_python} could not run kvpress: {last}")
                return line

            def once() -> str:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                return answer()

            try:
                answer()
                yield once
            finally:
                process.stdin.close()
                process.kill()
