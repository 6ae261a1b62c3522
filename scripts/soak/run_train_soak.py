"""`tenure soak train`: training runs of two processes that are killed, signalled and left without disk at random."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any, Literal

from ..output import OutputFile, make_console, write_json

logger = logging.getLogger(__name__)
Strategy = Literal["ddp", "fsdp2"]
Fault = Literal["kill", "term", "full"]
FAULTS: tuple[Fault, ...] = ("kill", "term", "full")
PROCESSES = 2
MOST_FAULTS = 5  # of one run, which is then left to end
DISK_BYTES = 32 << 20  # of the file system that is filled
START_SHARE = 0.1  # of the interruptions, which come before the first step
LIMIT_S = 120.0  # of one launch
NOTICE_S = 5.0  # after which a launcher ends the other process when one has died
SEEN_S = 0.002  # between two looks at the processes
# Modules of the process that all training processes are forked from, so that a launch takes no seconds of imports.
PRELOADED = ("tenure.training.trainer", "transformers.models.llama.modeling_llama", "accelerate", "matplotlib.figure",
             "matplotlib.backends.backend_agg", __name__)  # fmt: skip


@dataclass
class TrainSoakConfig:
    """Interrupt training runs of two processes at random moments and resume them; other bytes at the end fail.

    The interruptions are SIGKILL of one process or of both, SIGTERM to one of them, and a disk without space. A run
    with up to five of them must end with the same gates, optimizer states and logged losses as one without.
    """

    kills: int = 50
    """Interruptions under each strategy that met a running process."""
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp2")
    """Data parallel, and FSDP2."""
    steps: int = 120
    """Optimizer steps of a run; checkpoints are three steps apart."""
    disk: Path | None = None
    """Folder on a file system of its own, of at most 1 GiB, which is filled up; none: a tmpfs, which root may mount."""
    seed: int = 0
    """Of the interruptions."""
    json: OutputFile | None = None
    """Also write the counts to this file."""

    def __post_init__(self) -> None:
        if min(self.kills, self.steps) < 1:
            raise ValueError(f"got --kills {self.kills} --steps {self.steps}; accepted: 1 or more")


@dataclass
class TrainSoak:
    """Interrupted runs of one strategy.

    Attributes:
        disk: where runs are written; its file system is filled up.
        logs: folder of the processes' logs, on another disk.
        counts: of interruptions and runs, by their names in the table.
        faults: to choose from.
        expected: the results of a run without interruptions. start_s, steps_s: its seconds before its first step, and
            after it. checkpoint_bytes: of one of its checkpoints.
    """

    strategy: Strategy
    steps: int
    disk: Path
    logs: Path
    random: Random
    counts: Counter[str] = field(default_factory=Counter)
    faults: tuple[Fault, ...] = FAULTS
    expected: dict[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    steps_s: float = 0.0
    checkpoint_bytes: int = 0

    @property
    def folder(self) -> Path:
        """The output folder of every run, so that files which name it are the same."""
        return self.disk / "run"

    def reference(self) -> None:
        """A run without interruptions."""
        begun = time.monotonic()
        with self._launched() as processes:
            self._wait(processes, self._began)
            self.start_s = time.monotonic() - begun
            codes = self._ended(processes)
        if any(codes):
            raise RuntimeError(f"a run without interruptions ended with {codes}: {self._log_end()}")
        self.steps_s = time.monotonic() - begun - self.start_s
        self.expected = results(self.folder)
        newest = max((self.folder / "checkpoints").glob("step-*"))
        self.checkpoint_bytes = sum(path.stat().st_size for path in newest.iterdir())
        shutil.rmtree(self.folder)

    def run(self, kills: int) -> int:
        """A run with `kills` interruptions at most; returns those that met a running process.

        Raises:
            RuntimeError: a process did not end as it should, or the results differ.
        """
        met = 0
        while True:
            fault = self.random.choice(self.faults) if met < kills else None
            ended, hit = self._launch(fault)
            met += hit
            if hit:
                self.counts[f"{self.strategy}: {fault}"] += 1
            if ended:
                break
        found = results(self.folder)
        names = [name for name in {**found, **self.expected} if found.get(name) != self.expected.get(name)]
        if names:
            raise RuntimeError(f"after {met} interruptions these results differ: {', '.join(sorted(names))}")
        self.counts[f"{self.strategy}: runs"] += 1
        shutil.rmtree(self.folder)
        return met

    def _launch(self, fault: Fault | None) -> tuple[bool, bool]:
        """One launch, with an interruption at a random moment; whether the run ended, and whether it was met."""
        self.counts[f"{self.strategy}: launches"] += 1
        with self._launched() as processes:
            hit, began, step = False, False, 0
            if fault is None:
                codes = self._ended(processes)
            else:
                self._wait_for_a_moment(processes)
                began = self._began()
                step = last_step(self.folder) if began else 0  # before, the log is that of the launch before
                hit = all(one.is_alive() for one in processes)
                codes = getattr(self, f"_{fault}")(processes)
        if not any(codes):
            return True, False
        if fault is None or not hit:
            raise RuntimeError(f"the processes ended with {codes} and nothing interrupted them: {self._log_end()}")
        self._check(fault, codes, began, step)
        return False, True

    def _kill(self, processes: Sequence[BaseProcess]) -> list[int]:
        victims = self.random.choice((processes[:1], processes[1:], processes))
        for one in victims:
            one.kill()
        return self._ended(processes)

    def _term(self, processes: Sequence[BaseProcess]) -> list[int]:
        self.random.choice(processes).terminate()
        return self._ended(processes)

    def _full(self, processes: Sequence[BaseProcess]) -> list[int]:
        filler = self.disk / "filler"
        fill(filler, self.random.randrange(self.checkpoint_bytes))
        try:
            return self._ended(processes)
        finally:
            filler.unlink()

    def _check(self, fault: Fault, codes: Sequence[int], began: bool, step: int) -> None:
        """Raises RuntimeError for an end that an interruption should not have.

        Args:
            began: the launch had begun its first step, so signals were noticed. step: the last logged one.
        """
        from ...training.launch import RUN_AGAIN

        log = "".join(path.read_text(errors="replace") for path in self.logs.iterdir())
        if fault == "full" and f"No space left on device: '{self.disk}" not in log:
            raise RuntimeError(f"a full disk ended the processes with {codes} and named no file: {self._log_end()}")
        if fault == "term" and set(codes) == {RUN_AGAIN}:
            self.counts[f"{self.strategy}: saved at SIGTERM"] += 1
            if saved_step(self.folder) < step:
                raise RuntimeError(f"step {step} was logged before SIGTERM, and later ones are not saved")
        elif fault == "term" and began and not (self.folder / "gates").exists():
            raise RuntimeError(f"SIGTERM in a training run ended its processes with {codes}: {self._log_end()}")

    def _began(self) -> bool:
        """Whether the first process of this launch has opened its log, which it does before its first step."""
        log = self.folder / "metrics.jsonl"
        return log.exists() and log.stat().st_mtime > self.logs.stat().st_mtime

    @contextmanager
    def _launched(self) -> Iterator[list[BaseProcess]]:
        """The processes of a run, killed at the end of the block if they still run."""
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        port, processes = _free_port(), []
        for rank in range(PROCESSES):
            arguments = (rank, port, self.strategy, self.steps, str(self.folder), str(self.logs / f"rank{rank}"))
            processes.append(context.Process(target=train_process, args=arguments))
            processes[-1].start()
        try:
            yield processes
        finally:
            for one in processes:
                one.kill()
                one.join()

    def _wait(self, processes: Sequence[BaseProcess], reached: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Waits until something is reached, a process has ended, or the time is over."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end and all(one.is_alive() for one in processes) and not reached():
            time.sleep(SEEN_S)

    def _wait_for_a_moment(self, processes: Sequence[BaseProcess]) -> None:
        """A random time while the processes start, or in the rest of the steps."""
        share = self.random.random()
        if self.random.random() < START_SHARE:
            self._wait(processes, lambda: False, share * self.start_s)
            return
        rest = 1 - saved_step(self.folder) / self.steps
        self._wait(processes, self._began)
        self._wait(processes, lambda: False, share * rest * self.steps_s)

    def _ended(self, processes: Sequence[BaseProcess]) -> list[int]:
        """Exit codes, minus the signal's number for killed processes; as launchers do, one's failure ends the other.

        Raises:
            RuntimeError: no process ends.
        """
        self._wait(processes, lambda: False)
        if all(one.is_alive() for one in processes):
            raise RuntimeError(f"no process has ended after {LIMIT_S:g} s: {self._log_end()}")
        end = time.monotonic() + NOTICE_S
        while time.monotonic() < end and any(one.is_alive() for one in processes):
            time.sleep(SEEN_S)
        for one in processes:
            if one.is_alive():
                self.counts[f"{self.strategy}: ended by the launcher"] += 1
                one.kill()
                one.join()
        return [one.exitcode or 0 for one in processes]

    def _log_end(self) -> str:
        return " | ".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.logs.iterdir()))


def main(config: TrainSoakConfig) -> int:
    console = make_console()
    begun = time.monotonic()
    with small_disk(config.disk) as disk:
        counts, failures = soak(config, disk, lambda text: console.print(text))
    for name, value in counts.items():
        console.print(f"{name:<32} {value:>14,}")
    for failure in failures:
        console.print(f"failure: {failure}", markup=False)
    console.print(f"{time.monotonic() - begun:.0f} s")
    if config.json:
        write_json({**counts, "failures": failures}, config.json)
    return 1 if failures else 0


def soak(config: TrainSoakConfig, disk: Path, say: Callable[[str], None]) -> tuple[dict[str, int], list[str]]:
    """Runs until there were as many interruptions as asked for; counts by name, and failures in words."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for strategy in config.strategies:
        with tempfile.TemporaryDirectory() as logs:
            random = Random(f"{config.seed}/{strategy}")
            own = TrainSoak(strategy, config.steps, disk, Path(logs) / "logs", random, counts)
            shutil.rmtree(own.folder, ignore_errors=True)
            own.reference()
            say(f"{strategy}: {config.steps} steps without interruptions took {own.start_s:.1f} + {own.steps_s:.1f} s")
            done = 0
            while done < config.kills:
                try:
                    met = own.run(min(own.random.randint(1, MOST_FAULTS), config.kills - done))
                except RuntimeError as error:
                    failures.append(f"{strategy}, after {done} interruptions: {error}")
                    shutil.rmtree(own.folder, ignore_errors=True)
                    met = 1
                done += met
                say(f"{strategy}: {done} interruptions, {len(failures)} failures")
    return dict(sorted(counts.items())), failures


