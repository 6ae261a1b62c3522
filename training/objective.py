"""The training objective: stay close to the frozen model, with an occupancy within the budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

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
from ..retention.attach import AttachedAfter, Recomputed, attach_plain, recomputes_after
from ..retention.capacity import Scope
from ..retention.context_parallel import ContextGroup, SequencePart, require_context_parallel
from ..retention.decoder_layers import plain_model, text_config, text_decoder
from ..retention.image_inputs import image_inputs
from ..retention.ops import Implementation
from ..retention.seams import OutputHead
from .batching import Batch
from .model_checks import require_continuation, require_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_BYTES = 2**29  # of one fp32 tensor of logits; five exist at a time (logits and their log-softmaxes, a gradient)


@dataclass(frozen=True)
class Losses:
    """Losses of one batch, all scalars, and numbers for the log.

    Attributes:
        total: `ntp_weight · ntp + kl_weight · kl + weight · capacity` (TRIM-KV's training objective with 1/2, 1/2, 1),
            with its graph.
        ntp: cross-entropy to the text, nats a target token, without a graph, like `kl`.
        kl: KL between teacher and student, nats a target token.
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

    The first four are of the tokens after the prompt (of all without one), or of this process's part of them; teacher
    and student are last hidden states, `next_ids` and `predicts` `(batch, tokens)`: the token that follows, and whether
    it is a target. The last three are of all tokens: the number of targets, log β `(layers, batch, num_kv_heads,
    seq_len)` and its documents.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    next_ids: torch.Tensor
    predicts: torch.Tensor
    targets: int
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
        chunk: target tokens whose logits exist at a time; None for as many as fit `LOGITS_BYTES` in fp32.
        implementation: of the gated attention.
        evictions: one of them, drawn by `seed`, evicts a row's prompt at its end; without any, the prompt's keys decay
            for the tokens after it.
        ntp_weight, kl_weight: of cross-entropy and KL.
        kl_direction: `forward` is KL(teacher ‖ student), `reverse` is KL(student ‖ teacher).
        context: processes that share every batch, each with a part of its tokens. All are given the whole batch; all
            have the same losses, and the mean of their gradients is the gradient.

    Raises:
        ValueError: a budget or chunk that is not positive; a model that `context` cannot divide, or `context` with
            evictions.
    """

    def __init__(
        self, model: PreTrainedModel, gates: RetentionGates, budget: float, scope: Scope = "global",
        weight: float = 1.0, samples: int | None = 64, chunk: int | None = None,
        implementation: Implementation = "auto", evictions: Sequence[SoftEviction] = (), ntp_weight: float = 0.5,
        kl_weight: float = 0.5, kl_direction: Literal["forward", "reverse"] = "forward",
        context: ContextGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if budget <= 0:
            raise ValueError(f"the training budget is {budget}; a positive number is accepted")
        if chunk is not None and chunk < 1:
            raise ValueError(f"got chunk={chunk}; accepted: 1 or more target tokens, or None")
        if context is not None:
            require_context_parallel(model)
        self.context = context
        self.model = plain_model(model).requires_grad_(False)
        self.gates = gates
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # FSDP2 shards layer by layer
        self.budget, self.weight = budget, weight
        self.scope: Scope = scope
        self.ntp_weight, self.kl_weight, self.kl_direction = ntp_weight, kl_weight, kl_direction
        self.samples = samples
        self.chunk = max(1, LOGITS_BYTES // (4 * text_config(model).vocab_size)) if chunk is None else chunk
        self.implementation: Implementation = implementation
        self.evictions = tuple(evictions)
        self._head: OutputHead | None = None  # made in the first forward
        self._student: Attached | AttachedAfter | None = None
        self._recomputes = self._saves_attention = False
        self.reads_prompts_again = True  # under gradient checkpointing; else the prompts' hidden states are kept
        self._checkpointed: Sequence[nn.Module] = ()
        self._checked = False  # gates against the model, which waits for the device
        self._packs = self._continues = False  # the model was seen to separate documents, to continue prompts

    def enable_gradient_checkpointing(self, save_attention: bool = False) -> None:
        """Recomputes every decoder layer in backward, with its gates attached again; dropout stays off.

        Prompts are read again in backward, and the layers after them recomputed if keys and values are all that those
        need of a prompt.

        Args:
            save_attention: attention is not computed again: its outputs, `(batch, num_heads, seq_len, head_dim)` a
                layer, are kept.

        Raises:
            ValueError: the model does not support it.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [m for m in text_decoder(self.model).modules() if isinstance(m, GradientCheckpointingLayer)]
        if not self.model.supports_gradient_checkpointing or not layers:
            name = type(self.model).__name__
            raise ValueError(f"{name} has no gradient checkpointing; set gradient_checkpointing to false")
        self._recomputes, self._saves_attention = True, save_attention
        model: Any = self.model  # older versions of transformers have the older name only
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False, "context_fn": self._checkpoint_contexts})
        self.model.eval()
        self._checkpointed = layers

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Contexts of a layer's forward and of its recomputation, which runs when the attach block is over."""
        student = self._student
        saving, saved = create_selective_checkpoint_contexts(_keep) if self._saves_attention else (nullcontext(),) * 2
        forward = _Entered(lambda: _mode(self._checkpointed, training=False), saving)
        return forward, saved if student is None else _Entered(student.again, saved)

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
        batch: on the model's device. If rows have a prompt or images, all rows run one by one.
        seed: of the positions at which occupancy is sampled, and of the evictions.

        Raises:
            ValueError: no target token; prompts together with `context`; packed documents or prompts that the model
                does not support (`model_checks`).
        """
        rng = random.Random(seed)
        if any(batch.inputs) and self.context is not None:
            raise ValueError("got images with context_parallel; accepted: one of them (set images to false)")
        if any(batch.prompt_tokens) and self.context is not None:
            raise ValueError("got prompts with context_parallel; accepted: one of them (set prompt_share to 0)")
        if any(batch.prompt_tokens) or any(batch.inputs):
            rows = [batch.row(index) for index in range(len(batch.input_ids))]
            runs = [self._after_prompt(row, rng) if any(row.prompt_tokens) else self._whole(row) for row in rows]
        else:
            runs = [self._whole(batch)]
        targets = sum(run.targets for run in runs)
        if not targets:
            raise ValueError("a batch has no target token: its documents are all prompt; see loss_on and max_length")
        quality = [self._quality(run) for run in runs]
        sums, slopes = torch.stack([one for one, _ in quality]).sum(0), [slope for _, slope in quality]
        # Every process that shares the batch has the gradient of its own targets; their mean is taken later.
        shares = 1 if self.context is None else self.context.size
        ntp, kl = (sums if self.context is None else self.context.sum(sums)) / targets
        generator = torch.Generator().manual_seed(seed)
        capacities = [
            capacity_loss(run.log_beta, run.segments, self._limit(run.segments), self.scope, self.samples, generator)
            for run in runs
        ]
        capacity = torch.stack([one.loss for one in capacities]).mean()
        occupancy = torch.cat([one.occupancy for one in capacities], dim=-1)
        # Halves are exact: with the default weights the sum is (ntp + kl) / 2 to the last bit.
        quality_loss = self.ntp_weight * ntp + self.kl_weight * kl
        for run, slope in zip(runs, slopes, strict=True):
            quality_loss = quality_loss + _Slope.apply(run.student, run.predicts, slope * (shares / targets))
        return Losses(quality_loss + self.weight * capacity, ntp, kl, capacity, targets, occupancy)

    def _whole(self, batch: Batch) -> _Forward:
        """Every token under gates."""
        packed = batch.attention_mask is None and bool((batch.position_ids.diff(dim=-1) != 1).any())
        if packed:
            self.require_packing()
        next_ids, predicts, targets = _following(batch.input_ids, batch.loss_mask)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        inputs |= {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
        if any(batch.inputs):
            # The tower runs once: teacher and student are given the same embeddings.
            inputs = image_inputs(self.model, batch.input_ids, batch.inputs[0] or {}).arguments | {"use_cache": False}
        part = None if self.context is None else _divided(self.context, batch)
        if part is not None:
            inputs |= {name: _local(part, inputs[name]) for name in ("input_ids", "position_ids")}
            inputs["attention_mask"] = None
            next_ids, predicts = _local(part, next_ids), _local(part, predicts)
        decoder = text_decoder(self.model)
        # The model's own attention would make a mask of seq_len² elements for packed documents.
        apart = packed or part is not None
        plain = attach_plain(self.model, self.gates, self.implementation, part) if apart else nullcontext()
        with torch.no_grad(), plain:
            teacher = decoder(**inputs).last_hidden_state
        # Transformers checkpoints no layer in eval mode. The decoder stays in it: it may have dropout of its own.
        checkpointing = _mode(self._checkpointed, training=True)
        gated = attach(self.model, self.gates, self.implementation, check=not self._checked, part=part)
        with gated as attached, checkpointing:
            self._checked = True
            self._student = attached
            student = decoder(**inputs).last_hidden_state
            self._student = None
        log_beta, segments = attached.log_beta(), attached.segments
        if part is not None:  # without what was added to divide the sequences
            rows, seq_len = batch.input_ids.shape
            log_beta = log_beta[..., :seq_len]
            segments = Segments.from_inputs(
                rows, seq_len, batch.attention_mask, batch.position_ids, batch.input_ids.device
            )
        assert segments is not None
        return _Forward(teacher, student, next_ids, predicts, targets, log_beta, segments)

    def _after_prompt(self, row: Batch, rng: random.Random) -> _Forward:
        """The prompt is read once, for teacher and student; gates act on the tokens after it."""
        if not self._continues:
            require_continuation(self.model)
            self._continues = True
        start = row.prompt_tokens[0]
        images = image_inputs(self.model, row.input_ids[:, :start], row.inputs[0] or {}) if any(row.inputs) else None
        read_again = self._recomputes and self.reads_prompts_again and images is None
        arguments = images and images.arguments
        prompt = read_prompt(self.model, row.input_ids[:, :start], self.gates if read_again else None, arguments)
        rest: dict[str, Any] = {"input_ids": row.input_ids[:, start:], "use_cache": True}
        if images is not None and images.rope_deltas is not None:
            rest["position_ids"] = images.positions_after(start, rest["input_ids"].shape[1])
        decoder = text_decoder(self.model)
        with torch.no_grad():
            teacher = decoder(**rest, past_key_values=prompt.new_cache()).last_hidden_state
        eviction = rng.choice(self.evictions) if self.evictions else None
        recomputed: Recomputed = "gates" if self._recomputes else "nothing"
        if self._recomputes and recomputes_after(self.model, prompt):
            recomputed = "layers"
        checkpointing = _mode(self._checkpointed if recomputed == "layers" else (), training=True)
        with attach_after(self.model, self.gates, prompt, eviction, recomputed) as attached, checkpointing:
            self._student = attached
            student = decoder(**rest).last_hidden_state
            self._student = None
        segments = Segments.whole(1, row.input_ids.shape[1], row.input_ids.device)
        following = _following(row.input_ids[:, start:], row.loss_mask[:, start:])
        return _Forward(teacher, student, *following, attached.log_beta(), segments)

    def _limit(self, segments: Segments) -> float | torch.Tensor:
        """The budget in entries per layer and head: for a share, of the length of each token's own document."""
        if self.budget >= 1:
            return self.budget
        start, end = segments.bounds
        return ((end - start) * self.budget).clamp_min(1.0)

    @torch.no_grad()
    def _quality(self, run: _Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of cross-entropy and KL over the targets, `(2,)`, and the gradient of their weighted sum.

        The gradient is of the hidden states before the targets, `(targets, hidden_size)`, and is made here, so that the
        logits, which never exist for more than a chunk, are not computed again in backward.
        """
        labels = run.next_ids[run.predicts]
        teacher, student = run.teacher[run.predicts], run.student[run.predicts]
        sums, slopes = student.new_zeros(2, dtype=torch.float32), torch.zeros_like(student)
        for start in range(0, len(labels), self.chunk):
            part = slice(start, start + self.chunk)
            sums += self._chunk_losses(teacher[part], student[part], labels[part], slopes[part])
        return sums, slopes

    def _chunk_losses(
        self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor, slopes: torch.Tensor
    ) -> torch.Tensor:
        """The sums of a chunk; its gradient is written to `slopes`.

        With s and t the probabilities of student and teacher, the gradients of the student's logits are `s - onehot`
        for the cross-entropy, `s - t` for KL(t ‖ s), and `s · (log s - log t - KL)` for KL(s ‖ t).
        """
        if self._head is None:
            self._head = OutputHead(self.model)
        expected = self._head(teacher).float().log_softmax(-1)
        student.requires_grad_()
        with torch.enable_grad():
            logits = self._head(student)
        predicted = logits.detach().float().log_softmax(-1)
        ntp = -predicted.gather(1, labels[:, None]).sum()
        if self.kl_direction == "forward":
            slope, target = predicted.exp(), expected.exp()
            kl = expected.sub_(predicted).mul_(target).sum()
            slope.mul_(self.ntp_weight + self.kl_weight).sub_(target, alpha=self.kl_weight)
        else:
            weights, excess = predicted.exp(), expected.neg_().add_(predicted)
            kl = (weights * excess).sum(-1, keepdim=True)
            slope = excess.sub_(kl).mul_(self.kl_weight).add_(self.ntp_weight).mul_(weights)
            kl = kl.sum()
        slope.scatter_add_(1, labels[:, None], slope.new_full((len(labels), 1), -self.ntp_weight))
        with torch.autocast(slope.device.type, enabled=False):
            slopes.copy_(torch.autograd.grad(logits, student, slope.to(logits.dtype))[0])
        return torch.stack((ntp, kl))


class _Slope(torch.autograd.Function):
    """Zero, with a given gradient of some hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, chosen: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(chosen, slope)
        return slope.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        chosen, slope = ctx.saved_tensors
        gradient = slope.new_zeros(*chosen.shape, slope.shape[-1])
        gradient[chosen] = slope * grads[0].to(slope.dtype)
        return gradient, None, None


def _following(input_ids: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """For each token the next one, whether that is a target, and the number of targets."""
    predicts = F.pad(loss_mask[:, 1:], (0, 1))
    return F.pad(input_ids[:, 1:], (0, 1)), predicts, int(predicts.sum())


def _divided(context: ContextGroup, batch: Batch) -> SequencePart:
    """This process's part of a batch, whose rows are padded to a number of tokens that can be divided."""
    rows, seq_len = batch.input_ids.shape
    added = -seq_len % context.parts
    mask = None if batch.attention_mask is None else F.pad(batch.attention_mask, (0, added))
    positions = F.pad(batch.position_ids, (0, added))  # without a mask each is a document of its own
    return SequencePart(context, Segments.from_inputs(rows, seq_len + added, mask, positions, batch.input_ids.device))


def _local(part: SequencePart, whole: torch.Tensor) -> torch.Tensor:
    return part.context.local(F.pad(whole, (0, part.segments.document.shape[1] - whole.shape[1])))


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

    def __init__(self, make: Callable[[], AbstractContextManager[Any]], inner: AbstractContextManager[Any]) -> None:
        self.make, self.inner = make, inner

    def __enter__(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(self.make())
        self.stack.enter_context(self.inner)

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What selective checkpointing keeps of a layer: outputs of attention, in torch's operators and in our kernel."""
    name = str(operator)
    attention = "scaled_dot_product" in name or name.startswith("tenure.gated_attention")
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE
