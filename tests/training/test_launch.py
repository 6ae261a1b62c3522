"""Runs under launchers: several processes, sharded models, signals, agreement on state and data."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tenure.retention import RetentionGates
from tenure.scripts import loading, train_gates
from tenure.scripts.train_gates import LogLines
from tenure.training import NotFiniteError, TrainConfig, TrainingInterrupted, train
from tenure.training.digests import base_digest
from tenure.training.launch import RUN_AGAIN, stop_signals, with_launcher
from tenure.training.run_state import latest_state, write_synced

from .runs import Tokens, losses, poison, run, settings, signal_at, weights


def checked(output_dir: Path, processes: int = 1, **values: Any) -> None:
    result = run(output_dir, processes, **values)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of two processes, data parallel."""
    folder = tmp_path_factory.mktemp("ddp")
    checked(folder, 2)
    return folder


def test_a_sharded_model_trains_the_same_gates_and_resumes_anywhere(data_parallel: Path, tmp_path: Path) -> None:
    """FSDP2 on two processes, interrupted and resumed, once by itself and once without FSDP: the same bytes."""
    values: dict[str, Any] = {"eval_every": 4, "evaluate_seconds": 0}
    stopped = run(tmp_path / "again", 2, fsdp2=True, signal=(10, "SIGTERM"), **values)
    assert "the state of step 6 is saved" in stopped.stdout, stopped.stderr[-3000:]
    shutil.copytree(tmp_path / "again", tmp_path / "without")
    for name, sharded in (("again", True), ("without", False)):
        folder = tmp_path / name
        checked(folder, 2, fsdp2=sharded, **values)
        assert losses(folder) == losses(data_parallel)
        assert weights(folder) == weights(data_parallel)
    lines = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/logit" in line] == [4, 8]


def test_a_state_of_two_processes_continues_on_one(data_parallel: Path, tmp_path: Path) -> None:
    """The other one's share becomes accumulation."""
    stopped = run(tmp_path, 2, fsdp2=True, signal=(10, "SIGTERM"))
    assert "is saved" in stopped.stdout, stopped.stderr[-3000:]
    checked(tmp_path, 1, accumulation=2)
    for ours, reference in zip(losses(tmp_path), losses(data_parallel), strict=True):
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-6)


def test_any_rank_that_is_signalled_stops_all_after_a_saved_step(data_parallel: Path, tmp_path: Path) -> None:
    """Example 7 is read by rank 1 at step 4; both stop after it, and folders of their own are no hindrance."""
    stopped = run(tmp_path, 2, signal=(7, "SIGUSR1"), own_folder=True)
    assert stopped.returncode != 0 and stopped.stdout.count("the state of step 4 is saved") == 2, stopped.stderr[-3000:]
    newest = latest_state(tmp_path / "rank0" / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"
    assert latest_state(tmp_path / "rank1" / "checkpoints") is None
    checked(tmp_path, 2, own_folder=True)
    assert weights(tmp_path / "rank0") == weights(data_parallel)


def test_the_exit_status_of_an_interrupted_run_means_run_me_again(tmp_path: Path) -> None:
    stopped = run(tmp_path, signal=(3, "SIGINT"))
    assert stopped.returncode == RUN_AGAIN == 75, stopped.stderr[-3000:]
    newest = latest_state(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_while_the_model_is_loaded(name: str, monkeypatch, capsys, tmp_path: Path) -> None:
    """Pre-emption leaves nothing behind and asks to be run again; Ctrl-C is that of any command."""
    number = getattr(signal, name)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(number)
    monkeypatch.setattr(loading, "load_model", lambda *args, **kwargs: signal.raise_signal(number))
    config = TrainConfig(model="demo", output_dir=str(tmp_path / "run"))
    if name == "SIGINT":
        with pytest.raises(KeyboardInterrupt):
            train_gates.main(config)
    else:
        assert train_gates.main(config) == RUN_AGAIN
        assert "nothing was changed, and the same command runs again (exit status 75)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and signal.getsignal(number) == before


def test_ranks_with_different_data_are_refused(tmp_path: Path) -> None:
    result = run(tmp_path, 2, own_data=True)
    assert result.returncode != 0
    assert "the processes of this run have different training data (digests)" in result.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_evaluation_may_last_longer_than_a_collective(tmp_path: Path) -> None:
    checked(tmp_path, 2, steps=2, eval_every=2, evaluate_seconds=12, limit_seconds=10)
    assert weights(tmp_path)


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    with stop_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_signals_of_the_last_step_do_not_undo_the_run(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    signal_at(tiny_llama, source := Tokens(), 1, "SIGTERM")
    train(settings(tmp_path, steps=2), tiny_llama, source)
    assert weights(tmp_path)


@pytest.mark.parametrize(
    ("environment", "values", "expected"),
    [
        ({}, {}, ("no", 1)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, ("bf16", 4)),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"mixed_precision": "bf16", "accumulation": 2}, ("bf16", 2)),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}, ("bf16", 1)),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, {}, ("no", 1)),
    ],
)
def test_the_launchers_settings_count_unless_ours_are_given(environment: dict, values: dict, expected: tuple) -> None:
    config = with_launcher(replace(TrainConfig(), **values), environment)
    assert (config.mixed_precision, config.accumulation) == expected