def results(folder: Path) -> dict[str, str]:
    """Digests of a finished run's gates, of its last checkpoint, and of its log without times, by their names."""
    files = sorted((folder / "gates").iterdir())
    files += sorted(max((folder / "checkpoints").glob("step-*")).iterdir())
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_s", None)
    return found | {"metrics.jsonl": hashlib.sha256(json.dumps(lines).encode()).hexdigest()}


def saved_step(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    return max((int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def last_step(folder: Path) -> int:
    """The step of the last whole line of a run's log; 0 without one."""
    try:
        return json.loads((folder / "metrics.jsonl").read_text().rpartition("\n")[0].rpartition("\n")[2])["step"]
    except (OSError, ValueError):
        return 0


def fill(path: Path, free: int) -> None:
    """Writes a file that leaves about `free` bytes of its file system."""
    with path.open("wb", buffering=0) as file:
        size = 0
        try:
            while True:
                size += file.write(bytes(1 << 20))
        except OSError:
            file.truncate(max(0, size - free))


@contextmanager
def small_disk(folder: Path | None) -> Iterator[Path]:
    """A folder on a small file system: the given one, or a tmpfs that is mounted inside the block.

    Raises:
        ValueError: a tmpfs cannot be mounted, or the folder's file system is larger than 1 GiB.
    """
    if folder is not None:
        if not folder.is_dir() or shutil.disk_usage(folder).total > 1 << 30:
            raise ValueError(f"got --disk {folder}; accepted: a folder on a file system of at most 1 GiB, to be filled")
        yield folder
        return
    with tempfile.TemporaryDirectory() as point:
        options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", point]
        mounted = shutil.which("mount") and subprocess.run(["mount", *options], capture_output=True, text=True)
        if not mounted or mounted.returncode:
            why = mounted.stderr.strip() if mounted else "there is no command mount"
            raise ValueError(f"no tmpfs can be mounted ({why}); accepted: --disk FOLDER on a small file system")
        try:
            yield Path(point)
        finally:
            subprocess.run(["umount", point], check=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def train_process(rank: int, port: int, strategy: Strategy, steps: int, folder: str, log: str) -> None:
    """One process of a training run, which writes its output to the file `log` and ends with the run's exit status."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, for the process that started this one
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ...training import TrainConfig, TrainingInterrupted, train
    from ...training.launch import RUN_AGAIN

    torch.set_num_threads(1)
    if strategy == "fsdp2":
        shard_on_cpu()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=32, intermediate_size=48, **sizes))
    config = TrainConfig(
        output_dir=folder, steps=steps, warmup_steps=2, learning_rate=5e-3, gate_width=16, initial_bias=4.0,
        lengths=(64,), capacity_samples=16, log_every=30, save_every=3, gradient_checkpointing=False,
    )  # fmt: skip
    try:
        train(config, model, _Documents())
    except TrainingInterrupted:
        sys.exit(RUN_AGAIN)


class _Documents:
    """Random tokens, the second half of them targets."""

    def digest(self) -> str:
        return "random tokens"

    def __getitem__(self, index: int) -> Any:
        from ...training import Example

        random = Random(index)
        return Example([random.randrange(3, 128) for _ in range(64)], [place >= 32 for place in range(64)], "text")


def shard_on_cpu() -> None:
    """FSDP2 over gloo: accelerate turns it on for accelerators only, while the code behind it runs on a CPU too."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
