"""`tenure bench serve`: agents over HTTP, against other systems, the engine alone, and other servers."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import find_gates, load_model
from ..output import make_console, write_rows
from .agent_runs import make_workload
from .bench_agents import tokens
from .benching import BenchRow, alternate, show
from .engine_runs import PAGE, EngineBench, EngineBenchSizes
from .http_agents import AgentServer, ChatWorkload, HttpRun, as_chats, stream_together
from .server_process import ServerProcess

if TYPE_CHECKING:
    from ...eviction import Session

OURS, BASELINE = "expected_time", "lru_reactive"
POINTS = ("ring/p50", "ring/p25", "branching/p50", "branching/p25", "compressed", "overhead")
COMPRESSED_POOL = 0.05  # of the prompts, where prompts kept whole hardly fit
STREAMS = 8  # of the overhead
STREAM_PROMPT = 64  # tokens
OWN_MODEL, PEER_MODEL = "demo", "peer"


@dataclass
class ServeBenchConfig:
    """Run agent workflows over HTTP on `tenure serve` processes, and stream beside the engine alone.

    The workflows are those of `bench agents`: ten agents with a system message each, whose calls wait for each other.
    The servers run at the same time, and the sides take turns. The device pool holds a share of the uncompressed
    prompts plus one request; copies between host and device are throttled.

    --peer-url compares with any other server of OpenAI's endpoints, --vllm-python with one that is started here: vLLM's
    CPU build with a KV cache of the device pool's bytes, in an environment of its own.
    """

    model: str = OWN_MODEL
    """Hub id, local folder, or `demo`."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default the gates shipped for the demo model."""
    only: tuple[str, ...] = POINTS
    """Points to measure."""
    kept: float = 0.25
    """Share of a compressed prompt's entries."""
    bandwidth: float = 60.0
    """Bandwidth of the device-host link in MB/s, per direction."""
    fixed: int = 512
    """Tokens per system message."""
    suffix: int = 16
    """Tokens per user message."""
    answer: int = 8
    """Tokens per answer of an agent."""
    rounds: int = 2
    """Calls per run, in tens."""
    stream_tokens: int = 64
    """Tokens per answer of the 8 streams beside the engine alone."""
    runs: int = 3
    """Measured runs of each side; medians are reported."""
    threads: int = 1
    """CPU threads of each server's model."""
    peer_url: str | None = None
    """Server to compare with, as http://127.0.0.1:8001/v1; replaces the other points."""
    peer_model: str = PEER_MODEL
    """Model to ask there for."""
    vllm_python: Path | None = None
    """Python of an environment with vLLM's CPU build; replaces the other points."""
    peer_pools: tuple[float, ...] = (0.5,)
    """Device pools beside a peer, as shares of the uncompressed prompts."""
    seed: int = 0
    """Seed of the first run's calls, incremented per run."""
    json: str | None = None
    """Also write the rows to this file."""

    def __post_init__(self) -> None:
        whole = self.fixed, self.suffix, self.answer, self.rounds, self.stream_tokens, self.runs, self.threads
        if min(whole) < 1 or not self.bandwidth > 0:
            raise ValueError(
                "--fixed, --suffix, --answer, --rounds, --stream-tokens, --runs and --threads accept 1 or more, "
                "--bandwidth MB/s above 0"
            )
        if strange := sorted({*self.only} - {*POINTS}):
            raise ValueError(f"got --only {' '.join(strange)}; accepted: {', '.join(POINTS)}")
        if not (0 < self.kept < 1 and all(0 < pool <= 1 for pool in self.peer_pools)):
            raise ValueError("--kept accepts a share between 0 and 1, --peer-pools shares above 0 and up to 1")
        if self.peer_url is not None and self.vllm_python is not None:
            raise ValueError("got --peer-url and --vllm-python; accepted: one of them")
        if self.vllm_python is not None and not self.vllm_python.is_file():
            raise ValueError(f"got --vllm-python {self.vllm_python}; accepted: a Python interpreter")


