"""`tenure bench train`: time gated attention, a training step and decoding under eviction against peers."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..output import OutputFile, write_rows
from .benching import BenchRow, alternate, median_ratio, show

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2-135M
Clock = Callable[[], float]


@dataclass
class TrainBenchConfig:
    """Time gated attention, a training step, and decoding under eviction; print a table of ratios."""

    model: str = "demo"
    """Model of the step and decode rows: Hub id, local folder, or `demo`."""
    threads: int = 2
    """CPU threads of torch."""
    runs: int = 5
    """Measured runs per side; medians are reported."""
    decode_tokens: int = 32
    """Tokens decoded per run."""
    cpu_time: bool = False
    """Count CPU seconds of this process instead of wall time, for a machine that others use; needs --threads 1."""
    quick: bool = False
    """Skip slow rows: memory above 4096 tokens, decoding at 4096 tokens."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.threads, self.runs, self.decode_tokens) < 1:
            raise ValueError("--threads, --runs and --decode-tokens accept 1 or more")
        if self.cpu_time and self.threads > 1:
            raise ValueError(f"got --cpu-time with --threads {self.threads}; accepted: --threads 1")


def main(config: TrainBenchConfig) -> int:
    import torch

    from ..loading import load_model

    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    clock = time.process_time if config.cpu_time else time.perf_counter
    rows = attention_rows(2048, config.runs, clock)
    rows += memory_rows((1024, 2048, 4096) if config.quick else (1024, 2048, 4096, 8192, 16384))
    model, tokenizer = load_model(config.model, dtype="auto")
    rows += step_rows(model, tokenizer, 1024, config.runs, clock)
    for context in (1024,) if config.quick else (1024, 4096):
        rows.append(decode_row(model, context, config.decode_tokens, config.runs, clock))
    unit = "CPU seconds" if config.cpu_time else "seconds"
    what = f"{config.model}, {config.threads} threads, torch {torch.__version__}"
    show(rows, f"{what}; {unit}, medians of {config.runs} runs")
    if config.json:
        write_rows(rows, config.json)
    return 0


