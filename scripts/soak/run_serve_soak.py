"""`tenure soak serve`: many clients on a server, each answer compared with the engine alone; kill -9 and restarts."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ..bench.server_process import ServerProcess
from ..output import OutputFile, make_console, write_json
from .expected_answers import Catalog, make_catalog
from .http_clients import HttpLoad, LoadCounts
from .tiny_served import TinyServed, make_tiny_served

KEEP = 0.25  # of an agent's prompt
KEYS = ("key-of-team-a-0123456789", "key-of-team-b-0123456789", "key-of-team-c-0123456789")
ADMIN_KEY = "key-of-the-operator-0123"
# Room for a few of the clients' requests and prompts: the rest is evicted, loaded and preempted all the time.
MEMORY = ("--device-memory", "4MiB", "--host-memory", "256KiB")
DISK = "64MiB"
SAMPLE_S = 0.5  # between two readings of the server's memory
SETTLE_S = 20.0  # in which nothing may be left of the requests after the last client
WARM_UP = 0.3  # share of the time after which the server's memory must not grow any more
MAX_GROWTH = 0.05  # share of the server's memory by which it may differ then
KILLED_SHARE = 0.3  # of the time, with kills; the rest is one life of the server
MOST_BETWEEN_KILLS_S = 6.0
# Of the server's counters, those that show what its memory was too small for.
COUNTERS = {
    "tenure_preemptions_total": "server: preemptions",
    "tenure_loaded_tokens_total": "server: cached tokens loaded for requests",
    "tenure_recomputed_tokens_total": "server: cached tokens computed again",
}
# Lines of the server's log that are no fault: of torch's own, at its import.
TORCH_LINES = ("Failed to load", "torch/utils/_pytree.py")


@dataclass
class ServeSoakConfig:
    """Let clients ask a server for a long time, then kill and restart it under load; a wrong or lost answer fails.

    The server is `tenure serve` in a process of its own, on loopback, with a tiny model and little memory. The clients
    stream, read slowly, cancel, disconnect, converse, send bad bodies and flush, with several keys. Every answer is
    compared with that of the engine alone.
    """

    minutes: float = 10.0
    """Duration of the load."""
    clients: int = 64
    """Clients at once."""
    kills: bool = True
    """In the last third of the time, kill the server at random moments and restart it on its disk tier."""
    calls: int = 160
    """Different calls to draw from, with a quarter as many conversations."""
    max_tokens: int = 32
    """Of an answer."""
    seed: int = 0
    """Of calls, clients and moments."""
    json: OutputFile | None = None
    """Also write the counts to this file."""

    def __post_init__(self) -> None:
        if not (self.minutes > 0 and min(self.clients, self.calls, self.max_tokens) >= 1):
            raise ValueError(
                f"got --minutes {self.minutes:g} --clients {self.clients} --calls {self.calls} --max-tokens "
                f"{self.max_tokens}; accepted: minutes above 0, and 1 or more"
            )


@dataclass
class ServerWatch:
    """Observations of the server from outside.

    Attributes:
        resident: seconds and bytes of resident memory, in the life without kills.
        counters: the server's, by the names in the table, at the end of that life.
        restarts: after a kill. reread: tokens that the first calls after a restart found on disk.
        violations: in words.
    """

    resident: list[tuple[float, int]] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    reread: int = 0
    violations: list[str] = field(default_factory=list)


def main(config: ServeSoakConfig) -> int:
    import torch

    torch.set_num_threads(1)
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        with console.status("computing the answers of the engine alone"):
            served = make_tiny_served(Path(folder))
            catalog = make_catalog(served, KEEP, config.calls, config.max_tokens, config.seed, "tiny")
        with console.status(f"{config.clients} clients for {config.minutes:g} minutes"):
            counts, watch = asyncio.run(soak(config, served, catalog, Path(folder)))
    found = summary(counts, watch, catalog)
    for name, value in found.items():
        console.print(f"{name:<36} {value:>14,}" if isinstance(value, int) else f"{name:<36} {value:>14,.3f}")
    for violation in (*counts.violations, *watch.violations):
        console.print(f"violation: {violation}", markup=False)
    if config.json:
        write_json(found, config.json)
    return 1 if counts.violations or watch.violations else 0


async def soak(
    config: ServeSoakConfig, served: TinyServed, catalog: Catalog, folder: Path
) -> tuple[LoadCounts, ServerWatch]:
    """Both parts of the load; returns what clients and watch have seen."""
    watch, seconds = ServerWatch(), 60 * config.minutes
    with server(served, folder) as process:
        load = HttpLoad(process.root, catalog, KEYS, ADMIN_KEY, config.seed)
        try:
            await load.declare_workflow()
            watching = asyncio.ensure_future(_watch_memory(process, watch))
            try:
                await load.run(config.clients, seconds * (1 - KILLED_SHARE if config.kills else 1))
            finally:
                watching.cancel()
            watch.violations += memory_growth(watch.resident)
            metrics = await load.metrics()
            watch.counters = {text: int(metrics[name]) for name, text in COUNTERS.items()}
            watch.violations += await _leftovers(load)
            if config.kills:
                killing = asyncio.ensure_future(_kill_now_and_then(process, load, watch, config.seed))
                await load.run(config.clients, seconds * KILLED_SHARE)
                killing.cancel()
                await asyncio.gather(killing, return_exceptions=True)
                await _kill_and_restart(process, load, watch)
                watch.violations += await _leftovers(load)
        finally:
            await load.close()
        code = await asyncio.to_thread(process.stop)
        if code != 0:
            watch.violations.append(f"the server ended with exit code {code}")
        watch.violations += log_faults(process.log_text())
    return load.counts, watch


@contextmanager
def server(served: TinyServed, folder: Path) -> Iterator[ServerProcess]:
    """A running server of the tiny model, with a disk tier; killed at the end if it still runs."""
    keys = folder / "keys"
    rows = [*(f"team-{number} {key}" for number, key in enumerate(KEYS)), f"operator {ADMIN_KEY} admin"]
    keys.write_text("\n".join(rows) + "\n")
    flags = [
        "--model", str(served.model), "--gates", str(served.gates), "--compress", str(KEEP), "--name", "tiny",
        "--api-keys", str(keys), "--disk", f"{folder / 'disk'}:{DISK}", "--threads", "1", *MEMORY,
    ]  # fmt: skip
    process = ServerProcess.of_tenure(flags, folder / "server.log")
    process.start()
    try:
        yield process
    finally:
        process.kill()


async def _watch_memory(process: ServerProcess, watch: ServerWatch) -> None:
    begun = time.monotonic()
    while True:
        watch.resident.append((time.monotonic() - begun, process.resident_bytes()))
        await asyncio.sleep(SAMPLE_S)


def memory_growth(resident: Sequence[tuple[float, int]]) -> list[str]:
    """A violation if the memory has grown between the time after the warm-up and the end."""
    if len(resident) < 20:
        return []
    end = resident[-1][0]
    early = statistics.median(size for at, size in resident if WARM_UP <= at / end <= WARM_UP + 0.2)
    late = statistics.median(size for at, size in resident if at / end >= 0.8)
    if late <= early * (1 + MAX_GROWTH):
        return []
    return [f"the server's memory has grown from {early / 2**20:.0f} to {late / 2**20:.0f} MiB"]


async def _leftovers(load: HttpLoad) -> list[str]:
    """Violations that the server's own counters show once no client asks any more."""
    end = time.monotonic() + SETTLE_S
    while True:
        metrics = await load.metrics()
        left = metrics["tenure_requests_waiting"] + metrics["tenure_requests_running"]
        if not left or time.monotonic() > end:
            break
        await asyncio.sleep(0.1)
    found = [f"{left:.0f} requests have not ended {SETTLE_S:g} s after the last client"] if left else []
    if not metrics["tenure_engine_alive"]:
        found.append("the engine has died")
    failed = metrics.get('tenure_requests_finished_total{reason="failed"}', 0.0)
    broken = sum(
        value for name, value in metrics.items() if name.startswith("tenure_http_requests") and '"500"' in name
    )
    if failed or broken:
        found.append(f"{failed:.0f} requests have failed, {broken:.0f} got status 500")
    for tier in ("device", "host", "disk"):
        used, capacity = (metrics[f'tenure_pool_{what}_bytes{{tier="{tier}"}}'] for what in ("used", "capacity"))
        if used > capacity:
            found.append(f"{used:.0f} bytes are used in the {tier} tier of {capacity:.0f}")
    return found