@dataclass
class ServeBench:
    """The model and settings that all points are measured with.

    Attributes:
        session: with the model, in this process: the engine alone, and sizes of KV.
        folder: of logs.
    """

    config: ServeBenchConfig
    session: Session
    tokenizer: Any
    folder: Path
    text: list[int] = field(default_factory=list)

    def workloads(self, name: str) -> list[ChatWorkload]:
        """The calls of each run; the first of all is a warm-up."""
        sizes = self.config.rounds, self.config.fixed, self.config.suffix, self.config.answer
        self.text = self.text or tokens(self.tokenizer)
        seeds = range(self.config.seed, self.config.seed + self.config.runs + 1)
        return [as_chats(make_workload(name, self.text, *sizes, 0.0, seed), self.tokenizer) for seed in seeds]

    def pool_bytes(self, workload: ChatWorkload, share: float) -> int:
        """Bytes of a device pool for a share of the prompts and one request."""
        sizes = workload.prompt_tokens(self.tokenizer).values()
        request = max(sizes) + self.config.suffix + self.config.answer + 2 * PAGE
        return self.bytes_of(share * sum(sizes) + request)

    def bytes_of(self, count: float) -> int:
        """Bytes of the KV of so many tokens, uncompressed."""
        from ...serving.prompt_cache import PromptKV

        return int(count) * PromptKV(self.session, PAGE).bytes_per_token()

    @contextmanager
    def server(self, system: str, device_bytes: int, compress: float | None = None) -> Iterator[AgentServer]:
        """A `tenure serve` whose host memory holds all prompts, on a throttled link."""
        config = self.config
        flags = [
            "--model", config.model, "--name", OWN_MODEL, "--system", system, "--device-memory", str(device_bytes),
            "--host-memory", str(20 * device_bytes), "--threads", str(config.threads), "--dtype", "float32",
            "--device", "cpu", "--compress", "none" if compress is None else str(compress),
            "--bandwidth", str(config.bandwidth),
        ]  # fmt: skip
        if compress is not None and config.gates is not None:
            flags += ["--gates", config.gates]
        log = self.folder / f"{system}-{device_bytes}-{compress}.log"
        process = ServerProcess.of_tenure(flags, log, "tenure.scripts.bench.throttled_server")
        with running(process) as url, closing(AgentServer(url, OWN_MODEL, process)) as server:
            yield server


@contextmanager
def running(process: ServerProcess) -> Iterator[str]:
    """The URL of a server that is started, and killed at the end: there is nothing that it should save."""
    process.start()
    try:
        yield process.url
    finally:
        process.kill()


def main(config: ServeBenchConfig) -> int:
    import torch

    from ...eviction import evict

    torch.set_num_threads(config.threads)
    console = make_console()
    find_gates(config.model, config.gates)
    model, tokenizer = load_model(config.model, "cpu", "float32")
    rows: list[BenchRow] = []
    with evict(model, "full") as session, tempfile.TemporaryDirectory() as folder:
        bench = ServeBench(config, session, tokenizer, Path(folder))
        for row in peer_rows(bench) if config.peer_url or config.vllm_python else own_rows(bench):
            console.print(f"{row.name}: {row.ratio:.2f}")
            rows.append(row)
    show(rows, f"{config.model} in float32, {config.threads} threads a server, torch {torch.__version__}")
    if config.json:
        write_rows(rows, config.json)
    return 0


# Our own points ---------------------------------------------------------------------------------------------------


def own_rows(bench: ServeBench) -> Iterator[BenchRow]:
    """The rows of `config.only`."""
    config = bench.config
    for share in (0.5, 0.25):
        names = [name for name in ("ring", "branching") if f"{name}/p{share * 100:.0f}" in config.only]
        if names:
            nbytes = bench.pool_bytes(bench.workloads("ring")[0], share)
            sides = {OURS: (OURS, nbytes, None), BASELINE: (BASELINE, nbytes, None)}
            for name, runs in measure(bench, names, sides):
                target = "≥ 1.5" if (name, share) == ("ring", 0.5) else ""
                row = f"serve/{name}/p{share * 100:.0f}"
                yield makespan_row(f"{row}/vs_{BASELINE}", runs[OURS], runs[BASELINE], target)
                yield waited_row(f"{row}/waited_tokens/vs_{BASELINE}", runs[OURS], runs[BASELINE])
    if "compressed" in config.only:
        nbytes = bench.pool_bytes(bench.workloads("ring")[0], COMPRESSED_POOL)
        sides = {"compressed": (OURS, nbytes, config.kept), "plain": (OURS, nbytes, None)}
        for name, runs in measure(bench, ["ring"], sides):
            row = f"serve/{name}/p{COMPRESSED_POOL * 100:02.0f}/compressed"
            yield makespan_row(f"{row}/vs_plain", runs["compressed"], runs["plain"], "≥ 1.5")
            yield waited_row(f"{row}/waited_tokens/vs_plain", runs["compressed"], runs["plain"])
    if "overhead" in config.only:
        yield from overhead_rows(bench)


