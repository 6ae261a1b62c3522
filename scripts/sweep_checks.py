"""Validation of `tenure sweep` before any work starts, and the settings it records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..eval import Cell
    from ..eval.sweep import SweepConfig
    from ..eval.tasks.builder import CaseBuilder, MixedCaseBuilder
    from ..retention import RetentionGates

QUESTION_TOKENS = 256  # room for the question and the answer


@dataclass(frozen=True)
class SweepJob:
    """A validated sweep.

    Attributes:
        cells: measured on each case.
        tokenizer: the model's.
        builder: the cases of a length and a seed.
        settings: everything that determines the results, for settings.json.
        threads: CPU threads per process; None: torch decides.
    """

    cells: list[Cell]
    tokenizer: Any
    builder: Callable[[int, int], CaseBuilder | MixedCaseBuilder]
    settings: dict[str, Any]
    threads: int | None


def check(sweep: SweepConfig, devices: Sequence[str]) -> SweepJob:
    """Validates a sweep and loads everything except the model's weights.

    Raises:
        ValueError: an unknown policy, scope or task; a budget out of range; contexts beyond the model's, or too short
            for a task; no gates, or gates of another shape; no such model or texts.
    """
    from ..eval import check_inputs, get_task
    from ..eval.harness.options import Options, check_config, find_config

    for task in sweep.tasks:
        get_task(task)
    cells = sweep.cells()
    gates = load_gates(sweep, cells)
    source, model_config = find_config(sweep.model, {"revision": sweep.revision})
    check_inputs(model_config, cells, max(sweep.lengths), gates, QUESTION_TOKENS)
    check_config(Options(policy="full"), gates, model_config, {})  # decoders only, and gates of the model's shape
    texts = load_texts(sweep)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, revision=sweep.revision)
    builder = partial(make_builder, tokenizer, texts)
    for length in sweep.lengths:
        first = builder(length, sweep.seeds[0])
        for task, kind in product(sweep.tasks, range(min(sweep.cases, len(texts)))):
            first.case(task, kind)  # refuses a length that cannot hold the task
    every = [text for kind in texts for text in kind]
    settings = _settings(sweep, cells, gates, every, devices[0], model_config)
    return SweepJob(cells, tokenizer, builder, settings, _threads(sweep, devices))


def make_builder(
    tokenizer: Any, texts: Sequence[Sequence[str]], length: int, seed: int
) -> CaseBuilder | MixedCaseBuilder:
    """The cases of a length and a seed over the texts, one list for each kind."""
    from ..eval.tasks.builder import CaseBuilder, MixedCaseBuilder

    builders = [CaseBuilder(tokenizer, kind, length, seed) for kind in texts]
    return builders[0] if len(builders) == 1 else MixedCaseBuilder(builders)


def load_texts(sweep: SweepConfig) -> list[list[str]]:
    """The held-out texts that cases are built from, one list for each of the sweep's sources.

    Raises:
        ValueError: there are none."""
    from ..training.assets import resolve_texts

    return [[document.text for document in resolve_texts(source, "eval")] for source in sweep.data_sources]


def load_gates(sweep: SweepConfig, cells: Sequence[Cell]) -> RetentionGates | None:
    """The gates, on the CPU, if any cell needs them.

    Raises:
        ValueError: they cannot be found or used."""
    from ..retention import RetentionGates
    from .loading import find_gates

    if not any("log_beta" in cell.policy.needs for cell in cells):
        return None
    return RetentionGates.from_pretrained(find_gates(sweep.model, sweep.gates))


def pick_devices(devices: Sequence[str], processes: int) -> list[str]:
    """The device of each process.

    Raises:
        ValueError: a device is missing, devices are of two kinds, or both devices and processes are given.
    """
    import torch

    from ..eval.runner import find_device

    if processes > 1 and devices:
        raise ValueError("--devices and --processes exclude each other: each device has one process")
    if processes > 1:
        return ["cpu"] * processes
    names = list(devices) or ["cuda" if torch.cuda.is_available() else "cpu"]
    if len({find_device(name, "--devices").type for name in names}) > 1:
        raise ValueError(f"--devices has {', '.join(names)}; devices of one kind are accepted, whose numbers agree")
    return names


def _threads(sweep: SweepConfig, devices: Sequence[str]) -> int | None:
    import os

    if sweep.threads is not None or len(devices) == 1 or devices[0] != "cpu":
        return sweep.threads
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // len(devices))


def _settings(
    sweep: SweepConfig, cells: Sequence[Cell], gates: RetentionGates | None, texts: Sequence[str], device: str,
    model_config: Any,
) -> dict[str, Any]:  # fmt: skip
    from ..eval.sweep import all_units
    from ..training.assets import DEMO_MODEL_ID, MODEL_WHEEL
    from .loading import run_versions

    kind = device.split(":")[0]
    demo = sweep.model == "demo"
    wheel = f"{MODEL_WHEEL.project} {MODEL_WHEEL.version}"
    commit = getattr(model_config, "_commit_hash", None) or sweep.revision or ""
    dtype = sweep.dtype if sweep.dtype != "auto" else "float32" if kind == "cpu" else "bfloat16"
    return {
        "sweep": sweep.settings(),
        "model": {"id": DEMO_MODEL_ID if demo else sweep.model, "revision": wheel if demo else commit},
        "gates": None if gates is None else _gates_settings(sweep),
        "texts": {"documents": len(texts), "sha256": _sha256(text.encode() for text in texts)},
        "device": kind,
        "dtype": dtype,
        "versions": run_versions(),
        "units": len(all_units(sweep)),
        "cells": [[*cell.key, cell.aware] for cell in cells],
    }


def _gates_settings(sweep: SweepConfig) -> dict[str, Any]:
    from ..retention.checkpoint import load_checkpoint, local_folder
    from .loading import find_gates

    document, _ = load_checkpoint(local_folder(find_gates(sweep.model, sweep.gates)))
    return {"folder": sweep.gates or "examples/smollm2-135m-gates", "sha256": document["weights_sha256"]}


def _sha256(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
