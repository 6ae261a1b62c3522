"""`tenure sweep`: evaluate policies × budgets on many cases; resumable, one process per device."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .loading import find_example, load_model, needs_checkout
from .output import OutputFile, OutputFolder, Python
from .sweep_checks import check, load_gates, load_texts, make_builder, pick_devices

if TYPE_CHECKING:
    from ..eval.sweep import Failure, SweepConfig, Unit, UnitRunner
    from ..eval.sweep.process_pool import Finished, Prepare

SHOWN_FAILURES = 20
EVERY_S = 30.0  # between two lines of progress where stderr is no terminal


@dataclass
class SweepCommand:
    """Measure every policy at every budget on the cases of a YAML file (examples/sweep_smollm2.yaml).

    Each case's context is read once for all policies and budgets. Results are appended to part-K.jsonl in `--output`,
    one line per case and cell; the same command resumes an interrupted sweep. Failures are recorded and do not stop the
    sweep; the exit status is then 1. `tenure report OUTPUT` renders the results as a page.
    """

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="YAML")]
    """Definition of the sweep; docs/reference/config.md lists the keys."""
    output: OutputFolder | None = None
    """Folder for the results; by default the one in the YAML file."""
    devices: list[str] = field(default_factory=list)
    """Devices, with one process each: cuda:0 cuda:1 …, or cpu. By default the GPU if there is one."""
    processes: int = 1
    """Number of processes on the CPU."""
    model: str | None = None
    """Overrides the model of the YAML file."""
    gates: str | None = None
    """Overrides the gates of the YAML file: a folder, demo or hub:OWNER/NAME."""
    question: Literal["agnostic", "aware", "both"] | None = None
    """Overrides the YAML file: compress caches before the question is read (agnostic), after it (aware), or both."""
    cases: int | None = None
    """Overrides the YAML file: cases per task, length and seed."""
    retry_failed: bool = False
    """Run cases with failures again."""
    export_cases: OutputFile | None = None
    """Only write the cases to this file, one JSON line each, for use by other programs."""
    kvpress: Annotated[Python | None, tyro.conf.arg(metavar="PYTHON")] = None
    """Run the same cases with kvpress instead: the Python of an environment that has it, from a checkout
    (examples/sweep_kvpress.yaml)."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"--processes is {self.processes}; 1 or more is accepted")
        if self.kvpress is not None and any(name != "cpu" for name in self.devices):
            raise ValueError(f"--kvpress runs on the CPU; --devices has {', '.join(self.devices)}")


def main(config: SweepCommand) -> int:
    from ..eval.sweep import SweepConfig, SweepFolder, all_units, export_cases, run_units

    given = {name: getattr(config, name) for name in ("model", "gates", "question", "cases")}
    changes = {name: value for name, value in given.items() if value is not None}
    sweep = SweepConfig.from_yaml(find_example(config.config), **changes)
    devices = pick_devices(config.devices, config.processes)
    job = check(sweep, devices)
    start: Prepare = partial(prepare, sweep, job.threads)
    if config.kvpress is not None:
        with needs_checkout():
            from .bench.sweep_kvpress import check_kvpress, prepare_kvpress
        job.settings["kvpress"] = check_kvpress(config.kvpress, sweep, job.cells)
        start = partial(prepare_kvpress, config.kvpress, sweep, job.threads)
    units = all_units(sweep)
    if config.export_cases is not None:
        count = export_cases(config.export_cases, units, job.builder, job.tokenizer)
        print(f"{count} cases written to {config.export_cases}")
        return 0
    folder = Path(sweep.output) if config.output is None else config.output
    session = _session(devices, job.threads, sweep.together)
    with SweepFolder(folder, job.settings, session, config.retry_failed) as store:
        left = [unit for unit in units if unit not in store.done]
        _say(f"{len(units) - len(left)} of {len(units)} cases are there, {len(left)} to do on {', '.join(devices)}")
        progress = _Progress(left)
        lost = run_units(start, devices, left, folder, progress) if left else []
        progress.end()
        return _conclude(folder, store.failures(), lost, len(units) * len(job.cells))


def prepare(sweep: SweepConfig, threads: int | None, device: str) -> UnitRunner:
    """Loads everything that a worker process needs; called in that process.

    Raises:
        ValueError: the gates were made for another model, or the device cannot be used.
    """
    import torch

    from ..eval.sweep import UnitRunner

    if threads is not None:
        torch.set_num_threads(threads)
    texts, cells = load_texts(sweep), sweep.cells()
    dtype: Any = sweep.dtype
    model, tokenizer = load_model(sweep.model, device, dtype, sweep.revision)
    gates = load_gates(sweep, cells)
    if gates is not None:
        gates.check_model(model)
        gates.to(model.device)
    builder = partial(make_builder, tokenizer, texts)
    return UnitRunner(model, tokenizer, cells, builder, gates, sweep.sinks, sweep.recent, sweep.together)


def _session(devices: Sequence[str], threads: int | None, together: int) -> dict[str, Any]:
    """When and where this session ran: affects timings, not answers."""
    import platform

    import torch

    cuda = [torch.cuda.get_device_name(name) for name in devices if name.startswith("cuda")]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "devices": list(devices),
        "device_names": cuda or [platform.processor() or platform.machine()],
        "threads": torch.get_num_threads() if threads is None else threads,
        "together": together,
        "python": platform.python_version(),
        "command": sys.argv[1:],
    }


def _conclude(folder: Path, failures: Sequence[Failure], lost: Sequence[Unit], records: int) -> int:
    """Reports failures and returns the exit status."""
    for failure in failures[:SHOWN_FAILURES]:
        _say(f"failed: {failure.name}: {failure.error}")
    if len(failures) > SHOWN_FAILURES:
        _say(f"failed: {len(failures) - SHOWN_FAILURES} more; `tenure report {folder}` lists all")
    for unit in lost[:SHOWN_FAILURES]:
        _say(f"not run, since a process died: {unit.name}")
    if failures:
        _say(f"{len(failures)} failed; add --retry-failed to run these cases again")
    if lost:
        _say(f"{len(lost)} cases were not run; the same command runs them")
    print(f"{folder}: {'unfinished' if lost else 'finished'}, {records} results wanted, {len(failures)} failures")
    return 1 if failures or lost else 0


class _Progress:
    """A progress line on stderr; the time left assumes that a case's time is proportional to its context length."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units, self._tokens = len(units), sum(unit.length for unit in units)
        self.done = self.failed = self._read = 0
        self._started = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, finished: Finished) -> None:
        self.done += 1
        self.failed += len(finished.failures)
        self._read += finished.unit.length
        now = time.monotonic()
        if self._terminal or self.done in (1, self.units) or now - self._last >= EVERY_S:
            self._last = now
            left = (now - self._started) * (self._tokens - self._read) / self._read
            self._show(
                f"{self.done} of {self.units} cases, {self.failed} failures, about {_span(left)} left; "
                f"{finished.unit.name} took {finished.seconds:.1f} s"
            )

    def end(self) -> None:
        if self._terminal and self.done:
            print(file=sys.stderr)

    def _show(self, text: str) -> None:
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        else:
            _say(text)


def _span(seconds: float) -> str:
    """`2 h 05 min`, `7 min` or `40 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{rest} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