def measure(
    bench: ServeBench, names: Sequence[str], sides: Mapping[str, tuple[str, int, float | None]]
) -> Iterator[tuple[str, dict[str, list[HttpRun]]]]:
    """Runs workflows on several servers in turn.

    Args:
        sides: system, bytes of the device pool and share kept (None: no compression) of each server.
    """
    with ExitStack() as stack:
        servers = {side: stack.enter_context(bench.server(*setting)) for side, setting in sides.items()}
        for name in names:
            workloads = bench.workloads(name)
            for server in servers.values():
                server.declare(workloads[0])
            runs = in_turn(servers, workloads)
            alike = [[run.answers for run in several] for side, several in runs.items() if sides[side][2] is None]
            assert all(answers == alike[0] for answers in alike), "every system gives the same answers"
            yield name, runs


def in_turn(servers: Mapping[str, AgentServer], workloads: Sequence[ChatWorkload]) -> dict[str, list[HttpRun]]:
    """Each server's runs of all workloads but the first, which stores the agents' prompts."""
    runs: dict[str, list[HttpRun]] = {side: [] for side in servers}
    for server in servers.values():
        server.warm_up(workloads[0])
        server.run(workloads[0])
    for workload in workloads[1:]:
        for side, server in servers.items():
            runs[side].append(server.run(workload))
    return runs


def makespan_row(name: str, ours: Sequence[HttpRun], peer: Sequence[HttpRun], target: str = "") -> BenchRow:
    """Seconds of a run; the ratio is the median of the ratios turn by turn."""
    mine, other = ([run.makespan_s for run in runs] for runs in (ours, peer))
    return _times_row(name, mine, other, "s", target)


def waited_row(name: str, ours: Sequence[HttpRun], peer: Sequence[HttpRun]) -> BenchRow:
    """Tokens of all prompts of a run that were not on the device when their calls came."""
    mine, other = ([run.waited_tokens or 0 for run in runs] for runs in (ours, peer))
    return _times_row(name, mine, other, "tokens", "")


def first_token_row(name: str, ours: Sequence[HttpRun], peer: Sequence[HttpRun]) -> BenchRow:
    """Milliseconds from a returning agent's call to its first text, the median of each run."""
    mine, other = ([1e3 * statistics.median(run.first_token_s) for run in runs] for runs in (ours, peer))
    return _times_row(name, mine, other, "ms", "")


def _times_row(name: str, ours: Sequence[float], peer: Sequence[float], unit: str, target: str) -> BenchRow:
    ratio = statistics.median(b / a for a, b in zip(ours, peer, strict=True))
    return BenchRow(name, statistics.median(ours), statistics.median(peer), ratio, unit, len(ours), target)


