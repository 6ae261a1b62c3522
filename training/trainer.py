"""The training loop: accelerate's devices and processes around `GateObjective`, resumable to the last bit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..retention import CheckpointInfo, RetentionGates, SoftEviction
from .assets import DEMO_MODEL_ID
from .batching import Batch, collate
from .data import ExampleSource
from .objective import GateObjective, Losses
from .run_log import MetricsLog, occupancy_metrics
from .run_state import latest_state, load_state, save_state
from .train_config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Settings that may differ between a run and its resumption: they do not change the loss curve.
FREE_SETTINGS = frozenset(
    {"output_dir", "log_every", "save_every", "eval_every", "eval_budgets", "eval_cases", "eval_length"}
    | {"tracker", "project", "init_gates", "logits_chunk", "gradient_checkpointing"}
)
Evaluate = Callable[["PreTrainedModel", RetentionGates], dict[str, float]]


class NotFiniteError(FloatingPointError):
    """A loss is NaN or infinite; the message names the batch and the last good checkpoint."""


def train(
    config: TrainConfig, model: PreTrainedModel, source: ExampleSource, pad_token_id: int = 0,
    evaluate: Evaluate | None = None, progress: Callable[[int, dict[str, float]], None] | None = None,
) -> RetentionGates:  # fmt: skip
    """Trains gates for `model` and saves them to `config.output_dir/gates`.

    Resumes from the newest checkpoint in `config.output_dir/checkpoints` if there is one. Micro-batch `m` of process
    `r` at step `s` takes the examples from `((s · accumulation + m) · processes + r) · batch_size` on, so one process
    with accumulation n sees what n processes see.

    Args:
        model: on the CPU; accelerate moves it. It is frozen.
        source: training examples.
        pad_token_id: fills rows of unequal length.
        evaluate: called every `config.eval_every` steps on the main process; its values are logged.
        progress: called after every step on the main process with the step's losses.

    Returns:
        The trained gates.
    Raises:
        NotFiniteError: a loss became NaN or infinite; nothing is saved after the last good checkpoint.
        ValueError: the checkpoint in `output_dir` was made with other settings.
    """
    run = _TrainingRun(config, model, source, pad_token_id)
    while run.step < config.steps:
        values = run.advance()
        if progress is not None and run.accelerator.is_main_process:
            progress(run.step, values)
        if evaluate is not None and config.eval_every and run.step % config.eval_every == 0:
            run.evaluate(evaluate)
        if run.step % config.save_every == 0 or run.step == config.steps:
            run.save()
    return run.finish()


class _TrainingRun:
    """One process of a training run, which has done `step` optimizer steps."""

    def __init__(self, config: TrainConfig, model: PreTrainedModel, source: ExampleSource, pad_token_id: int) -> None:
        self.config, self.source, self.pad_token_id = config, source, pad_token_id
        self.output_dir = Path(config.output_dir)
        self.accelerator = _accelerator(config)
        torch.manual_seed(config.seed)
        self.gates = _initial_gates(config, model)
        objective = GateObjective(
            model.eval(), self.gates, config.budget, config.scope, config.capacity_weight, config.capacity_samples,
            config.logits_chunk,
            evictions=[SoftEviction(budget, config.eviction_temperature) for budget in config.eviction_budgets],
        )  # fmt: skip
        if config.gradient_checkpointing:
            objective.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.gates.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        settings = {k: v for k, v in config.to_dict().items() if k not in FREE_SETTINGS}
        self.settings = settings | {"global_batch": self._global_batch}
        self.schedule = _schedule(config)
        objective.to(self.accelerator.device)
        if config.pack:
            objective.require_packing()
        self.step = self._resume()
        self.model = model
        self.objective, self.optimizer = self.accelerator.prepare(objective, self.optimizer)
        self.metrics: dict[str, float] = {}
        self.log = MetricsLog(self.output_dir, self.accelerator, self.step)
        self.started, self.tokens = time.perf_counter(), 0

    @property
    def _global_batch(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.accelerator.num_processes

    def _resume(self) -> int:
        """Loads the newest checkpoint on every process; the main one clears leftovers first."""
        folder = self.output_dir / "checkpoints"
        with self.accelerator.main_process_first():
            newest = latest_state(folder)
        return 0 if newest is None else load_state(newest, self.gates, self.optimizer, self._resume_settings())

    def _resume_settings(self) -> dict[str, Any]:
        """Processes times accumulation is what counts, not how they share it."""
        hidden = {"accumulation", "batch_size"}
        return {k: v for k, v in self.settings.items() if k not in hidden}

    def batch(self, micro: int) -> tuple[Batch, int]:
        """This process's micro-batch of the current step, and the number of its first example."""
        config, accelerator = self.config, self.accelerator
        forward = (self.step * config.accumulation + micro) * accelerator.num_processes + accelerator.process_index
        first = forward * config.batch_size
        examples = [self.source[first + row] for row in range(config.batch_size)]
        return collate(examples, self.pad_token_id).to(accelerator.device), first

    def advance(self) -> dict[str, float]:
        """One optimizer step; returns its losses, averaged over micro-batches and processes."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self.schedule(self.step)
        sums = torch.zeros(4, device=self.accelerator.device)
        occupancy = sums
        for micro in range(config.accumulation):
            batch, first = self.batch(micro)
            last = micro == config.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.objective):
                losses: Losses = self.objective(batch, seed=config.seed + first)
                self._check_finite(losses, first)
                self.accelerator.backward(losses.total / config.accumulation)
            sums += torch.stack([losses.total, losses.ntp, losses.kl, losses.capacity]).detach() / config.accumulation
            self.tokens += batch.input_ids.numel()
            occupancy = losses.occupancy
        norm = self.accelerator.clip_grad_norm_(self.gates.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        mean = self.accelerator.reduce(sums, "mean")
        assert isinstance(mean, torch.Tensor)
        total, ntp, kl, capacity = mean.tolist()
        values = {"loss": total, "ntp": ntp, "kl": kl, "quality": (ntp + kl) / 2, "capacity": capacity}
        if self.step % config.log_every == 0 or self.step in (1, config.steps):
            speed = self.tokens * self.accelerator.num_processes / (time.perf_counter() - self.started)
            extra = {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(norm or 0.0), "tokens_per_s": speed}
            self.log.write(self.step, values | extra | occupancy_metrics(occupancy))
            self.log.picture(self.step, occupancy.mean(dim=(1, 3)))
        return values

    def _check_finite(self, losses: Losses, first: int) -> None:
        finite = self.accelerator.gather(torch.isfinite(losses.total.detach()).int().reshape(1))
        assert isinstance(finite, torch.Tensor)
        if bool(finite.all()):
            return
        # Every process raises and names the batch at fault, which need not be its own.
        process = int(finite.argmin())
        start = first + (process - self.accelerator.process_index) * self.config.batch_size
        good = latest_state(self.output_dir / "checkpoints")
        raise NotFiniteError(
            f"the loss is not finite at step {self.step + 1}, examples {start} to "
            f"{start + self.config.batch_size - 1} of process {process}; the last good checkpoint is {good or 'none'}"
        )

    def evaluate(self, evaluate: Evaluate) -> None:
        if self.accelerator.is_main_process:
            self.metrics = evaluate(self.model, self.gates)
            self.log.write(self.step, self.metrics)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        if self.accelerator.is_main_process:
            save_state(self.output_dir / "checkpoints", self.step, self.gates, self.optimizer, self._resume_settings())
        self.accelerator.wait_for_everyone()

    def finish(self) -> RetentionGates:
        self.gates.info = CheckpointInfo.for_model(
            self.model, base_model=DEMO_MODEL_ID if self.config.model == "demo" else self.config.model,
            training=self.config.to_dict(), metrics=self.metrics,
        )  # fmt: skip
        if self.accelerator.is_main_process:
            self.gates.save_pretrained(self.output_dir / "gates")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.gates


def _schedule(config: TrainConfig) -> Callable[[int], float]:
    """Factor of the learning rate by step: linear warm-up, then cosine to `min_learning_rate`. Stateless."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    carrier = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(
        carrier, config.warmup_steps, config.steps, min_lr=config.min_learning_rate
    )
    factor = scheduler.lr_lambdas[0]
    # transformers starts warm-up at 0, which would waste the first step.
    return lambda step: float(factor(step + 1 if step < config.warmup_steps else step))


def _accelerator(config: TrainConfig) -> Accelerator:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ImportError("training needs accelerate: pip install 'tenure[train]'") from None
    tracker = None if config.tracker == "none" else config.tracker
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=tracker, project_dir=config.output_dir)
    if tracker is not None:
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.to_dict().items()}
        accelerator.init_trackers(config.project, config=settings)
    return accelerator


def _initial_gates(config: TrainConfig, model: PreTrainedModel) -> RetentionGates:
    if config.init_gates is not None:
        return RetentionGates.from_pretrained(config.init_gates, model)
    return RetentionGates.for_model(
        model, gate_width=config.gate_width, projection=config.projection, initial_bias=config.initial_bias
    )