async def _kill_now_and_then(process: ServerProcess, load: HttpLoad, watch: ServerWatch, seed: int) -> None:
    random = Random(seed)
    while True:
        await asyncio.sleep(random.uniform(0.2, MOST_BETWEEN_KILLS_S))
        await _kill_and_restart(process, load, watch)


async def _kill_and_restart(process: ServerProcess, load: HttpLoad, watch: ServerWatch) -> None:
    """A kill, and a start on the same folder; the first calls must find prompts on disk."""
    load.interrupt()
    process.kill()
    await asyncio.to_thread(process.start)
    watch.restarts += 1
    try:
        await load.declare_workflow()
        await load.check_stored()
        metrics = await load.metrics()
        found = sum(
            value for name, value in metrics.items()
            if name.startswith("tenure_moved_bytes_total") and 'source="disk"' in name
        )  # fmt: skip
        cached = int(metrics["tenure_cached_tokens_total"])
        watch.reread += cached
        if not (found and cached):
            watch.violations.append(f"restart {watch.restarts}: nothing came from disk ({cached} tokens cached)")
    except Exception as error:  # the next kill is still to come
        watch.violations.append(f"restart {watch.restarts}: {type(error).__name__}: {error}")
    load.resume()


def log_faults(text: str) -> list[str]:
    """Violations in the server's log."""
    words = ("Traceback", "ERROR", "CRITICAL")
    lines = [
        line for line in text.splitlines()
        if any(word in line for word in words) and not any(known in line for known in TORCH_LINES)
    ]  # fmt: skip
    return [f"the server's log has {len(lines)} faults, the first: {lines[0]}"] if lines else []


def summary(counts: LoadCounts, watch: ServerWatch, catalog: Catalog) -> dict[str, Any]:
    """Counts, times and memory, by their names in the table."""
    found: dict[str, Any] = {f"done: {kind}": number for kind, number in sorted(counts.done.items())}
    found |= {"ended by a kill or a flush": counts.excused, "calls left out (rounding decides)": catalog.undecided}
    for kind in ("whole answer", "stream"):
        found |= {f"{kind}: {name}, s": value for name, value in percentiles(counts.seconds[kind]).items()}
    found |= {f"first token: {name}, s": value for name, value in percentiles(counts.first_token_s).items()}
    found |= {"prompt tokens found in the cache": counts.cached_tokens}
    found |= watch.counters
    if watch.resident:
        sizes = [size / 2**20 for _, size in watch.resident]
        late = statistics.median(sizes[-max(1, len(sizes) // 5) :])
        found |= {"memory: most, MiB": max(sizes), "memory: at the end, MiB": late}
    found |= {"restarts after kill -9": watch.restarts, "tokens reread after restarts": watch.reread}
    return found | {"violations": len(counts.violations) + len(watch.violations)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """P50 and P99; none of nothing."""
    from ...serving.simulation.results import quantile

    return {"P50": quantile(values, 0.5), "P99": quantile(values, 0.99)} if values else {}
