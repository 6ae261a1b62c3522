"""The training objective: stay close to the frozen model, with an occupancy within the budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..retention import (
    Attached,
    RetentionGates,
    Segments,
    SoftEviction,
    attach,
    attach_after,
    capacity_loss,
    read_prompt,
)
from ..retention.capacity import Scope
from ..retention.decoder_layers import plain_model, text_decoder
from ..retention.ops import Implementation
from ..retention.seams import model_logits
from .batching import Batch
from .model_checks import require_continuation, require_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, scalars with their graph, and numbers for the log.

    Attributes:
        total: `(ntp + kl) / 2 + weight · capacity` (TRIM-KV, training objective).
        ntp: cross-entropy to the text, nats a target token.
        kl: forward KL(teacher ‖ student), nats a target token.
        capacity: relative excess of occupancy over the budget.
        targets: number of target tokens.
        occupancy: `(layers, batch, num_kv_heads, positions)`, detached; rows that were run one by one follow each
            other along `positions`.
    """

    total: torch.Tensor
    ntp: torch.Tensor
    kl: torch.Tensor
    capacity: torch.Tensor
    targets: int
    occupancy: torch.Tensor


@dataclass(frozen=True)
class _Forward:
    """A batch, or one row of it, through teacher and student.

    The first four are of the tokens after the prompt (of all without one), the last two of all tokens; teacher and
    student are last hidden states, log β is `(layers, batch, num_kv_heads, seq_len)`.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    log_beta: torch.Tensor
    segments: Segments


class GateObjective(nn.Module):
    """A frozen model with its gates; `forward` gives the losses of a batch.

    Teacher and student are the same weights, gates off and on: one copy in memory. Only the gates require gradients,
    so a data-parallel wrapper around this module communicates nothing else.

    Args:
        model: frozen here (`requires_grad_(False)`).
        gates: in fp32, on the model's device.
        budget: entries per layer and head the occupancy may hold; below 1, that share of each document's length.
        scope: `global` or `local` capacity loss.
        weight: λ of the capacity loss.
        samples: positions per row at which occupancy is evaluated; None for all.
        chunk: target tokens whose logits exist at a time.
        implementation: of the gated attention.
        evictions: one of them, drawn by `seed`, evicts a row's prompt at its end; without any, the prompt's keys decay
            for the tokens after it.
    """

    def __init__(
        self, model: PreTrainedModel, gates: RetentionGates, budget: float, scope: Scope = "global",
        weight: float = 1.0, samples: int | None = 64, chunk: int = 8192, implementation: Implementation = "auto",
        evictions: Sequence[SoftEviction] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if budget <= 0:
            raise ValueError(f"the training budget is {budget}; a positive number is accepted")
        self.model = plain_model(model).requires_grad_(False)
        self.gates = gates
        self.budget, self.weight = budget, weight
        self.scope: Scope = scope
        self.samples, self.chunk = samples, chunk
        self.implementation: Implementation = implementation
        self.evictions = tuple(evictions)
        self._student: Attached | None = None
        self._recomputes = False
        self._checkpointed: Sequence[nn.Module] = ()
        self._packs = self._continues = False  # the model was seen to separate documents, to continue prompts

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes every decoder layer in backward, with its gates attached again; dropout stays off.

        Raises:
            ValueError: the model does not support it.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [m for m in text_decoder(self.model).modules() if isinstance(m, GradientCheckpointingLayer)]
        if not self.model.supports_gradient_checkpointing or not layers:
            name = type(self.model).__name__
            raise ValueError(f"{name} has no gradient checkpointing; set gradient_checkpointing to false")
        self._recomputes = True
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})
        self.model.eval()
        self._checkpointed = layers

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of a layer's forward and of its recomputation, which runs when the attach block is over."""
        student = self._student
        without_dropout = _Entered(lambda: _mode(self._checkpointed, training=False))
        return without_dropout, nullcontext() if student is None else _Entered(student.again)

    def require_packing(self) -> None:
        """Checks that the model separates packed documents, once; the first packed batch does it as well.

        Raises:
            ValueError: see `model_checks.require_packing`.
        """
        if not self._packs:
            require_packing(self.model)
            self._packs = True

    def forward(self, batch: Batch, seed: int = 0) -> Losses:
        """Args:
        batch: on the model's device. If rows have a prompt, all rows run one by one.
        seed: of the positions at which occupancy is sampled, and of the evictions.

        Raises:
            ValueError: no target token; prompts together with gradient checkpointing; packed documents or prompts that
                the model does not support (`model_checks`).
        """
        rng = random.Random(seed)
        if any(batch.prompt_tokens):
            if self._recomputes:
                raise ValueError("prompts leave nothing to recompute: turn gradient checkpointing off")
            rows = [batch.row(index) for index in range(len(batch.input_ids))]
            runs = [self._after_prompt(row, rng) if row.prompt_tokens[0] else self._whole(row) for row in rows]
        else:
            runs = [self._whole(batch)]
        targets = sum(int(run.loss_mask[:, 1:].sum()) for run in runs)
        if not targets:
            raise ValueError("a batch has no target token: its documents are all prompt; see loss_on and max_length")
        quality = [self._quality(run) for run in runs]
        ntp, kl = (torch.stack(sums).sum() / targets for sums in zip(*quality, strict=True))
        generator = torch.Generator().manual_seed(seed)
        capacities = [
            capacity_loss(
                run.log_beta, run.segments, self._limit(run.segments.document), self.scope, self.samples, generator
            )
            for run in runs
        ]
        capacity = torch.stack([one.loss for one in capacities]).mean()
        occupancy = torch.cat([one.occupancy for one in capacities], dim=-1)
        return Losses((ntp + kl) / 2 + self.weight * capacity, ntp, kl, capacity, targets, occupancy)

    def _whole(self, batch: Batch) -> _Forward:
        """Every token under gates."""
        if batch.attention_mask is None and bool((batch.position_ids.diff(dim=-1) != 1).any()):
            self.require_packing()
        decoder = text_decoder(self.model)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        inputs |= {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
        with torch.no_grad():
            teacher = decoder(**inputs).last_hidden_state
        # Transformers checkpoints no layer in eval mode. The decoder stays in it: it may have dropout of its own.
        checkpointing = _mode(self._checkpointed, training=True)
        with attach(self.model, self.gates, self.implementation) as attached, checkpointing:
            self._student = attached
            student = decoder(**inputs).last_hidden_state
            self._student = None
        assert attached.segments is not None
        return _Forward(teacher, student, batch.input_ids, batch.loss_mask, attached.log_beta(), attached.segments)

    def _after_prompt(self, row: Batch, rng: random.Random) -> _Forward:
        """The prompt is read once, for teacher and student; gates act on the tokens after it."""
        if not self._continues:
            require_continuation(self.model)
            self._continues = True
        start = row.prompt_tokens[0]
        prompt = read_prompt(self.model, row.input_ids[:, :start])
        rest = {"input_ids": row.input_ids[:, start:], "use_cache": True}
        decoder = text_decoder(self.model)
        with torch.no_grad():
            teacher = decoder(**rest, past_key_values=prompt.new_cache()).last_hidden_state
        eviction = rng.choice(self.evictions) if self.evictions else None
        with attach_after(self.model, self.gates, prompt, eviction) as attached:
            student = decoder(**rest).last_hidden_state
        segments = Segments.whole(1, row.input_ids.shape[1], row.input_ids.device)
        return _Forward(teacher, student, rest["input_ids"], row.loss_mask[:, start:], attached.log_beta(), segments)

    def _limit(self, document: torch.Tensor) -> float | torch.Tensor:
        """The budget in entries per layer and head: for a share, of the length of each token's own document."""
        if self.budget >= 1:
            return self.budget
        count = document.amax().clamp_min(0) + 1
        member = F.one_hot(document.clamp_min(0), int(count)) * (document >= 0)[..., None]
        length = (member.sum(1, keepdim=True) * member).sum(-1)
        return (length * self.budget).clamp_min(1.0)

    def _quality(self, run: _Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of cross-entropy and KL over the targets."""
        target = run.loss_mask[:, 1:]
        count = int(target.sum())
        labels = run.input_ids[:, 1:][target]
        before = F.pad(target, (0, 1))
        teacher, student = run.teacher[before], run.student[before]
        ntp, kl = student.new_zeros((), dtype=torch.float32), student.new_zeros((), dtype=torch.float32)
        for start in range(0, count, self.chunk):
            part = slice(start, start + self.chunk)
            # Recomputed in backward, so the vocabulary never exists for more than a chunk.
            sums = checkpoint(self._chunk_losses, teacher[part], student[part], labels[part], use_reentrant=False)
            assert isinstance(sums, tuple)
            ntp, kl = ntp + sums[0], kl + sums[1]
        return ntp, kl

    def _chunk_losses(
        self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            expected = self._logits(teacher).log_softmax(-1)
        predicted = self._logits(student).log_softmax(-1)
        ntp = F.nll_loss(predicted, labels, reduction="sum")
        return ntp, F.kl_div(predicted, expected, reduction="sum", log_target=True)

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return model_logits(self.model, hidden_states).float()


@contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Within the block these modules alone, not their children, are in that mode."""
    before = [module.training for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


class _Entered(AbstractContextManager[None]):
    """The context that `make` gives, made when it is entered: when a layer is recomputed, not when it first ran."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self.make = make

    def __enter__(self) -> None:
        self.context = self.make()
        self.context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)