def _attention_inputs(seq_len: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    import torch

    shapes = (heads, kv_heads, kv_heads)
    tensors = [torch.randn(1, h, seq_len, HEAD_DIM, requires_grad=True) for h in shapes]
    return [*tensors, (-0.01 * torch.rand(1, kv_heads, seq_len)).requires_grad_()]


def _forward_backward(seq_len: int, implementation: str, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Callable:
    """One forward and backward of gated attention, or of plain causal attention (`sdpa`), fp32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from ...retention import gated_attention

    query, key, value, log_beta = _attention_inputs(seq_len, heads, kv_heads)
    leaves = [query, key, value] if implementation == "sdpa" else [query, key, value, log_beta]

    def run() -> None:
        if implementation == "sdpa":
            output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            output = gated_attention(query, key, value, log_beta, HEAD_DIM**-0.5, implementation=implementation)  # type: ignore[arg-type]
        torch.autograd.grad(output.sum(), leaves)

    return run


def attention_rows(seq_len: int, runs: int, clock: Clock = time.perf_counter) -> list[BenchRow]:
    sides = {name: _forward_backward(seq_len, name) for name in ("channels", "naive", "sdpa")}
    seconds = alternate(sides, runs, clock=clock)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        BenchRow(
            f"attention/T{seq_len}/vs_naive",
            middle["channels"],
            middle["naive"],
            median_ratio(seconds["naive"], seconds["channels"]),
            "s",
            runs,
            ">= 4 times faster",
        ),
        BenchRow(
            f"attention/T{seq_len}/vs_sdpa",
            middle["channels"],
            middle["sdpa"],
            median_ratio(seconds["channels"], seconds["sdpa"]),
            "s",
            runs,
            "<= 1.5 times its time",
        ),
    ]


MEMORY_SCRIPT = """
import sys
from tenure.scripts.bench.bench_train import _forward_backward
from tenure.scripts.bench.benching import status_kib
run = _forward_backward(int(sys.argv[1]), sys.argv[2], 3, 1)
_forward_backward(64, sys.argv[2], 3, 1)()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = status_kib("VmRSS")
run()
print((status_kib("VmHWM") - before) / 1024)
"""


def _peak_mib(seq_len: int, implementation: str) -> float:
    """MiB that one forward and backward with 3 heads adds to the peak resident size of a fresh process."""
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(seq_len), implementation]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_rows(lengths: tuple[int, ...]) -> list[BenchRow]:
    """Peak memory by length; the ratio is MiB per 1024 tokens over that of the shortest: flat if memory is linear."""
    rows = []
    per_token = 0.0
    for seq_len in lengths:
        ours = _peak_mib(seq_len, "channels")
        naive = _peak_mib(seq_len, "naive") if seq_len <= 4096 else None
        per_token = per_token or ours / seq_len
        name = f"attention/memory/T{seq_len}"
        rows.append(BenchRow(name, ours, naive, ours / seq_len / per_token, "MiB", 1, "per token: flat"))
    return rows


def step_rows(model: PreTrainedModel, tokenizer: Any, seq_len: int, runs: int, clock: Clock) -> list[BenchRow]:
    """A whole training step on a synthetic document against one plain forward, and the capacity loss's share of it."""
    import torch

    from ...retention import RetentionGates, Segments, attach, capacity_loss
    from ...training import GateObjective, RetrievalDocuments, collate
    from ...training.assets import resolve_texts

    texts = [document.text for document in resolve_texts("demo", "train")]
    batch = collate([RetrievalDocuments(texts, tokenizer, lengths=(seq_len,))[0]], tokenizer.pad_token_id or 0)
    gates = RetentionGates.for_model(model, gate_width=64, initial_bias=12.0)
    objective = GateObjective(model, gates, budget=0.2)
    segments = Segments.whole(1, batch.input_ids.shape[1])
    with torch.no_grad(), attach(model, gates) as attached:
        model(batch.input_ids, use_cache=False, logits_to_keep=1)
        log_beta = attached.log_beta()

    def step() -> None:
        objective(batch).total.backward()
        gates.zero_grad()

    def plain() -> None:
        with torch.no_grad():
            model(batch.input_ids, use_cache=False)

    def capacity() -> None:
        leaf = log_beta.clone().requires_grad_()
        capacity_loss(leaf, segments, 0.2 * seq_len, "global", objective.samples).loss.backward()

    seconds = alternate({"step": step, "plain": plain, "capacity": capacity}, runs, clock=clock)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    share = median_ratio(seconds["capacity"], seconds["step"])
    ratio = median_ratio(seconds["step"], seconds["plain"])
    return [
        BenchRow("capacity/share", middle["capacity"], middle["step"], share, "s", runs, "<= 0.03 of the step"),
        BenchRow(f"step/T{seq_len}", middle["step"], middle["plain"], ratio, "s", runs, "<= 3.4 plain forwards"),
    ]


def decode_row(model: PreTrainedModel, context: int, tokens: int, runs: int, clock: Clock) -> BenchRow:
    """Tokens/s of greedy decoding after `context` tokens: 20 % kept by retention gates against the plain cache.

    Random tokens under untrained gates: what is kept does not matter to the time, only how much.
    """
    import torch
    from transformers import DynamicCache

    from ...eviction import evict
    from ...retention import RetentionGates

    plain_model = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})  # the same weights
    gates = RetentionGates.for_model(model, gate_width=64, initial_bias=12.0)
    prompt = torch.randint(100, 40_000, (1, context), generator=torch.Generator().manual_seed(0)).to(model.device)

    @torch.no_grad()
    def decode(runner: Any, cache: Any) -> None:
        token = prompt[:, -1:]
        for _ in range(tokens):
            token = runner(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-tokens)

    plain = DynamicCache(config=model.config)
    with torch.no_grad(), evict(model, "retention", budget=0.2, gates=gates) as session:
        kept = session.new_cache()
        model(prompt, past_key_values=kept, use_cache=True, logits_to_keep=1)
        plain_model(prompt, past_key_values=plain, use_cache=True, logits_to_keep=1)
        sides = {"ours": lambda: decode(model, kept), "peer": lambda: decode(plain_model, plain)}
        seconds = alternate(sides, runs, clock=clock)
    return BenchRow(
        f"decode/ctx{context}",
        tokens / statistics.median(seconds["ours"]),
        tokens / statistics.median(seconds["peer"]),
        median_ratio(seconds["peer"], seconds["ours"]),
        "tokens/s",
        runs,
        ">= 1 times the speed" if context <= 1024 else "> 1 times the speed",
    )
