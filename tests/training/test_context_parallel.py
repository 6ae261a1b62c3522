"""Sequences divided among gloo processes against one process: losses and the gates' gradients."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tenure.retention import RetentionGates
from tenure.retention.context_parallel import ContextGroup
from tenure.training import Batch, GateObjective, train
from tenure.training.launch import with_launcher
from tenure.training.train_config import TrainConfig

from .runs import Tokens, losses, run, settings

WORLD = 4
SECONDS = 120  # of the processes of one test at most


def in_processes(folder: Path, body: Callable[[int], Any]) -> list[Any]:
    """What `body(rank)` returns in each of `WORLD` forked processes over gloo."""

    def child(rank: int) -> None:
        try:
            torch.set_num_threads(1)  # the threads of the parent's pool do not exist here
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
            torch.save(body(rank), folder / f"{rank}.pt")
            dist.barrier()
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=child, args=(rank,)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not errors, errors[0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def forgetful(model: Any) -> RetentionGates:
    torch.manual_seed(3)
    return RetentionGates.for_model(model, gate_width=16, initial_bias=1.0, init_std=0.4)


def batch(kind: str, seed: int) -> Batch:
    """Two rows of 43 tokens: whole, `packed`, `padded`, or with targets in the last tokens only (`late`)."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 2, 43
    input_ids = torch.randint(3, 128, (rows, length), generator=generator)
    loss_mask = torch.rand(rows, length, generator=generator) < 0.4
    position_ids, mask = torch.arange(length).expand(rows, length), None
    if kind == "packed":
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((19, 2, 22), (8, 30, 5))])
    if kind == "padded":
        mask = torch.ones_like(input_ids)
        mask[1, 30:] = 0
        position_ids = position_ids * mask
    if kind == "late":
        loss_mask[:, :-5] = False
        loss_mask[:, -5:] = True
    return Batch(input_ids, position_ids, mask, loss_mask & (position_ids > 0))


CASES: dict[str, dict[str, Any]] = {
    "whole": {"family": "llama", "objective": {"budget": 5, "samples": None}},
    "packed": {"family": "qwen3", "objective": {"budget": 0.2, "samples": 8}, "recomputed": True},
    "padded": {"family": "llama", "objective": {"budget": 4, "scope": "local", "kl_direction": "reverse"}},
    "late": {"family": "llama", "objective": {"budget": 6, "weight": 0.3, "chunk": 3}, "recomputed": True},
}


def results(build: Any, kind: str, seed: int, context: ContextGroup | None = None) -> list[torch.Tensor]:
    """Losses and gradients of one case; under `context` the mean of the gradients of its processes."""
    case = CASES[kind]
    model = build(case["family"])
    gates = forgetful(model)
    objective = GateObjective(model, gates, **case["objective"], context=context)
    if case.get("recomputed"):
        objective.enable_gradient_checkpointing()
    found = objective(batch(kind, seed), seed=seed)
    found.total.backward()
    gradients = [parameter.grad for parameter in gates.parameters()]
    if context is not None:
        gradients = [context.sum(gradient) / context.size for gradient in gradients]  # pyright: ignore[reportArgumentType]
    return [*(one.detach() for one in (found.total, found.ntp, found.kl, found.capacity)), *gradients]  # pyright: ignore[reportReturnType]


def test_losses_and_gradients_are_those_of_one_process(tiny_model: Any, tmp_path: Path) -> None:
    """Four processes share a batch, and two pairs of processes share one each."""

    def body(rank: int) -> dict[tuple[str, int], list[torch.Tensor]]:
        found = {}
        for size in (2, 4):
            context = ContextGroup.of_size(size)
            for kind in CASES:
                found[kind, size] = results(tiny_model, kind, seed=rank // size, context=context)
        return found

    ranks = in_processes(tmp_path, body)
    for kind in CASES:
        expected = [results(tiny_model, kind, seed) for seed in range(2)]
        for size in (2, 4):
            for rank, found in enumerate(ranks):
                reference = expected[rank // size]
                for ours, single in zip(found[kind, size][:4], reference[:4], strict=True):
                    torch.testing.assert_close(ours, single, rtol=0, atol=1e-6)
                for ours, single in zip(found[kind, size][4:], reference[4:], strict=True):
                    assert (ours - single).abs().max() <= 1e-5 * max(1.0, float(single.abs().max())), (kind, size)
        assert max(float(gradient.abs().max()) for gradient in expected[0][4:]) > 1e-2


def test_every_token_has_one_owner_and_the_work_is_balanced() -> None:
    """Pairs of queries and keys of each process differ by no more than the squares on the diagonal."""
    columns = torch.arange(48)[None]
    for size in (2, 3, 4):
        owned = [ContextGroup(None, rank, size).local(columns)[0] for rank in range(size)]
        assert torch.equal(torch.cat(owned).sort().values, columns[0])
        assert len({int((part + 1).sum()) for part in owned}) == 1


def test_training_with_context_parallel_is_training(tiny_model: Any, tmp_path: Path) -> None:
    """Through the trainer: two processes that share sequences of a sharded model, against one process."""
    common: dict[str, Any] = {"steps": 2, "gradient_checkpointing": True}
    train(settings(tmp_path / "one", **common), tiny_model("llama"), Tokens())
    done = run(tmp_path / "shared", 2, context_parallel=2, fsdp2=True, **common)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, single in zip(losses(tmp_path / "shared"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(single, rel=1e-4, abs=1e-6)


def test_what_cannot_be_divided_is_refused(tiny_model: Any) -> None:
    context = ContextGroup(None, 0, 2)
    with pytest.raises(ValueError, match="2 of 3 layers without full attention"):
        GateObjective(model := tiny_model("gemma3"), forgetful(model), 5, context=context)
    model = tiny_model("llama")
    objective = GateObjective(model, forgetful(model), 5, context=context)
    with pytest.raises(ValueError, match="got prompts with context_parallel"):
        objective(replace(batch("whole", 0), prompt_tokens=(9, 9)))
    with pytest.raises(ValueError, match="got context_parallel 2 with 1 processes"):
        ContextGroup.of_size(2)
    with pytest.raises(ValueError, match=r"prompt_share .* and context_parallel"):
        TrainConfig(context_parallel=2, prompt_share=0.5, gradient_checkpointing=False)
    with pytest.raises(
        ValueError, match="parallelism_config_cp_size 2 from the launcher; accepted: --context-parallel"
    ):
        environment = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}
        with_launcher(TrainConfig(), environment)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_attention_of_some_queries_is_a_part_of_all(kernels: Any) -> None:
    """Over packed rows, forward and every gradient, in both implementations."""
    from tenure.retention import Segments, gated_attention
    from tenure.retention.ops.after_prompt import gated_attention_part

    torch.manual_seed(0)
    shapes = (1, 4, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    inputs.append((-torch.rand(1, 2, 40)).requires_grad_())
    positions = torch.cat([torch.arange(n) for n in (7, 21, 12)])[None]
    segments = Segments.from_inputs(1, 40, position_ids=positions)
    first, stop = 5, 31
    whole = gated_attention(*inputs, 0.25, segments, "naive")[:, :, first:stop]  # pyright: ignore[reportCallIssue]
    query, *rest = inputs
    part = gated_attention_part(query[:, :, first:stop], *rest, 0.25, segments, first, kernels)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(whole)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (part, whole)), strict=True)
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
