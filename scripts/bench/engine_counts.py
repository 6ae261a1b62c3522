"""Rows of `tenure bench engine` that are counts: bytes held, and tokens computed for related prompts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .benching import BenchRow
from .engine_runs import PAGE, EngineBench, answered, random_payload, request, run, step, store

if TYPE_CHECKING:
    import torch

    from ...serving.engine import Engine

MIB = 2**20


def _tensors() -> list[torch.Tensor]:
    """All tensors with memory of their own; subclasses, such as the fake ones of torch's tracing, have none."""
    import torch

    return [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]


@contextmanager
def watched_storages() -> Iterator[Callable[[], dict[int, int]]]:
    """Yields a function that returns the bytes of every storage made in the block that a tensor has, by address."""
    gc.collect()
    kept = _tensors()  # so that no address is used again
    known = {one.untyped_storage().data_ptr() for one in kept}
    gc.freeze()  # what there is now is neither collected nor looked at again: a collection takes no time

    def storages() -> dict[int, int]:
        gc.collect()
        found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _tensors()}
        return {address: nbytes for address, nbytes in found.items() if address not in known}

    try:
        yield storages
    finally:
        kept.clear()
        gc.unfreeze()


def memory_rows(bench: EngineBench) -> Iterator[BenchRow]:
    """Bytes of all tensors but the model's over what the pool counts, where the share is largest.

    `sizes.batch` requests and half as many again run over one stored prompt, plain and compressed; they join two steps
    apart and leave at different times. Of the pool's buffers only the pages that somebody holds count as held.
    """
    sizes = bench.sizes
    for name, compression in (("", None), ("/compressed", bench.compression)):
        payload: Any = None if compression is None else bench.compressed()
        room = 2 * sizes.context + 2 * sizes.batch * (sizes.tokens + 5 * PAGE)
        with watched_storages() as storages, bench.engine(room, compression) as engine:
            prompt = bench.prompt(0, sizes.context)
            store(engine, "agent", prompt, payload or random_payload(engine.kv, sizes.context))
            lengths = [sizes.tokens // 2 + i % 4 * (sizes.tokens // 2) // 3 for i in range(sizes.batch * 3 // 2)]
            waiting = [
                request(f"r{i}", prompt + bench.prompt(i + 1, PAGE), n, agent="agent", fixed_tokens=sizes.context)
                for i, n in enumerate(lengths)
            ]
            most, measured = (0, 1), 0
            while waiting or len(engine.system.scheduler):
                if waiting and measured % 2 == 0:
                    engine.submit(waiting.pop())
                step(engine)
                measured += 1
                most = max(most, _held_and_counted(engine, storages()), key=lambda both: both[0] / both[1])
        held, counted = (value / MIB for value in most)
        yield BenchRow(f"memory/held_vs_counted{name}", held, counted, held / counted, "MiB", measured, "<= 1.02")


def _held_and_counted(engine: Engine, storages: dict[int, int]) -> tuple[int, int]:
    """Bytes that the engine's tensors hold, of its pool only the pages in use, and those that the pool counts."""
    from ...serving import Tier

    pages, pool = engine.pages, engine.system.tiers.pools[Tier.DEVICE]
    buffers = {buffer.untyped_storage().data_ptr() for buffer in pages.buffers.values()}
    others = sum(nbytes for address, nbytes in storages.items() if address not in buffers)
    held = (pages.num_pages - pages.num_free) * pages.geometry.page_bytes
    return others + held, pool.used


def fanout_rows(bench: EngineBench) -> Iterator[BenchRow]:
    """Tokens computed for requests that arrive together and begin with the same new prompt."""
    sizes = bench.sizes
    for name, compression in (("", None), ("/compressed", bench.compression)):
        with bench.engine(sizes.batch * (sizes.shared + 4 * PAGE), compression) as engine:
            shared = bench.prompt(0, sizes.shared)
            for i in range(sizes.batch):
                prompt = shared + bench.prompt(i + 1, PAGE)
                engine.submit(request(f"r{i}", prompt, 2, agent="agent", fixed_tokens=sizes.shared))
            run(engine)
            computed = engine.system.scheduler.metrics.prefill_tokens
        needed = sizes.shared + sizes.batch * PAGE
        label = f"fanout/{sizes.batch}x{sizes.shared}/computed_vs_needed{name}"
        yield _tokens_row(label, computed, needed, "<= 1.05")


def retry_row(bench: EngineBench) -> BenchRow:
    """Tokens computed until a client is answered that cancels and asks again after every few chunks of its prompt."""
    from ...serving import SchedulerConfig

    sizes = bench.sizes
    config = SchedulerConfig(prefill_chunk_size=sizes.chunk)
    prompt = bench.prompt(0, sizes.retried)
    with bench.engine(2 * sizes.retried + 4 * PAGE, config=config) as engine:
        scheduler = engine.system.scheduler
        for attempt in range(-(-sizes.retried // (sizes.chunk * sizes.patience))):
            number = engine.submit(request(f"try{attempt}", prompt, 2))
            for _ in range(sizes.patience):
                engine.step()
            engine.cancel(number)
        last = engine.submit(request("last", prompt, 2))
        (output,) = (each for each in engine.run() if each.number == last)
        answered(output)
        computed = scheduler.metrics.prefill_tokens
    return _tokens_row("retry/computed_vs_needed", computed, sizes.retried, "<= 1.1")


def conversation_row(bench: EngineBench) -> BenchRow:
    """Tokens computed in the turns of an agent's conversation, with its fixed prompt compressed and without."""
    sizes = bench.sizes
    ours, theirs = (_conversation(bench, how) for how in (bench.compression, None))
    assert sizes.turns * sizes.turn <= theirs
    return _tokens_row("conversation/compressed/computed_vs_plain", ours, theirs, "<= 1.1")


def _conversation(bench: EngineBench, compression: Any) -> int:
    sizes, answer = bench.sizes, 4
    length = sizes.fixed + sizes.turns * (sizes.turn + answer)
    with bench.engine(3 * length, compression) as engine:
        talk = bench.prompt(0, sizes.fixed)
        for turn in range(sizes.turns):
            talk += bench.prompt(turn + 1, sizes.turn)
            engine.submit(request(f"t{turn}", talk, answer, agent="agent", fixed_tokens=sizes.fixed, session="talk"))
            (output,) = run(engine)
            talk += output.tokens
        return engine.system.scheduler.metrics.prefill_tokens


def _tokens_row(name: str, computed: int, needed: int, target: str) -> BenchRow:
    return BenchRow(name, computed, needed, computed / needed, "tokens", 1, target)