@pytest.mark.parametrize(
    ("environment", "values", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, "got mixed_precision no and bf16 from the"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"accumulation": 2}, "got accumulation 2 and 4 from the"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"}, {}, "got 'x' as ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "got mixed_precision 'fp8' from the launcher; accepted: no, bf16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {}, "got DeepSpeed ZeRO-3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, {}, "got DeepSpeed ZeRO-2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "got FSDP version 1 from the launcher; accepted: data parallel"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "cpu_ram"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "got Megatron-LM"),
    ],
)
def test_contradictions_and_other_strategies_are_refused(environment: dict, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_launcher(replace(TrainConfig(), **values), environment)


def test_fsdp_that_accelerate_would_ignore_is_refused(tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="where accelerate ignores it"):
        train(settings(tmp_path), tiny_llama, Tokens())


def test_other_data_and_other_weights_are_refused_on_resume(tiny_model, tmp_path: Path) -> None:
    train(settings(tmp_path, steps=3), tiny_model("llama"), Tokens())
    with pytest.raises(ValueError, match=r"other settings \(digest of the data: "):
        train(settings(tmp_path, steps=3), tiny_model("llama"), Tokens(seed=1))
    other = tiny_model("llama")
    other.model.layers[1].mlp.up_proj.weight.data += 0.1  # the embeddings are the same
    with pytest.raises(ValueError, match=r"other settings \(digest of the base: "):
        train(settings(tmp_path, steps=3), other, Tokens())
    assert base_digest(tiny_model("llama")) == base_digest(tiny_model("llama").to(torch.bfloat16))
    state = tmp_path / "checkpoints" / "step-00000003" / "state.json"
    old = json.loads(state.read_text())
    for name in ("digests", "skipped", "metrics", "evaluated", "best"):
        del old[name]
    del old["settings"]["overlong"]
    state.write_text(json.dumps(old))  # as a version without these wrote it
    train(settings(tmp_path, steps=3), tiny_model("llama"), Tokens())
    with pytest.raises(ValueError, match=r"overlong: 'cut' -> 'drop'"):
        train(settings(tmp_path, steps=3, overlong="drop"), tiny_model("llama"), Tokens())


def test_an_extended_run_goes_on_at_the_least_learning_rate(tiny_model, tmp_path: Path) -> None:
    train(settings(tmp_path), tiny_model("llama"), Tokens())
    before = losses(tmp_path)
    train(settings(tmp_path, extend=3), tiny_model("llama"), Tokens())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses(tmp_path)[:8] == before and [line["step"] for line in lines[8:]] == [9, 10, 11]
    assert [line["lr"] for line in lines[8:]] == pytest.approx([1e-6] * 3)


def test_bad_steps_are_skipped_as_often_as_allowed(tiny_model, tmp_path: Path, caplog) -> None:
    """Also across a resumption; the update of a skipped step is left out, and its examples are named."""
    config = settings(tmp_path, skip_nonfinite=2, accumulation=2, save_every=1)
    model, source = tiny_model("llama"), Tokens()
    poison(model, source, [3, 8])
    gates = train(replace(config, steps=5), model, source)
    assert "the loss is not finite at step 2, examples 3 to 3 of process 0; the step is skipped, 1 of 2" in caplog.text
    assert all(bool(torch.isfinite(one).all()) for one in gates.parameters())
    state = json.loads((tmp_path / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert state["skipped"] == [2, 5]
    poison(model, source, [11])
    with pytest.raises(NotFiniteError, match=r"at step 6, examples 11 to 11 .*; 2 steps were skipped before; the last"):
        train(replace(config, steps=5, extend=2), model, source)


def test_a_gradient_that_is_not_finite_stops_too(tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch) -> None:
    """The loss is finite, so only its gradient shows it; gates would be NaN after the step."""
    from tenure.training.objective import GateObjective

    real = GateObjective.forward

    def spoiled(self: GateObjective, batch: Any, seed: int = 0) -> Any:
        result = real(self, batch, seed)
        slope = result.total + (self.gates.bias * 0).sum().sqrt()  # 0, with an infinite derivative times 0
        return replace(result, total=slope)

    monkeypatch.setattr(GateObjective, "forward", spoiled)
    with pytest.raises(NotFiniteError, match="the gradient is not finite at step 1, examples 0 to 0 of all processes"):
        train(settings(tmp_path), tiny_llama, Tokens())


def test_a_skipped_step_of_two_processes(tmp_path: Path) -> None:
    """Rank 1 reads the bad example; both leave the step out, sharded or not."""
    for name, sharded in (("ddp", False), ("fsdp", True)):
        checked(tmp_path / name, 2, poison=[5], skip_nonfinite=1, fsdp2=sharded)
    assert [line[0] for line in losses(tmp_path / "ddp")] == [1, 2, 4, 5, 6, 7, 8]
    assert weights(tmp_path / "ddp") == weights(tmp_path / "fsdp")


def test_checkpoints_are_readable_and_synced(tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch) -> None:
    synced = []
    real = os.fsync

    def noted(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", noted)
    before = os.umask(0o027)
    try:
        train(settings(tmp_path, steps=1), tiny_llama, Tokens())
    finally:
        os.umask(before)
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert all(path.stat().st_mode & stat.S_IRGRP for path in folder.iterdir())
    names = [Path(name).name for name in synced]
    assert {"optimizer.safetensors", "state.json", "checkpoints"} <= set(names)
    assert names.index("state.json") < names.index("checkpoints")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "state.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/state.json'"):
        write_synced(tmp_path / "state.json", b"x")


def test_time_is_a_reason_to_save(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    seen = []

    def look(step: int, values: dict[str, float]) -> None:
        newest = latest_state(tmp_path / "checkpoints")
        seen.append(newest and newest.name)

    train(settings(tmp_path, save_every=100, save_minutes=1e-6), tiny_llama, Tokens(), progress=look)
    assert seen[1:] == [f"step-{step:08d}" for step in range(1, 8)]


def test_the_best_gates_are_kept(tiny_model, tmp_path: Path) -> None:
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
    steps = iter(values)

    def evaluate(model: PreTrainedModel, gates: RetentionGates) -> dict[str, float]:
        return {"eval/kl": values[next(steps)]}

    config = settings(tmp_path, eval_every=2, best_metric="eval/kl")
    train(replace(config, steps=8), tiny_model("llama"), Tokens(), evaluate=evaluate)
    best = RetentionGates.from_pretrained(tmp_path / "best")
    assert best.info.metrics == {"eval/kl": 1.0, "step": 4}
    assert not torch.equal(best.bias, RetentionGates.from_pretrained(tmp_path / "gates").bias)
    with pytest.raises(ValueError, match="got best_metric 'eval/x'; accepted: eval/kl"):
        train(settings(tmp_path / "x", eval_every=1, best_metric="eval/x"), tiny_model("llama"), Tokens(),
              evaluate=lambda model, gates: {"eval/kl": 1.0})  # fmt: skip
    with pytest.raises(ValueError, match="accepted: an eval_every above 0 with best_metric"):
        settings(tmp_path, best_metric="eval/kl")


def test_an_evaluation_that_an_interruption_left_out_is_made_up_for(tiny_model, tmp_path: Path) -> None:
    seen = []

    def evaluate(model: PreTrainedModel, gates: RetentionGates) -> dict[str, float]:
        seen.append(float(gates.bias.mean().detach()))
        return {"eval/kl": 0.0}

    config = settings(tmp_path, eval_every=4)
    signal_at(model := tiny_model("llama"), source := Tokens(), 3, "SIGTERM")
    with pytest.raises(TrainingInterrupted, match="the state of step 4 is saved"):
        train(config, model, source, evaluate=evaluate)
    assert not seen
    train(config, tiny_model("llama"), Tokens(), evaluate=evaluate)
    assert len(seen) == 2 and seen[0] != seen[1]


def test_lines_of_a_log_file_come_in_time_with_time_to_go(capsys) -> None:
    now = iter([0.0, 10.0, 31.0, 40.0, 50.0])
    lines = LogLines(5, seconds=30, clock=lambda: next(now))
    for step in range(1, 6):
        lines(step, {"quality": 1.0, "capacity": math.pi})
    assert capsys.readouterr().err.splitlines() == [
        "step 1 of 5: quality 1.000  capacity 3.142",
        "step 3 of 5: quality 1.000  capacity 3.142, 0:00:31 to go",
        "step 5 of 5: quality 1.000  capacity 3.142, 0:00:00 to go",
    ]
