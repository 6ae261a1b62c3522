"""The launcher's environment: settings passed on by accelerate, refused strategies, and signals that end a run."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import FrameType
from typing import Any

from .train_config import TrainConfig

logger = logging.getLogger(__name__)

RUN_AGAIN = 75
"""Exit status of an interrupted run that has saved its state: the same command continues it (EX_TEMPFAIL)."""
STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")  # the second has no meaning on Windows, which lacks it
PRECISIONS = ("no", "bf16", "fp16")


class TrainingInterrupted(Exception):
    """A signal ended the run: after a complete step, and the state is saved; or while model and data were loaded.

    Attributes:
        step: optimizer steps that are done and saved; None while loading, which changes nothing.
    """

    def __init__(self, step: int | None) -> None:
        done = "no step was begun and nothing was changed, and the same command runs again"
        if step is not None:
            done = f"the state of step {step} is saved, and the same command continues from it"
        super().__init__(f"interrupted; {done}")
        self.step = step


def with_launcher(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> TrainConfig:
    """Fills `mixed_precision` and `accumulation` from accelerate's launcher where `config` leaves them open.

    `accelerate launch` passes `--mixed_precision` (and "no" without one) in ACCELERATE_MIXED_PRECISION, and
    accumulation in ACCELERATE_GRADIENT_ACCUMULATION_STEPS.

    Raises:
        ValueError: both give a value and they differ; a strategy that gates are not trained under (DeepSpeed, FSDP1,
            Megatron, FSDP2 with weights on one rank only, accelerate's own context parallel), or fp8.
        ImportError: accelerate or the tracker is not installed.
    """
    _require_packages(config)
    _refuse_strategies(environment)
    theirs = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if theirs not in PRECISIONS:
        raise ValueError(f"got mixed_precision {theirs!r} from the launcher; accepted: {', '.join(PRECISIONS)}")
    precision: Any = config.mixed_precision or theirs
    if theirs != "no" and precision != theirs:
        raise ValueError(_contradiction("mixed_precision", precision, theirs))
    text = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    text = "1" if text == "auto" else text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"got {text!r} as ACCELERATE_GRADIENT_ACCUMULATION_STEPS; accepted: a whole number above 0")
    steps = int(text)
    accumulation = config.accumulation or steps
    if steps != 1 and accumulation != steps:
        raise ValueError(_contradiction("accumulation", accumulation, steps))
    return replace(config, mixed_precision=precision, accumulation=accumulation)


def _require_packages(config: TrainConfig) -> None:
    if find_spec("accelerate") is None:
        raise ImportError("training needs accelerate: pip install 'tenure[train]'")
    for tracker in config.tracker:
        if find_spec(tracker) is None:
            raise ImportError(f"got tracker {tracker}, which is not installed: pip install {tracker}")


def _contradiction(name: str, ours: Any, theirs: Any) -> str:
    return f"got {name} {ours} and {theirs} from the launcher; accepted: one of them, or the same value in both"


def _refuse_strategies(environment: Mapping[str, str]) -> None:
    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("1", "true", "yes")

    advice = "accepted: data parallel (accelerate's default) or FSDP2 (--use_fsdp --fsdp_version 2)"
    if on("ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        raise ValueError(
            f"got DeepSpeed{f' ZeRO-{stage}' if stage else ''} from the launcher; only gates have gradients and "
            f"optimizer states, so ZeRO-1 and ZeRO-2 save nothing, and ZeRO-3 is not supported; {advice}"
        )
    if on("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(f"got Megatron-LM from the launcher; {advice}")
    if on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {name: environment.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1") for name in ("cp", "tp", "sp")}
        given = ", ".join(f"parallelism_config_{name}_size {size}" for name, size in sizes.items() if size != "1")
        if given:
            raise ValueError(f"got {given} from the launcher; accepted: --context-parallel N of the training command")
    if on("ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2":
            raise ValueError(f"got FSDP version {environment.get('FSDP_VERSION', '1')} from the launcher; {advice}")
        if on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise ValueError(
                "got fsdp_cpu_ram_efficient_loading from the launcher, which leaves the weights out on all ranks but "
                "one; accepted: --fsdp_cpu_ram_efficient_loading false (files of weights are mapped, not copied)"
            )


@dataclass
class StopRequest:
    """Whether a signal asked this process to stop.

    Attributes:
        name: the signal's name, "" before one.
    """

    name: str = ""


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Inside the block SIGTERM, SIGUSR1 and the first Ctrl-C set the request; a second Ctrl-C interrupts at once.

    Outside the main thread, where Python allows no handlers, signals keep their meaning.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and request.name:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    with _handling(STOP_SIGNALS, note):
        yield request


@contextmanager
def loading() -> Iterator[None]:
    """Inside the block SIGTERM and SIGUSR1 raise TrainingInterrupted at once; Ctrl-C keeps its meaning."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TrainingInterrupted(None)

    with _handling([name for name in STOP_SIGNALS if name != "SIGINT"], interrupt):
        yield


@contextmanager
def _handling(names: Sequence[str], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that call `handler` inside the block; not outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, handler)
        for number in (getattr(signal, name) for name in names if hasattr(signal, name))
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
