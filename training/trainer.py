"""The training loop: accelerate's devices and processes around `GateObjective`, resumable to the last bit."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..retention import CheckpointInfo, RetentionGates, SoftEviction
from ..retention.context_parallel import ContextGroup
from .assets import DEMO_MODEL_ID
from .batches_ahead import BatchesAhead
from .batching import Batch, collate
from .data import Example, ExampleSource, example_names
from .digests import base_digest, data_digest
from .launch import StopRequest, TrainingInterrupted, stop_signals, with_launcher
from .objective import GateObjective, Losses
from .processes import average_gradients, broadcast_tensors, on_main, require_same
from .run_log import MetricsLog, occupancy_metrics
from .run_state import RunState, apply_state, latest_state, read_state, save_state
from .train_config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not change the loss curve.
FREE_SETTINGS = frozenset(
    {"output_dir", "log_every", "log_seconds", "save_every", "save_minutes", "eval_every", "eval_budgets", "eval_cases"}
    | {"eval_length", "best_metric", "best_mode", "extend", "skip_nonfinite", "data_workers"}
    | {"tracker", "project", "init_gates", "logits_chunk", "gradient_checkpointing", "context_parallel"}
    | {"save_attention"}
)
# gloo's threads give back the tensors of finished collectives under Python's lock, which the thread that destroys their
# group holds while it waits for them: they get this time before.
SETTLE_SECONDS = 0.2
Evaluate = Callable[["PreTrainedModel", RetentionGates], dict[str, float]]


class NotFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the examples and the last good checkpoint."""


def train(
    config: TrainConfig, model: PreTrainedModel, source: ExampleSource, pad_token_id: int = 0,
    evaluate: Evaluate | None = None, progress: Callable[[int, dict[str, float]], None] | None = None,
    held_out: Sequence[Example] = (),
) -> RetentionGates:  # fmt: skip
    """Trains gates for `model` and saves them to `config.output_dir/gates`.

    Resumes from the newest checkpoint in `config.output_dir/checkpoints` if there is one; rank 0 reads it for all, so
    that folder need not be shared. Micro-batch `m` of process `r` at step `s` takes the examples from
    `((s · accumulation + m) · processes + r) · batch_size` on, so one process with accumulation n sees what n
    processes see; with `context_parallel`, groups of processes take the place of processes. Under FSDP2 the frozen
    model is sharded and the gates are whole on every process.

    Args:
        model: on the CPU; accelerate moves it. It is frozen.
        source: training examples.
        pad_token_id: fills rows of unequal length.
        evaluate: called every `config.eval_every` steps on every process (a sharded model computes on all of them
            together); the values of the main process are logged.
        progress: called after every step on the main process with the step's losses.
        held_out: examples whose losses are logged every `config.eval_every` steps, as `eval/held_out_…`.

    Returns:
        The trained gates.
    Raises:
        NotFiniteError: a loss or gradient became NaN or infinite, more often than `config.skip_nonfinite`; nothing is
            saved after the last good checkpoint.
        TrainingInterrupted: SIGTERM, SIGUSR1 or Ctrl-C reached any process; the state is saved.
        ValueError: the checkpoint in `output_dir` was made with other settings, data or base model; the processes have
            different data; the launcher's settings contradict `config` or are not supported.
        OSError: a checkpoint cannot be written; the message names the file.
    """
    with stop_signals() as stop, ExitStack() as closing:
        run = _TrainingRun(with_launcher(config), model, source, pad_token_id, evaluate, held_out)
        closing.callback(run.close)
        while run.step < run.config.last_step:
            if run.evaluation_due:  # of the step before; a resumed run makes up for it
                run.evaluate()
            values = run.advance(stop)
            if progress is not None and run.accelerator.is_main_process:
                progress(run.step, values)
            if run.stopping and run.step < run.config.last_step:
                run.save()
                run.end()
                raise TrainingInterrupted(run.step)
            if run.evaluation_due:
                run.evaluate()
            if run.save_due:
                run.save()
        return run.finish()


