"""`tenure bench prefill`: time and memory of scoring and eviction relative to the prefill before them."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..loading import Dtype, load_model
from ..output import OutputFile, write_rows
from .benching import BenchRow, essay_prompts, median_ratio, show

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ...eviction import RaggedCache
    from ...retention import RetentionGates

POLICIES = {"retention": 0.02, "defensive": 0.05, "snapkv": 0.05, "criticalkv": 0.05}  # aims, as shares of the prefill
DTYPES: dict[Dtype, str] = {"bfloat16": "", "float32": "/fp32"}  # and what the names of their rows end in
EVICTIONS = {"": "retention", "/defensive": "defensive", "/snapkv": "snapkv"}
CHUNK = 256


@dataclass
class PrefillBenchConfig:
    """Time scoring and eviction relative to prefill, and measure the peak memory of long prompts.

    The prompt is an essay; a share of its cache is kept. Times are for the model in bfloat16, its own dtype, and in
    float32 (rows `…/fp32`). Peak memory is measured in new processes (Linux), in float32.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo`."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default the gates shipped for the demo model."""
    share: float = 0.2
    """Share of the cache to keep."""
    threads: int = 1
    """CPU threads."""
    runs: int = 3
    """Measured runs; medians are reported."""
    quick: bool = False
    """Use only prompts of 1024 tokens."""
    json: OutputFile | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        if min(self.threads, self.runs) < 1:
            raise ValueError("--threads and --runs accept 1 or more")
        if not 0 < self.share < 1:
            raise ValueError(f"--share accepts a number between 0 and 1, got {self.share}")


def main(config: PrefillBenchConfig) -> int:
    import torch

    from ...retention import RetentionGates
    from ..loading import find_gates

    torch.set_num_threads(config.threads)
    source = find_gates(config.model, config.gates)
    gates = RetentionGates.from_pretrained(source)
    scored, evicted = (1024, 1024) if config.quick else (4096, 8192)
    rows = []
    for dtype, suffix in DTYPES.items():
        model, tokenizer = load_model(config.model, "cpu", dtype)
        gates.check_model(model)
        prompts = essay_prompts(tokenizer, 1, 8192)
        rows += time_rows(model, gates, prompts[:, :scored], config, score_rows, suffix)
        rows += time_rows(model, gates, prompts[:, :evicted], config, evict_rows, suffix)
        rows.append(bytes_row(model, gates, prompts[:, :1024], config.share, suffix))
        del model
    for length in (1024,) if config.quick else (2048, 4096, 8192):
        rows.append(peak_row(length, str(source), config))
    show(rows, f"{config.model}, {config.share:.0%} kept, {config.threads} threads, torch {torch.__version__}")
    if config.json:
        write_rows(rows, config.json)
    return 0


Timed = dict[str, list[float]]


def time_rows(
    model: PreTrainedModel,
    gates: RetentionGates,
    ids: torch.Tensor,
    config: PrefillBenchConfig,
    rows: Callable[[Timed, int, int], list[BenchRow]],
    suffix: str = "",
) -> list[BenchRow]:
    """`rows` of the seconds of a prefill, `prefill`, and of what follows it: `score/POLICY`, `evict/POLICY`.

    Every run computes the prompt anew, then scores it and evicts from it with each policy, from the same state. The
    rows' names end in `suffix`.
    """
    seconds: Timed = {}
    for turn in range(1 + config.runs):
        taken = one_turn(model, gates, ids, config.share)
        if turn:
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
    return [replace(row, name=row.name + suffix) for row in rows(seconds, ids.shape[1], config.runs)]


def one_turn(model: PreTrainedModel, gates: RetentionGates, ids: torch.Tensor, share: float) -> dict[str, float]:
    """Seconds of one prefill, and of scoring and evicting after it."""
    import torch

    from ...eviction import evict

    with torch.no_grad(), evict(model, "full", gates=gates, observe=POLICIES) as session:
        cache = session.new_cache()
        taken = {"prefill": timed(cache, session.extend, cache, ids, logits_to_keep=1)}
        for name in POLICIES:
            taken[f"score/{name}"] = timed(cache, score, cache.fork(), name, share)
            taken[f"evict/{name}"] = timed(cache, cache.fork().compress, name, share)
    return taken


def timed(cache: RaggedCache, call: Callable[..., object], *args: object, **kwargs: object) -> float:
    start = time.perf_counter()
    call(*args, **kwargs)
    taken = time.perf_counter() - start
    cache.clear_memo()  # results that forks share would be computed for the first of them only
    return taken


def score(cache: RaggedCache, policy: str, share: float) -> None:
    """Scores every layer, as an eviction does."""
    import torch

    from ...eviction import get_policy
    from ...eviction.selection import conclude

    one = get_policy(policy)
    evicting = torch.ones(len(cache.tokens_seen), 1, 1, dtype=torch.bool)
    for layer in cache.ragged:
        budget = (cache.tokens_seen * share).long()
        view = one.view(layer, cache.tokens_seen, cache.query_positions, budget)
        conclude(layer, one, view, evicting)
        one.score(view)


def score_rows(seconds: Timed, length: int, runs: int) -> list[BenchRow]:
    return [
        share_row(f"score/{name}/ctx{length}", seconds[f"score/{name}"], seconds["prefill"], runs, aim)
        for name, aim in POLICIES.items()
    ]


def evict_rows(seconds: Timed, length: int, runs: int) -> list[BenchRow]:
    return [
        share_row(f"evict/ctx{length}{suffix}", seconds[f"evict/{name}"], seconds["prefill"], runs, 0.03)
        for suffix, name in EVICTIONS.items()
    ]


def share_row(name: str, part: Sequence[float], whole: Sequence[float], runs: int, aim: float) -> BenchRow:
    """Seconds of `part` and of the prefill, and their ratio."""
    return BenchRow(
        name, statistics.median(part), statistics.median(whole), median_ratio(part, whole), "s", runs,
        f"<= {aim} of the prefill",
    )  # fmt: skip


def bytes_row(
    model: PreTrainedModel, gates: RetentionGates, ids: torch.Tensor, share: float, suffix: str = ""
) -> BenchRow:
    """Bytes allocated after an eviction, relative to the keys, values, positions and log β of the kept entries."""
    import torch

    from ...eviction import evict

    with torch.no_grad(), evict(model, "retention", share, gates=gates) as session:
        session.extend(session.new_cache(), ids, logits_to_keep=1)
        stores = session.last_cache.stores
        needed = sum(store.entries * store.entry_bytes for store in stores)
        held = sum(buffer.untyped_storage().nbytes() for store in stores for buffer in store.buffers.values())
    mib = 2**20
    return BenchRow(f"bytes/overhead{suffix}", held / mib, needed / mib, held / needed, "MiB", 1, "<= 1.08 times")


PEAK_SCRIPT = """
import sys
import torch
from tenure.eviction import evict
from tenure.scripts.bench.benching import essay_prompts, status_kib
from tenure.scripts.loading import load_model
name, gates, length, share, chunk, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model, tokenizer = load_model(name, "cpu", "float32")
ids = essay_prompts(tokenizer, 1, int(length))
budget = 1.0 if chunk == "0" else int(float(share) * 2048)
policy = "full" if chunk == "0" else "retention"
with torch.no_grad(), evict(model, policy, budget, gates=gates, prefill_chunk=int(chunk) or None) as session:
    session.extend(session.new_cache(), ids[:, :64], logits_to_keep=1)
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the loading
    before = status_kib("VmRSS")
    session.extend(session.new_cache(), ids, logits_to_keep=1)
    print((status_kib("VmHWM") - before) / 1024)
"""


def peak_mib(length: int, gates: str, config: PrefillBenchConfig, chunk: int) -> float:
    """MiB that a prompt adds to the peak resident size of a new process; with `chunk` 0 nothing is evicted."""
    values = (config.model, gates, length, config.share, chunk, config.threads)
    done = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT, *map(str, values)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def peak_row(length: int, gates: str, config: PrefillBenchConfig) -> BenchRow:
    """Chunked prefill under a fixed budget, against one forward pass with the full cache."""
    ours, peer = peak_mib(length, gates, config, CHUNK), peak_mib(length, gates, config, 0)
    return BenchRow(f"peak/ctx{length}", ours, peer, ours / peer, "MiB", 1, "flat beside linear")
