"""`tenure soak`: random load with faults on tiers, prefetch, scheduler and engine, checked after every step."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

from ..output import OutputFile, make_console, write_json

logger = logging.getLogger(__name__)
LIFE = 300  # steps of one world
CLIENTS_S = 20.0  # seconds of one engine behind clients in threads


@dataclass
class SoakConfig:
    """Run random steps on a virtual clock, then threads on the real one; errors, lost requests and leaks fail.

    The engine is tried with a tiny real model, whose every answer is compared token for token.
    """

    steps: int = 1_000_000
    """Steps on the virtual clock, each followed by an integrity check; 0 skips this part."""
    seconds: float = 600.0
    """Duration of the threaded part, with a lowered switch interval and a watchdog; 0 skips it."""
    engine_steps: int = 0
    """Actions on an engine with a tiny model, each followed by a check of memory; 0 skips this part."""
    engine_seconds: float = 0.0
    """Duration of an engine behind clients in threads; 0 skips it."""
    seed: int = 0
    """Random seed. A failure names the seed of its world, which `--only` repeats."""
    only: int | None = None
    """Run only the world with this seed."""
    json: OutputFile | None = None
    """Also write the counts to this file."""

    def __post_init__(self) -> None:
        for name in ("steps", "seconds", "engine_steps", "engine_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"got --{name.replace('_', '-')} {getattr(self, name)}; accepted: 0 or more")


def main(config: SoakConfig) -> int:

    logging.getLogger("tenure.serving").setLevel(logging.CRITICAL)  # faults are injected on purpose
    counts: dict[str, Any] = {}
    if config.steps:
        counts |= _with_progress(config)
    if config.seconds:
        counts |= threads(config.seconds, config.seed)
    if config.engine_steps or config.engine_seconds:
        counts |= engines(config.engine_steps, config.engine_seconds, config.seed, config.only)
    console = make_console()
    for name, value in counts.items():
        console.print(f"{name:<32} {value:>14,}" if isinstance(value, int) else f"{name:<32} {value:>14,.1f}")
    if config.json:
        write_json(counts, config.json)
    return 0


def _with_progress(config: SoakConfig) -> dict[str, Any]:
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("steps", total=config.steps)
        return worlds(config.steps, config.seed, config.only, lambda done: progress.update(task, advance=done))


def worlds(steps: int, seed: int, only: int | None = None, advance: Any = None) -> dict[str, Any]:
    """Lives of `LIFE` steps one after the other; returns what happened in them, in numbers."""
    counts: Counter[str] = Counter()
    begun, number = time.monotonic(), 0
    while counts["steps"] < steps:
        own = seed * 1_000_003 + number if only is None else only
        try:
            counts.update(one_world(own))
        except BaseException:
            logger.error("in the world of the seed %d: tenure soak --seconds 0 --only %d", own, own)
            raise
        number += 1
        if advance is not None:
            advance(LIFE)
        if only is not None:
            break
    return {**counts, "seconds of steps": time.monotonic() - begun}


def one_world(seed: int) -> dict[str, int]:
    """One life of a system chosen by the seed."""
    from .world import BELOW, SYSTEMS, World, random_step

    random = Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        name, below = random.choice(SYSTEMS), random.choice(BELOW)
        world = World(name, below, folder, compressed=random.random() < 0.5, pages=random.random() < 0.5)
        for _ in range(LIFE):
            random_step(world, random)
            world.check()
        world.end()
    return {"steps": LIFE, **world.counts()}


def threads(seconds: float, seed: int) -> dict[str, Any]:
    """The systems that prefetch, one after the other, each for a third of the time."""
    from .stress import Stress

    counts: Counter[str] = Counter()
    for number in range(3):
        with tempfile.TemporaryDirectory() as folder:
            stress = Stress(folder, 3 * seed + number)
            stress.run(seconds / 3)
            counts.update({f"threads: {outcome.value}": n for outcome, n in stress.ended.items()})
            counts.update({"threads: tokens read back": stress.read, "threads: refused": stress.refused})
            counts["threads: hints"] += stress.hints
            counts["threads: preemptions"] += stress.system.scheduler.metrics.preemptions
    return {**counts, "seconds of threads": seconds}


def engines(steps: int, seconds: float, seed: int, only: int | None = None) -> dict[str, Any]:
    """Lives of engines on a tiny model, of `LIFE` actions and of `CLIENTS_S` seconds; what happened, in numbers."""
    from .engine_world import clients_life, engine_life, tiny_answers

    counts: Counter[str] = Counter()
    begun, number = time.monotonic(), 0
    with tiny_answers() as answers:
        while counts["engine: actions"] < steps:
            own = seed * 1_000_003 + number if only is None else only
            try:
                found = engine_life(answers, own, min(LIFE, steps))
            except BaseException:
                again = f"tenure soak --steps 0 --seconds 0 --engine-steps {min(LIFE, steps)} --only {own}"
                logger.error("in the life of the seed %d: %s", own, again)
                raise
            counts.update({f"engine: {name}": n for name, n in found.items()})
            number += 1
            if number % 100 == 0:
                logger.info("%d actions on engines, %.0f s", counts["engine: actions"], time.monotonic() - begun)
            if only is not None:
                break
        left = seconds
        while left > 0:
            counts.update(clients_life(answers, seed + number, min(left, CLIENTS_S)))
            left, number = left - CLIENTS_S, number + 1
    return {**counts, "seconds of engines": time.monotonic() - begun}