class _TrainingRun:
    """One process of a training run, which has done `step` optimizer steps."""

    def __init__(
        self, config: TrainConfig, model: PreTrainedModel, source: ExampleSource, pad_token_id: int,
        evaluate: Evaluate | None, held_out: Sequence[Example],
    ) -> None:  # fmt: skip
        assert config.accumulation is not None
        self.config, self.source, self.pad_token_id = config, source, pad_token_id
        self._evaluate, self._held_out = evaluate, held_out
        self.accumulation = config.accumulation
        self.output_dir = Path(config.output_dir)
        self.accelerator = _accelerator(config)
        context = ContextGroup.of_size(config.context_parallel) if config.context_parallel > 1 else None
        torch.manual_seed(config.seed)
        self.gates = _initial_gates(config, model)
        name = DEMO_MODEL_ID if config.model == "demo" else config.model
        self.info = CheckpointInfo.for_model(model, base_model=name, training=config.to_dict())
        objective = GateObjective(
            model.eval(), self.gates, config.budget, config.scope, config.capacity_weight, config.capacity_samples,
            config.logits_chunk,
            evictions=[SoftEviction(budget, config.eviction_temperature) for budget in config.eviction_budgets],
            ntp_weight=config.ntp_weight, kl_weight=config.kl_weight, kl_direction=config.kl_direction,
            context=context,
        )  # fmt: skip
        if config.gradient_checkpointing:
            objective.enable_gradient_checkpointing(config.save_attention)
        self.optimizer = torch.optim.AdamW(
            self.gates.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = _schedule(config)
        self.model = model
        self.state = RunState(settings=self._resume_settings(), digests=self._digests())
        self.sharded = bool(self.accelerator.is_fsdp2)
        if not self.sharded and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError("got FSDP from the launcher and one process or no GPU, where accelerate ignores it; "
                             "accepted: several GPUs, or no FSDP")  # fmt: skip
        objective.reads_prompts_again = not self.sharded  # a sharded model does not run whole inside a backward
        if self.sharded:
            # The gates stay whole on every process: their hooks run inside layers, and a checkpoint holds them whole.
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.ignored_modules = [self.gates.to(self.accelerator.device)]
        else:
            objective.to(self.accelerator.device)
        if config.pack:
            objective.require_packing()
        self.objective, self.optimizer = self.accelerator.prepare(objective, self.optimizer)
        self.state = self._resume()
        self.step = self.state.step
        self.stopping = False
        self._batches = BatchesAhead(self._make_batch)
        self._matmul_precision = torch.get_float32_matmul_precision()
        if config.tf32:
            torch.set_float32_matmul_precision("high")
        self._saved_at, self._save_wanted = time.monotonic(), False
        self.log = MetricsLog(self.output_dir, self.accelerator, self.step)
        if config.tracker:
            self.log.start_trackers(config.tracker, config.project, self._tracked())
        self.started, self.tokens = time.perf_counter(), 0

    @property
    def _global_batch(self) -> int:
        return self.config.batch_size * self.accumulation * self._replicas

    @property
    def _replicas(self) -> int:
        """Processes, or groups of processes that share sequences, with examples of their own."""
        return self.accelerator.num_processes // self.config.context_parallel

    @property
    def _replica(self) -> int:
        return self.accelerator.process_index // self.config.context_parallel

    def _resume_settings(self) -> dict[str, Any]:
        """Processes times accumulation is what counts, not how they share it."""
        hidden = FREE_SETTINGS | {"accumulation", "batch_size"}
        settings = {k: v for k, v in self.config.to_dict().items() if k not in hidden}
        return settings | {"global_batch": self._global_batch}

    def _tracked(self) -> dict[str, Any]:
        """The settings, versions and digests that a tracker keeps with the run."""
        versions = {f"version/{name}": version(name) for name in ("tenure", "torch", "transformers", "accelerate")}
        digests = {f"digest/{name}": value for name, value in self.state.digests.items()}
        return self.config.to_dict() | {"global_batch": self._global_batch} | versions | digests

    def _digests(self) -> dict[str, str]:
        data, base = data_digest(self.source), base_digest(self.model)
        require_same(self.accelerator, "training data (digests)", data)
        require_same(self.accelerator, "base models (digests)", base)
        return {"data": data, "base": base}

    def _resume(self) -> RunState:
        """The newest checkpoint, read by the main process and sent to all; without one, its fresh gates."""
        tensors: dict[str, torch.Tensor] = {}

        def newest() -> RunState | None:
            path = latest_state(self.output_dir / "checkpoints")
            if path is None:
                return None
            state, found = read_state(path, self.state)
            tensors.update(found)
            logger.info("resumed from %s", path)
            return state

        state = on_main(self.accelerator, newest, None)
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            state, shapes = broadcast_object_list([state, shapes])
            for name, (shape, dtype) in shapes.items():
                tensors.setdefault(name, torch.empty(shape, dtype=dtype))
            broadcast_tensors(self.accelerator, [*tensors.values()] or [*self.gates.parameters()])
        if state is None:
            return self.state
        apply_state(tensors, self.gates, self.optimizer)
        return replace(state, settings=self.state.settings, digests=self.state.digests)

    def batch(self, micro: int) -> tuple[Batch, int]:
        """This process's micro-batch of the current step, and the number of its first example."""
        first = self._first_example(self.step * self.accumulation + micro)
        forwards = self.step * self.accumulation + micro + 1
        end = self.config.last_step * self.accumulation
        following = self._first_example(forwards) if forwards < end else None
        return self._batches.get(first, following).to(self.accelerator.device), first

    def _first_example(self, forward: int) -> int:
        """The number of the first example of this process in its forward of a given number."""
        return (forward * self._replicas + self._replica) * self.config.batch_size

    def _make_batch(self, first: int) -> Batch:
        return collate([self.source[first + row] for row in range(self.config.batch_size)], self.pad_token_id)

    def advance(self, stop: StopRequest) -> dict[str, float]:
        """One optimizer step; returns its losses, averaged over micro-batches and processes.

        The processes also agree here on saving (`save_minutes`) and on stopping.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self.schedule(self.step)
        sums = torch.zeros(4, device=self.accelerator.device)
        occupancy, norm, finite = sums, None, True
        for micro in range(self.accumulation):
            batch, first = self.batch(micro)
            last = micro == self.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses: Losses = self.objective(batch, seed=config.seed + first)
                finite = self._losses_finite(losses, first)
                if not finite:
                    break
                self.accelerator.backward(losses.total / self.accumulation)
            sums += torch.stack([losses.total, losses.ntp, losses.kl, losses.capacity]).detach() / self.accumulation
            self.tokens += batch.input_ids.numel()
            occupancy = losses.occupancy
        if finite:
            norm, finite = self._clipped_norm()
        if finite:
            self.optimizer.step()
        else:
            sums.fill_(math.nan)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = self._agree(sums, stop)
        if not finite:
            self.log.write(self.step, {"skipped": float(len(self.state.skipped))})
        elif self.step % config.log_every == 0 or self.step in (1, config.last_step):
            speed = self.tokens * self._replicas / (time.perf_counter() - self.started)
            extra = {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(norm or 0.0), "tokens_per_s": speed}
            self.log.write(self.step, values | extra | occupancy_metrics(occupancy))
            self.log.picture(self.step, occupancy.mean(dim=(1, 3)))
        return values

    def _agree(self, sums: torch.Tensor, stop: StopRequest) -> dict[str, float]:
        """The mean losses; a request of any process to stop, and the main one's to save, become those of all."""
        minutes, main = self.config.save_minutes, self.accelerator.is_main_process
        wanted = bool(minutes) and main and time.monotonic() - self._saved_at >= 60 * minutes
        flags = sums.new_tensor([bool(stop.name), wanted])
        mean = self.accelerator.reduce(torch.cat([sums, flags]), "mean")
        assert isinstance(mean, torch.Tensor)
        total, ntp, kl, capacity, stopping, saving = mean.tolist()
        self.stopping, self._save_wanted = stopping > 0, saving > 0
        return {"loss": total, "ntp": ntp, "kl": kl, "quality": (ntp + kl) / 2, "capacity": capacity}

    def _clipped_norm(self) -> tuple[torch.Tensor | None, bool]:
        """Clips the gradients of all processes; their norm, and whether it is finite (fp16's scaler looks itself)."""
        if self.sharded:
            average_gradients(self.accelerator, self.gates.parameters())
        norm = self.accelerator.clip_grad_norm_(self.gates.parameters(), self.config.max_grad_norm)
        if norm is None or self.config.mixed_precision == "fp16" or bool(torch.isfinite(norm)):
            return norm, True
        first = self.step * self._global_batch
        self._skip("the gradient", range(first, first + self._global_batch), "all processes")
        return norm, False

    def _losses_finite(self, losses: Losses, first: int) -> bool:
        finite = self.accelerator.gather(torch.isfinite(losses.total.detach()).int().reshape(1))
        assert isinstance(finite, torch.Tensor)
        if bool(finite.all()):
            return True
        # Every process names the batch at fault, which need not be its own.
        process = int(finite.argmin())
        start = first + (process // self.config.context_parallel - self._replica) * self.config.batch_size
        self._skip("the loss", range(start, start + self.config.batch_size), f"process {process}")
        return False

    def _skip(self, fault: str, examples: range, where: str) -> None:
        """Notes a step that is left out, or raises NotFiniteError when there were too many."""
        names = example_names(self.source, examples)
        text = (
            f"{fault} is not finite at step {self.step + 1}, examples {examples.start} to {examples.stop - 1} of "
            f"{where}{f' ({names})' if names else ''}"
        )
        allowed = self.config.skip_nonfinite
        if len(self.state.skipped) >= allowed:
            good = latest_state(self.output_dir / "checkpoints")
            before = f"; {allowed} steps were skipped before" if allowed else ""
            raise NotFiniteError(f"{text}{before}; the last good checkpoint is {good or 'none'}")
        self.state = replace(self.state, skipped=(*self.state.skipped, self.step + 1))
        logger.warning("%s; the step is skipped, %d of %d", text, len(self.state.skipped), allowed)

    @property
    def evaluation_due(self) -> bool:
        every = self.config.eval_every if self._evaluate is not None or self._held_out else 0
        return bool(every and self.step and self.step % every == 0 and self.state.evaluated < self.step)

    def evaluate(self) -> None:
        """Evaluates on all processes at once: none waits in a collective, which has a time limit, for another."""
        metrics = self._held_out_losses()
        if self._evaluate is not None:
            with self._whole_root():
                metrics |= self._evaluate(self.model, self.gates)
        self.state = replace(self.state, metrics=metrics, evaluated=self.step)
        self.log.write(self.step, metrics)
        name = self.config.best_metric
        if name is not None:
            if name not in metrics:
                raise ValueError(f"got best_metric {name!r}; accepted: {', '.join(sorted(metrics))}")
            self._keep_best(metrics[name])
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _held_out_losses(self) -> dict[str, float]:
        """Means over the targets of the held-out examples (capacity: over examples); empty without any."""
        sums, targets = [0.0, 0.0, 0.0], 0
        for example in self._held_out:
            batch = collate([example], self.pad_token_id).to(self.accelerator.device)
            losses: Losses = self.objective(batch, seed=self.config.seed)
            values = float(losses.ntp) * losses.targets, float(losses.kl) * losses.targets, float(losses.capacity)
            sums, targets = [total + value for total, value in zip(sums, values, strict=True)], targets + losses.targets
        if not targets:
            return {}
        ntp, kl, capacity = sums[0] / targets, sums[1] / targets, sums[2] / len(self._held_out)
        return {"eval/held_out_ntp": ntp, "eval/held_out_kl": kl, "eval/held_out_capacity": capacity}

    def _keep_best(self, value: float) -> None:
        best, sign = self.state.best, 1 if self.config.best_mode == "min" else -1
        if best is not None and sign * value >= sign * best:
            return
        self.state = replace(self.state, best=value)
        info = replace(self.info, metrics=self.state.metrics | {"step": self.step})
        on_main(self.accelerator, lambda: self.gates.save_pretrained(self.output_dir / "best", info), None)

    @contextmanager
    def _whole_root(self) -> Iterator[None]:
        """Under FSDP2, the weights outside of layers are whole inside the block; layers gather their own."""
        if not self.sharded:
            yield
            return
        root: Any = self.objective
        root.unshard()
        try:
            yield
        finally:
            root.reshard()

    @property
    def save_due(self) -> bool:
        return self._save_wanted or self.step % self.config.save_every == 0 or self.step == self.config.last_step

    def save(self) -> None:
        self.state = replace(self.state, step=self.step)
        folder = self.output_dir / "checkpoints"
        on_main(self.accelerator, lambda: save_state(folder, self.state, self.gates, self.optimizer), None)
        self._saved_at = time.monotonic()

    def finish(self) -> RetentionGates:
        self.gates.info = replace(self.info, metrics=self.state.metrics)
        on_main(self.accelerator, lambda: self.gates.save_pretrained(self.output_dir / "gates"), None)
        self.end()
        return self.gates

    def close(self) -> None:
        self._batches.close()
        torch.set_float32_matmul_precision(self._matmul_precision)

    def end(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.num_processes > 1:
            time.sleep(SETTLE_SECONDS)
        self.accelerator.end_training()


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    """Factor of the learning rate by step: linear warm-up, cosine to `min_learning_rate`, then that. Stateless."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    carrier = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        carrier, config.warmup_steps, config.steps, min_lr=config.min_learning_rate
    )
    factor = scheduler.lr_lambdas[0]
    # transformers starts warm-up at 0, which would waste the first step.
    return lambda step: float(factor(step + 1 if step < config.warmup_steps else min(step, config.steps)))


def _accelerator(config: TrainConfig) -> Accelerator:
    from accelerate import Accelerator

    trackers: Any = [*config.tracker] or None
    return Accelerator(mixed_precision=config.mixed_precision, log_with=trackers, project_dir=config.output_dir)


def _initial_gates(config: TrainConfig, model: PreTrainedModel) -> RetentionGates:
    if config.init_gates is not None:
        gates = RetentionGates.from_pretrained(config.init_gates, model)
        gates.calibration = None  # of the weights before training
        return gates
    return RetentionGates.for_model(
        model, gate_width=config.gate_width, projection=config.projection, initial_bias=config.initial_bias
    )