def overhead_rows(bench: ServeBench) -> Iterator[BenchRow]:
    """Tokens/s of 8 streams over HTTP, against the engine alone: from the first request to the end of the last.

    The second row counts CPU seconds of the server's process, and of this one: what HTTP costs on a machine whose cores
    others use, too. There it is not hidden behind the model's threads as it is in the first row.
    """
    from ...serving import Request
    from ...serving.sampling.params import SamplingParams

    config = bench.config
    alone = EngineBench(bench.session, None, EngineBenchSizes(), 1, config.seed)
    room = 2 * STREAMS * (STREAM_PROMPT + config.stream_tokens + 2 * PAGE)  # tokens
    turn = {"http": 0, "alone": 0}

    def prompts(side: str) -> list[list[int]]:
        """New ones each turn, the same on both sides: nothing of them is cached."""
        turn[side] += 1
        return [alone.prompt(1000 * turn[side] + stream, STREAM_PROMPT) for stream in range(STREAMS)]

    cpu: dict[str, list[float]] = {"http": [], "alone": []}
    with bench.server(OURS, bench.bytes_of(room)) as server, alone.engine(room) as engine:

        def over_http() -> None:
            before, asked = server.cpu_seconds(), prompts("http")
            found = asyncio.run(stream_together(server.url, OWN_MODEL, asked, config.stream_tokens))
            assert found == STREAMS * config.stream_tokens, "all answers are whole"
            cpu["http"].append(server.cpu_seconds() - before)

        def without() -> None:
            before, sampling = time.process_time(), SamplingParams(ignore_eos=True)
            for prompt in prompts("alone"):
                engine.submit(Request("alone", prompt, config.stream_tokens, sampling=sampling))
            found = sum(output.num_output_tokens for output in engine.run())
            assert found == STREAMS * config.stream_tokens, "all answers are whole"
            cpu["alone"].append(time.process_time() - before)

        seconds = alternate({"http": over_http, "alone": without}, config.runs, clock=time.perf_counter)
    for name, unit, taken, target in (
        ("serve/overhead", "tokens/s", seconds, "≥ 0.95"),
        ("serve/overhead/cpu", "tokens/CPU s", {side: each[1:] for side, each in cpu.items()}, ""),
    ):
        speeds = {side: [STREAMS * config.stream_tokens / each for each in taken[side]] for side in taken}
        ratio = statistics.median(a / b for a, b in zip(speeds["http"], speeds["alone"], strict=True))
        ours, peer = (statistics.median(speeds[side]) for side in ("http", "alone"))
        yield BenchRow(name, ours, peer, ratio, unit, config.runs, target)


# Beside other servers ---------------------------------------------------------------------------------------------


def peer_rows(bench: ServeBench) -> Iterator[BenchRow]:
    """Time to the first token of a returning agent and makespan of the ring, against another server.

    Ours keeps compressed prompts, prompts as they are above a host tier, and prompts as they are on the device alone
    (`lru`), which is what an engine with a prefix cache and no lower tier does.
    """
    config = bench.config
    peer = "vllm" if config.vllm_python is not None else "peer"
    settings: dict[str, tuple[str, float | None]] = {
        "compressed": (OURS, config.kept), "plain": (OURS, None), "device_only": ("lru", None),
    }  # fmt: skip
    for share in config.peer_pools:
        workloads = bench.workloads("ring")
        nbytes = bench.pool_bytes(workloads[0], share)
        with ExitStack() as stack:
            url = config.peer_url or stack.enter_context(running(vllm_process(bench, nbytes)))
            servers = {
                side: stack.enter_context(bench.server(system, nbytes, keep))
                for side, (system, keep) in settings.items()
            }
            for server in servers.values():
                server.declare(workloads[0])
            servers[peer] = stack.enter_context(closing(AgentServer(url, config.peer_model)))
            runs = in_turn(servers, workloads)
        for side in settings:
            name = f"serve/ring/p{share * 100:02.0f}/{side}"
            yield makespan_row(f"{name}/makespan/vs_{peer}", runs[side], runs[peer])
            yield first_token_row(f"{name}/first_token/vs_{peer}", runs[side], runs[peer])
        same = [a == b for own, other in zip(runs["plain"], runs[peer], strict=True)
                for a, b in zip(own.answers, other.answers, strict=True)]  # fmt: skip
        yield BenchRow(f"serve/ring/p{share * 100:02.0f}/same_answers/vs_{peer}", sum(same), len(same),
                       sum(same) / len(same), "answers", len(same))  # fmt: skip


def vllm_process(bench: ServeBench, nbytes: int) -> ServerProcess:
    """vLLM's CPU build with the same model, dtype, threads and bytes of KV."""
    from ...training.assets import resolve_model

    config = bench.config
    command = [
        str(config.vllm_python), "-m", "vllm.entrypoints.openai.api_server", "--model", resolve_model(config.model),
        "--served-model-name", config.peer_model, "--dtype", "float32", "--max-num-seqs", str(STREAMS),
        "--max-model-len", str(config.fixed + 256), "--kv-cache-memory-bytes", str(nbytes), "--enable-prefix-caching",
        "--enable-prompt-tokens-details",
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": str(config.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return ServerProcess(command, bench.folder / "vllm.log", environment)
