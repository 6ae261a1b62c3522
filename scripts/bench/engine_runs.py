"""Engines, prompts and requests of `tenure bench engine`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...eviction import Session
    from ...serving import Request, RequestOutput, SchedulerConfig, TensorPayload
    from ...serving.engine import Engine
    from ...serving.prompt_cache import Compression, PromptKV

PAGE = 16  # tokens per page of the prefix tree


@dataclass(frozen=True)
class EngineBenchSizes:
    """Numbers of requests and tokens of the rows.

    Attributes:
        batch: requests that decode together. tokens: of each of their answers.
        short, context: tokens of their prompts.
        kept: share of a compressed prompt's entries.
        prompts, prompt: number and length of the prompts that are computed together.
        shared: tokens of the prompt that requests begin with at the same time.
        retried: tokens of the prompt whose client loses patience. chunk: of a prefill then. patience: chunks.
        turns, turn, fixed: turns of the conversation, tokens of each, and of its fixed prompt.
        clients: requests that ask for far more than they use. asked: tokens, then and otherwise. own: of each prompt.
        used: most tokens of an answer.
        workflows, agents, calls: workflows that run under the event loop, agents of each, and calls.
    """

    batch: int = 8
    tokens: int = 24
    short: int = 64
    context: int = 4096
    kept: float = 0.2
    prompts: int = 32
    prompt: int = 32
    shared: int = 1024
    retried: int = 1805
    chunk: int = 256
    patience: int = 3
    turns: int = 10
    turn: int = 120
    fixed: int = 512
    clients: int = 32
    asked: tuple[int, int] = (16384, 64)
    own: int = 64
    used: int = 48
    workflows: int = 100
    agents: int = 10
    calls: int = 3


QUICK = EngineBenchSizes(
    batch=4, tokens=6, short=24, context=256, prompts=8, prompt=16, shared=128, retried=205, chunk=32, turns=4, turn=24,
    fixed=64, clients=8, asked=(1024, 32), own=16, used=16, workflows=10, agents=3, calls=2,
)  # fmt: skip


@dataclass
class EngineBench:
    """The model, sizes and clock that every row is measured with.

    Attributes:
        session: inside an `evict(model, "full", observe=["retention"])` block.
        plain: the same model, with the same weights, outside of it.
        runs: measured runs of each side.
        seed: of all prompts.
        clock: seconds of a side.
    """

    session: Session
    plain: Any
    sizes: EngineBenchSizes
    runs: int
    seed: int
    clock: Callable[[], float] = time.perf_counter
    _compressed: TensorPayload | None = field(default=None, repr=False)

    @property
    def compression(self) -> Compression:
        from ...serving.prompt_cache import Compression

        return Compression("retention", self.sizes.kept)

    def prompt(self, number: int, count: int) -> list[int]:
        """Random token ids; equal numbers give equal ids."""
        import torch

        embeddings: Any = self.session.model.get_input_embeddings()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randint(embeddings.num_embeddings, (count,), generator=generator).tolist()

    def compressed(self) -> TensorPayload:
        """The KV of a prompt of `sizes.context` tokens, compressed; computed once."""
        import torch

        from ...serving.prompt_cache import PromptKV

        if self._compressed is None:
            with torch.no_grad():
                kv = PromptKV(self.session, PAGE)
                self._compressed = kv.compute(self.prompt(0, self.sizes.context), self.compression)
        return self._compressed

    @contextmanager
    def engine(
        self, device_tokens: float, compression: Compression | None = None, config: SchedulerConfig | None = None
    ) -> Iterator[Engine]:
        """An engine of the system `expected_time` with room for so many tokens, uncompressed, on the device."""
        from ...serving import LinearCosts, MemoryPool, ThreadedTransfer, Tier, build_system
        from ...serving.engine import Engine
        from ...serving.prompt_cache import PromptKV

        rate = PromptKV(self.session, PAGE).bytes_per_token()
        device = MemoryPool(int(device_tokens * rate), self.session.model.device)
        system = build_system(
            "expected_time", {Tier.DEVICE: device}, ThreadedTransfer(), costs=LinearCosts(300.0, (1e9, 1e9), 0.0),
            bytes_per_token=rate, clock=time.monotonic, page_size=PAGE, scheduler_config=config,
        )  # fmt: skip
        try:
            yield Engine(self.session, system, compression)
        finally:
            system.close("the benchmark is over")


def random_payload(kv: PromptKV, tokens: int) -> TensorPayload:
    """Random KV of a plain prompt of whole pages; all layers have the same."""
    import torch

    from ...serving import TensorPayload

    shape = 1, kv.geometry.num_kv_heads, tokens
    entry = {
        name: torch.randn(*shape, max(1, width)).to(dtype) if width else torch.zeros(*shape, 1, dtype=dtype)
        for name, dtype, width in kv.geometry.entry
    }
    tensors = {f"layers.{layer}.{name}": one for layer in kv.geometry.layers for name, one in entry.items()}
    return TensorPayload(tensors, tokens)


def store(engine: Engine, agent: str, prompt: Sequence[int], payload: TensorPayload) -> None:
    """Stores the KV of an agent's fixed prompt.

    Raises:
        RuntimeError: it does not fit.
    """
    from ...serving import AllocStatus

    status = engine.store(agent, prompt, payload)
    if status is not AllocStatus.READY:
        raise RuntimeError(f"the fixed prompt of {agent!r} was not stored: {status}")


def request(name: str, prompt: Sequence[int], tokens: int, **options: Any) -> Request:
    """A request whose answer has exactly so many tokens."""
    from ...serving import Request, SamplingParams

    return Request(name, prompt, tokens, sampling=SamplingParams(ignore_eos=True), **options)


def run(engine: Engine) -> list[RequestOutput]:
    """Steps until all requests have ended; returns their outputs.

    Raises:
        RuntimeError: one was not answered.
    """
    return [answered(output) for output in engine.run()]


def answered(output: RequestOutput) -> RequestOutput:
    """Returns `output`; RuntimeError if the request was not answered."""
    if output.error is not None:
        raise RuntimeError(f"{output.request.id} was not answered: {output.error}")
    return output


def step(engine: Engine, counts: Mapping[int, int] | None = None) -> dict[int, int]:
    """One step of the engine; returns how many tokens each request has by now, `counts` being those before.

    Raises:
        RuntimeError: a request failed.
    """
    after = dict(counts or {})
    for output in engine.step():
        answered(output)
    for event in engine.take_events():
        after[event.number] = after.get(event.number, 0) + len(event.tokens)
    return after
