"""The objective against its formulas, and gradient checkpointing against none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from tenure.retention import RetentionGates, Segments, SoftEviction, attach, capacity_loss
from tenure.training import Batch, GateObjective


def forgetful(model: PreTrainedModel) -> RetentionGates:
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=1.0, init_std=0.4)


def make_batch(rows: int = 2, length: int = 40) -> Batch:
    generator = torch.Generator().manual_seed(2)
    input_ids = torch.randint(3, 128, (rows, length), generator=generator)
    loss_mask = torch.rand(rows, length, generator=generator) < 0.4
    loss_mask[:, 0] = False
    return Batch(input_ids, torch.arange(length).expand(rows, length), None, loss_mask)


@pytest.mark.parametrize("chunk", [7, 8192])
def test_losses_are_the_formulas(tiny_llama: PreTrainedModel, chunk: int) -> None:
    gates, batch = forgetful(tiny_llama), make_batch()
    losses = GateObjective(tiny_llama, gates, budget=5, samples=None, chunk=chunk, weight=0.5)(batch)
    teacher = tiny_llama(batch.input_ids, use_cache=False).logits.log_softmax(-1)
    with attach(tiny_llama, gates) as attached:
        student = tiny_llama(batch.input_ids, use_cache=False).logits.log_softmax(-1)
        capacity = capacity_loss(attached.log_beta(), Segments.whole(2, 40), 5.0).loss
    targets = [(r, t) for r in range(2) for t in range(1, 40) if batch.loss_mask[r, t]]
    ntp = -sum(student[r, t - 1, batch.input_ids[r, t]] for r, t in targets) / len(targets)
    kl = sum((teacher[r, t - 1].exp() * (teacher[r, t - 1] - student[r, t - 1])).sum() for r, t in targets)
    torch.testing.assert_close(losses.ntp, ntp, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.kl, kl / len(targets), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.capacity, capacity, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.total, (losses.ntp + losses.kl) / 2 + 0.5 * losses.capacity)
    assert losses.targets == len(targets) and losses.kl > 1e-3


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients_are_those_of_the_formulas(tiny_llama: PreTrainedModel, direction: Any) -> None:
    """The gradient that is made in forward, against autograd through log-softmax of the whole vocabulary."""
    batch, weights = make_batch(), {"ntp_weight": 0.7, "kl_weight": 0.2}
    gates = forgetful(tiny_llama)
    GateObjective(tiny_llama, gates, 5, weight=0.0, chunk=7, kl_direction=direction, **weights)(batch).total.backward()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        teacher = tiny_llama(batch.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    reference = forgetful(tiny_llama)
    with attach(tiny_llama, reference):
        student = tiny_llama(batch.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    target = batch.loss_mask[:, 1:]
    ntp = F.nll_loss(student[target], batch.input_ids[:, 1:][target])
    one, other = (student, teacher) if direction == "forward" else (teacher, student)
    kl = F.kl_div(one[target], other[target], reduction="sum", log_target=True) / target.sum()
    (0.7 * ntp + 0.2 * kl).backward()
    for ours, expected in zip(gates.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_only_gates_learn(tiny_llama: PreTrainedModel) -> None:
    objective = GateObjective(tiny_llama, forgetful(tiny_llama), budget=5)
    objective(make_batch()).total.backward()
    learning = {name for name, p in objective.named_parameters() if p.grad is not None}
    assert learning == {f"gates.{name}" for name, _ in objective.gates.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(any_tiny_model: PreTrainedModel) -> None:
    """Layers are recomputed after the attach block has ended, and must be gated then, too."""
    gradients = []
    for checkpointing in (False, True):
        gates = forgetful(any_tiny_model)
        objective = GateObjective(any_tiny_model, gates, budget=5)
        if checkpointing:
            objective.enable_gradient_checkpointing()
        objective(make_batch()).total.backward()
        gradients.append([p.grad for p in gates.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
        assert plain.abs().sum() > 0


def test_saved_attention_is_not_computed_again(tiny_llama: PreTrainedModel) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Attentions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func)
            self.count += "scaled_dot_product" in name and "backward" not in name
            return func(*args, **(kwargs or {}))

    found, counts = [], []
    for save in (False, True):
        objective = GateObjective(tiny_llama, forgetful(tiny_llama), budget=5)
        objective.enable_gradient_checkpointing(save_attention=save)
        objective(make_batch())  # the first one runs a token more, see OutputHead
        with Attentions() as attentions:
            objective(make_batch()).total.backward()
        found.append([p.grad for p in objective.gates.parameters()])
        counts.append(attentions.count)
    assert counts == [9, 6], "of three layers: teacher, student, and its recomputation"
    for one, other in zip(*found, strict=True):
        assert one is not None and torch.equal(one, other)


def test_a_share_is_of_each_document(tiny_llama: PreTrainedModel) -> None:
    """Packed documents of 10 and 30 tokens at 20 % have 2 and 6 entries."""
    objective = GateObjective(tiny_llama, forgetful(tiny_llama), budget=0.2)
    position_ids = torch.cat([torch.arange(10), torch.arange(30)])[None]
    segments = Segments.from_inputs(1, 40, position_ids=position_ids)
    limit = objective._limit(segments)
    assert isinstance(limit, torch.Tensor)
    torch.testing.assert_close(limit, torch.tensor([[2.0] * 10 + [6.0] * 30]))


def test_padding_does_not_matter(tiny_llama: PreTrainedModel) -> None:
    gates, alone = forgetful(tiny_llama), make_batch(rows=1)
    objective = GateObjective(tiny_llama, gates, budget=5, samples=None)
    padded = Batch(
        F.pad(alone.input_ids, (0, 9)),
        F.pad(alone.position_ids, (0, 9)),
        F.pad(torch.ones_like(alone.input_ids), (0, 9)),
        F.pad(alone.loss_mask, (0, 9)),
    )
    for ours, reference in zip(
        [getattr(objective(padded), name) for name in ("ntp", "kl", "capacity")],
        [getattr(objective(alone), name) for name in ("ntp", "kl", "capacity")],
        strict=True,
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named(tiny_llama: PreTrainedModel) -> None:
    gates = forgetful(tiny_llama)
    with pytest.raises(ValueError, match="training budget is -1"):
        GateObjective(tiny_llama, gates, budget=-1)
    batch = replace(make_batch(), loss_mask=torch.zeros(2, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match="no target token"):
        GateObjective(tiny_llama, gates, budget=5)(batch)


def prompts(length: int = 40) -> Batch:
    """Rows of `length` and `length - 9` tokens whose first 20 and 11 are prompts, without targets before them."""
    batch = make_batch(rows=2, length=length)
    attention_mask = torch.ones_like(batch.input_ids)
    attention_mask[1, length - 9 :] = 0
    starts = torch.tensor([20, 11])
    loss_mask = batch.loss_mask & (torch.arange(length) > starts[:, None]) & (attention_mask != 0)
    return replace(batch, attention_mask=attention_mask, loss_mask=loss_mask, prompt_tokens=(20, 11))


@pytest.mark.parametrize("evictions", [(), (SoftEviction(0.3, sinks=1, recent=2),)])
def test_rows_with_prompts_are_run_one_by_one(any_tiny_model: PreTrainedModel, evictions: tuple) -> None:
    objective = GateObjective(any_tiny_model, forgetful(any_tiny_model), budget=3, samples=None, evictions=evictions)
    batch = prompts()
    losses = objective(batch)
    rows = [objective(batch.row(index)) for index in range(2)]
    assert losses.targets == sum(row.targets for row in rows)
    for name in ("ntp", "kl"):
        mean = sum(getattr(row, name) * row.targets for row in rows) / losses.targets
        torch.testing.assert_close(getattr(losses, name), mean)
    torch.testing.assert_close(losses.capacity, (rows[0].capacity + rows[1].capacity) / 2)
    assert losses.kl > 1e-4
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.gates.parameters())


def test_a_prompt_is_read_without_gates(tiny_llama: PreTrainedModel) -> None:
    """Kept whole, it leaves teacher and student the same; the gates of the whole sequence do not."""
    objective = GateObjective(tiny_llama, forgetful(tiny_llama), budget=9, evictions=(SoftEviction(1.0),))
    assert objective(prompts()).kl.abs() < 1e-6
    assert objective(replace(prompts(), prompt_tokens=(0, 0))).kl > 1e-3


@pytest.mark.parametrize("read_again", [True, False])
@pytest.mark.parametrize("evictions", [(), (SoftEviction(0.3, sinks=1, recent=2),)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_recomputed_prompts_give_the_same_losses_and_gradients(
    tiny_model, family: str, evictions: tuple, read_again: bool
) -> None:
    """Gemma-3's sliding layers need more of a prompt than keys: there the gates alone are recomputed."""
    found = []
    for recomputes in (False, True):
        model = tiny_model(family)
        objective = GateObjective(model, forgetful(model), budget=3, samples=None, evictions=evictions)
        objective.reads_prompts_again = read_again
        if recomputes:
            objective.enable_gradient_checkpointing()
        losses = objective(prompts(), seed=1)
        losses.total.backward()
        found.append([losses.ntp, losses.kl, losses.capacity.detach(), *(p.grad for p in objective.gates.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
        assert plain.abs().sum() > 0


def test_a_prompt_that_is_read_again_keeps_no_hidden_states(tiny_llama: PreTrainedModel) -> None:
    """Saved for backward are tensors of the tokens after it, keys and values, and log β."""
    objective = GateObjective(tiny_llama, forgetful(tiny_llama), budget=3, evictions=(SoftEviction(0.3),))
    objective.enable_gradient_checkpointing()
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(tensor.shape))
        return tensor

    batch = make_batch(rows=1, length=60)
    batch = replace(batch, loss_mask=batch.loss_mask & (torch.arange(60) > 50), prompt_tokens=(50,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)
    wide = [shape for shape in sizes if 50 in shape and shape[-1] in (32, 16)]  # hidden states, gates' features
    assert not wide and sizes


def test_weights_of_the_losses_and_the_direction_of_kl(tiny_llama: PreTrainedModel) -> None:
    gates, batch = forgetful(tiny_llama), make_batch()
    plain = GateObjective(tiny_llama, gates, budget=5)(batch)
    assert torch.equal(plain.total, (plain.ntp + plain.kl) / 2 + plain.capacity)
    weights = {"weight": 0.0, "ntp_weight": 0.0, "kl_weight": 2.0}
    other = GateObjective(tiny_llama, gates, 5, kl_direction="reverse", **weights)(batch)  # pyright: ignore[reportArgumentType]
    assert torch.equal(other.total, 2 * other.kl) and torch.equal(other.ntp, plain.ntp)
    teacher = tiny_llama(batch.input_ids, use_cache=False).logits.log_softmax(-1)
    with attach(tiny_llama, gates):
        student = tiny_llama(batch.input_ids, use_cache=False).logits.log_softmax(-1)
    target = batch.loss_mask[:, 1:]
    kl = (student.exp() * (student - teacher)).sum(-1)[:, :-1][target].mean()
    torch.testing.assert_close(other.kl, kl, rtol=1e-4, atol=1e-5)


def test_logits_are_chunked_by_bytes(tiny_llama: PreTrainedModel, tiny_model) -> None:
    """The bound is that of one fp32 tensor of logits, whatever the vocabulary."""
    gates = forgetful(tiny_llama)
    assert GateObjective(tiny_llama, gates, budget=5).chunk == 2**29 // (4 * 128)
    large = tiny_model("llama", vocab_size=151_936, hidden_size=8)
    assert GateObjective(large, RetentionGates.for_model(large, gate_width=4), budget=5).chunk == 883
    assert GateObjective(tiny_llama, gates, budget=5, chunk=7).chunk == 7


def test_layers_are_found_once_a_step(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputing a layer in backward attaches again, without a search of the model, and gates are checked once."""
    from tenure.retention import seams

    objective = GateObjective(tiny_llama, forgetful(tiny_llama), budget=5)
    objective.enable_gradient_checkpointing()
    found, checks = [], []
    real, check = seams.full_attention_layers, RetentionGates.check_model
    monkeypatch.setattr(seams, "full_attention_layers", lambda model: (found.append(1), real(model))[1])
    monkeypatch.setattr(RetentionGates, "check_model", lambda *given: (checks.append(1), check(*given))[1])
    for _ in range(2):
        objective(make_batch()).total.backward()
    assert len(found) == 2 and len(checks) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_rows_make_no_square_tensor(tiny_model, family: str) -> None:
    """Neither teacher nor student: memory is linear in packed rows (Gemma-3's sliding layers keep their masks)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from tenure.retention import seams

    length = 400
    model = tiny_model(family)
    batch = replace(make_batch(1, length), position_ids=(torch.arange(length) % 50)[None])
    batch.loss_mask[:, ::50] = False
    objective = GateObjective(model, forgetful(model), budget=5)
    objective.require_packing()
    square = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == out.shape[-2] == length:
                square.append(str(func))
            return out

    with Sizes():
        losses = objective(batch)
    # A sliding layer makes one mask in each forward, of boolean steps over index tensors.
    assert bool(square) == (family == "gemma3")
    reference = GateObjective(model, objective.gates, budget=5)
    reference._packs = True
    ids = batch.input_ids.view(8, 50)
    alone = replace(batch, input_ids=ids, position_ids=torch.arange(50).expand(8, 50),
                    loss_mask=batch.loss_mask.view(8, 50))  # fmt: skip
    torch.testing.assert_close(losses.kl, reference(alone).kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses.ntp, reference(alone).ntp, rtol=1e-3, atol=1e-5)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert seams.PREFIX + "maskless_sdpa" in ALL_ATTENTION_FUNCTIONS
