"""`tenure serve`: an OpenAI-compatible server whose agents' prompts are compressed and stored where they are needed."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tenure.documents import shown

from .loading import Dtype, find_gates, load_with_gates
from .output import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..eviction import Session
    from ..retention import RetentionGates
    from ..serving.kvcache.eviction_policy import LinearCosts
    from ..serving.server import ApiKeys, Backend

logger = logging.getLogger(__name__)
UNITS = {
    "": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9,
    "TB": 10**12,
}  # fmt: skip
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def read_bytes(text: str, flag: str) -> int:
    """A number of bytes, such as `2GiB` or `500 MB`.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"got {shown(text)} for {flag}; accepted: bytes, as 2GiB, 500MB or 1000000")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class CostEstimates:
    """Set-up of the costs by which the server chooses between loading a prompt and computing it.

    Computing and copies from the host are measured at the start, as they differ most between machines.

    Attributes:
        probe_tokens: length of the prompt that is computed to measure the model's speed.
        probe_bytes: size of the copy that is made to measure the speed of the link to the device.
        disk_bytes_per_s: assumed speed of reading from disk: that of a SATA SSD, at the least.
        latency_s: assumed time to start a copy.
    """

    probe_tokens: int = 256
    probe_bytes: int = 32 << 20
    disk_bytes_per_s: float = 5e8
    latency_s: float = 0.0


@dataclass
class ServeConfig:
    """Serve a model over HTTP with OpenAI's endpoints.

    The fixed prompt of every agent (its system messages) is computed once, compressed, and kept in tiers of memory
    ahead of the agent's next call. docs/guides/serve-http.md describes the endpoints. Ctrl-C and SIGTERM stop the
    server after the requests in progress; a second Ctrl-C at once.
    """

    model: str = "demo"
    """Hub id, local folder, or `demo` (SmolLM2-135M-Instruct, downloaded once)."""
    name: str | None = None
    """Name by which clients ask for the model; by default --model, of a folder its last part."""
    gates: str | None = None
    """Trained gates: a folder or hub:OWNER/NAME; by default those shipped for the demo model."""
    compress: Annotated[float | Literal["none"], tyro.conf.arg(metavar="SHARE|none")] = 0.25
    """Share of its entries that an agent's fixed prompt keeps; none: prompts are stored as they are, without gates."""
    system: Literal["expected_time", "ste_prefetch", "ste", "lru_prefetch", "hicache", "lru_reactive", "lfu", "lru"] = (
        "expected_time"
    )
    """The rules of eviction, saving and prefetching; docs/guides/serve-agents.md compares the systems."""
    device_memory: str = "2GiB"
    """Memory on the model's device for the KV of requests and stored prompts."""
    host_memory: str = "8GiB"
    """Memory of the host for stored prompts; 0: none."""
    disk: Annotated[str | None, tyro.conf.arg(metavar="DIR:SIZE")] = None
    """Folder and size of the disk tier, as /var/cache/tenure:50GiB. Prompts in it survive a restart."""
    api_keys: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File with a line `CLIENT KEY` and options for each accepted key (docs/guides/serve-http.md, Clients); by default
    no key is asked for. SIGHUP has it read again."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    drain_s: float = 30.0
    """Seconds in which requests in progress may finish when the server is stopped."""
    threads: int | None = None
    """CPU threads of the model; by default torch decides."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is the GPU if there is one."""
    dtype: Dtype = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU."""

    def __post_init__(self) -> None:
        if self.compress != "none" and not 0 < self.compress < 1:
            raise ValueError(f"got {self.compress} for --compress; accepted: a share between 0 and 1, or none")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"got {self.port} for --port; accepted: 0 to 65535")
        if self.drain_s <= 0 or (self.threads is not None and self.threads < 1):
            raise ValueError("--drain-s takes seconds above 0, --threads 1 or more")
        if self.device_bytes < 1:
            raise ValueError(f"got {self.device_memory!r} for --device-memory; accepted: more than 0")
        if self.gates is not None and self.compress == "none":
            raise ValueError("got --gates with --compress none, which uses none; accepted: one of them")
        if self.disk_tier is not None and self.system == "lru":
            raise ValueError("got --disk with --system lru, which uses the device only; accepted: another system")
        _ = self.host_bytes

    @property
    def device_bytes(self) -> int:
        return read_bytes(self.device_memory, "--device-memory")

    @property
    def host_bytes(self) -> int:
        return read_bytes(self.host_memory, "--host-memory")

    @property
    def disk_tier(self) -> tuple[Path, int] | None:
        """Folder and bytes of the disk tier."""
        if self.disk is None:
            return None
        folder, _, size = self.disk.rpartition(":")
        if not folder:
            raise ValueError(f"got {self.disk!r} for --disk; accepted: a folder and a size, as /var/cache/tenure:50GiB")
        return Path(folder), read_bytes(size, "--disk")

    @property
    def model_name(self) -> str:
        """The name by which clients ask for the model: never a path of this machine."""
        return self.name or (Path(self.model).resolve().name if Path(self.model).is_dir() else self.model)


def main(config: ServeConfig, link_bytes_per_s: float | None = None) -> int:
    """Serves until it is stopped.

    Args:
        link_bytes_per_s: to which copies between host and device are throttled, for benchmarks; None: not at all.
    """
    from ..retention import RetentionGates
    from ..serving.server import ApiKeys, ServerConfig, bind, build_app, run_server

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    console = make_console()
    keys = ApiKeys() if config.api_keys is None else ApiKeys.from_file(config.api_keys)
    gates = None
    if config.compress != "none":
        gates = RetentionGates.from_pretrained(find_gates(config.model, config.gates))
    server = ServerConfig(drain_s=config.drain_s)
    with bind(config.host, config.port) as listening, backend(config, gates, console, link_bytes_per_s) as served:
        host, port = listening.getsockname()[:2]
        app = build_app(served, keys, server)
        reload = None if config.api_keys is None else lambda: _reload(keys)
        run_server(app, served.client, listening, server, lambda: _announce(config, keys, host, port), reload)
    print("stopped", flush=True)
    return 0


@contextmanager
def backend(
    config: ServeConfig, gates: RetentionGates | None, console: Console, link_bytes_per_s: float | None = None
) -> Iterator[Backend]:
    """Loads the model and starts its engine; ends both with the block. The arguments are those of `main`."""
    from ..eviction import evict
    from ..serving import DiskPool, EngineClient, MemoryPool, SchedulerConfig, ThreadedTransfer, Tier, build_system
    from ..serving.engine import Compression, Engine
    from ..serving.prompt_cache import PromptKV
    from ..serving.sampling.grammar_compiler import GrammarCompiler
    from ..serving.server import Backend

    model, tokenizer = load_with_gates(config, gates, console, config.threads)
    compression = None if config.compress == "none" else Compression("retention", config.compress)
    with evict(model, "full", gates=gates, observe=["retention"] if compression else []) as session:
        on_gpu = model.device.type == "cuda"
        pools: dict[Tier, Any] = {Tier.DEVICE: MemoryPool(config.device_bytes, model.device)}
        if config.host_bytes and config.system != "lru":  # which would leave them unused
            pools[Tier.HOST] = MemoryPool(config.host_bytes, pinned=on_gpu)
        if config.disk_tier is not None:
            folder, size = config.disk_tier
            pools[Tier.DISK] = DiskPool(size, folder)
        costs, links = measure_costs(session, CostEstimates()), None
        if link_bytes_per_s is not None:
            links = dict.fromkeys(((Tier.DEVICE, Tier.HOST), (Tier.HOST, Tier.DEVICE)), link_bytes_per_s)
            costs = replace(costs, bytes_per_s=(link_bytes_per_s, costs.bytes_per_s[1]))
        system = build_system(
            config.system, pools, ThreadedTransfer(links), costs=costs,
            bytes_per_token=PromptKV(session).bytes_per_token(), clock=time.monotonic, learn=True,
            scheduler_config=SchedulerConfig(), device=model.device,
        )  # fmt: skip
        try:
            engine = Engine(session, system, compression, tokenizer)
            with EngineClient(engine) as client:
                limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
                room = system.tiers.capacity() // system.scheduler.bytes_per_token
                grammars = GrammarCompiler(tokenizer, engine.vocab_size, engine.end_token_ids)
                with closing(grammars):
                    yield Backend(client, system, tokenizer, config.model_name, min(limit or room, room), grammars)
        finally:
            system.close()


def measure_costs(session: Session, estimates: CostEstimates) -> LinearCosts:
    """Measures the model's speed and the link to its device; each the second of two runs, as the first is slow."""
    import torch

    from ..serving import LinearCosts

    model = session.model
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(estimates.probe_tokens, device=model.device).remainder(vocabulary)[None]
    source = torch.zeros(estimates.probe_bytes, dtype=torch.uint8)
    compute_s = copy_s = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        session.extend(session.new_cache(), ids, logits_to_keep=1).cpu()
        compute_s, begun = time.perf_counter() - begun, time.perf_counter()
        copied = torch.empty_like(source, device=model.device)
        copied.copy_(source)
        copied[-1:].cpu()
        copy_s = time.perf_counter() - begun
    speeds = estimates.probe_bytes / copy_s, estimates.disk_bytes_per_s
    return LinearCosts(estimates.probe_tokens / compute_s, speeds, estimates.latency_s)


def _reload(keys: ApiKeys) -> None:
    """Reads the file of keys again; one that cannot be read changes nothing."""
    try:
        keys.reload()
    except (OSError, ValueError) as error:
        logger.error("the keys stay as they were: %s", error)
    else:
        print("the file of keys was read again", flush=True)


def _announce(config: ServeConfig, keys: ApiKeys, host: str, port: int) -> None:
    """Prints a line that can be pasted into a shell."""
    shown = f"[{host}]" if ":" in host else host
    shown = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
    body = {
        "model": config.model_name,
        "messages": [{"role": "user", "content": "Name three rivers."}],
        "max_tokens": 64,
    }
    key = " -H 'Authorization: Bearer KEY'" if keys.required else ""
    print(
        f"serving {config.model_name} on http://{shown}:{port}/v1, live page at http://{shown}:{port}/; try:",
        flush=True,
    )
    print(
        f"curl http://{shown}:{port}/v1/chat/completions -H 'Content-Type: application/json'{key} -d "
        f"'{json.dumps(body)}'",
        flush=True,
    )
    if not keys.required and config.host not in LOCAL_HOSTS:
        print("warning: everybody who reaches this address is served; --api-keys FILE asks for keys", flush=True)
