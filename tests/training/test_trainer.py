"""The training loop: it learns, resumes to the last bit, survives a kill, and splits over processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tenure.retention import RetentionGates
from tenure.training import Example, NotFiniteError, TrainConfig, train
from tenure.training.run_state import latest_state


class Tokens:
    """Random documents, the second half to be predicted; a function of the index alone."""

    def __getitem__(self, index: int) -> Example:
        generator = torch.Generator().manual_seed(index)
        input_ids = torch.randint(3, 128, (64,), generator=generator).tolist()
        return Example(input_ids, [i >= 32 for i in range(64)], "text")


def settings(output_dir: Path, **values: object) -> TrainConfig:
    base = {
        "gate_width": 16,
        "initial_bias": 4.0,
        "lengths": (64,),
        "steps": 8,
        "warmup_steps": 2,
        "learning_rate": 5e-3,
        "capacity_samples": 16,
        "log_every": 1,
        "save_every": 3,
        "gradient_checkpointing": False,
    }
    return TrainConfig(output_dir=str(output_dir), **(base | values))  # type: ignore[arg-type]


def losses(output_dir: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["ntp"], line["kl"], line["capacity"]) for line in lines]


def weights(output_dir: Path) -> bytes:
    return (output_dir / "gates" / "gates.safetensors").read_bytes()


def test_capacity_falls_and_the_gates_are_saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    config = settings(tmp_path, steps=40, learning_rate=2e-2)
    gates = train(config, tiny_llama, Tokens())
    curve = losses(tmp_path)
    assert len(curve) == 40
    assert curve[-1][3] < 0.5 * curve[0][3]
    loaded = RetentionGates.from_pretrained(tmp_path / "gates", tiny_llama)
    assert torch.equal(loaded.bias, gates.bias.cpu())
    assert loaded.info.training["steps"] == 40
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"quality", "occupancy/mean", "occupancy/max", "kept_share/layer_02", "tokens_per_s", "lr"} <= set(line)
    assert (tmp_path / "occupancy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop", [1, 4, 6, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path: Path, stop: int) -> None:
    """Stopped at any step, between checkpoints too: the same losses and the same gates, bit for bit."""
    train(settings(tmp_path / "whole"), tiny_model("llama"), Tokens())

    class Stop(Exception):
        pass

    def interrupt(step: int, values: dict[str, float]) -> None:
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        train(settings(tmp_path / "parts"), tiny_model("llama"), Tokens(), progress=interrupt)
    train(settings(tmp_path / "parts"), tiny_model("llama"), Tokens())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_other_settings_are_refused_on_resume(tiny_model, tmp_path: Path) -> None:
    train(settings(tmp_path, steps=3), tiny_model("llama"), Tokens())
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0.005 -> 0.1; steps: 3 -> 8\)"):
        train(settings(tmp_path, learning_rate=0.1), tiny_model("llama"), Tokens())


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, test_trainer
from tenure.training import run_state, train
output = Path(sys.argv[2])
values = json.loads(sys.argv[3])
if values.pop("kill", False):
    save = run_state.save_file
    def killed(*args, **kwargs):
        if (output / "checkpoints" / "step-00000003").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        save(*args, **kwargs)
    run_state.save_file = killed
train(test_trainer.settings(output, **values), conftest.build_tiny("llama"), test_trainer.Tokens())
"""


def run(output_dir: Path, launcher: tuple[str, ...] = (), **values: object) -> subprocess.CompletedProcess[str]:
    """Trains in another process; the tests' own folder is put on its path for the tiny model."""
    tests = Path(__file__).parents[1]
    folder = output_dir.parent / "script"
    folder.mkdir(exist_ok=True)
    script = folder / "run.py"
    script.write_text(SCRIPT)
    (folder / "conftest.py").write_text((tests / "conftest.py").read_text())
    (folder / "test_trainer.py").write_text(Path(__file__).read_text())
    command = [sys.executable, *launcher, str(script), str(folder), str(output_dir), json.dumps(values)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_kill_9_while_saving_keeps_the_last_good_checkpoint(tiny_model, tmp_path: Path) -> None:
    """The process dies inside the save of step 6: step 3 is still whole, and a resumed run ends as if nothing was."""
    train(settings(tmp_path / "whole"), tiny_model("llama"), Tokens())
    result = run(tmp_path / "killed", kill=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert any(checkpoints.glob(".saving-*"))
    newest = latest_state(checkpoints)
    assert newest is not None and newest.name == "step-00000003"
    train(settings(tmp_path / "killed"), tiny_model("llama"), Tokens())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not any(checkpoints.glob(".saving-*"))


def test_two_processes_equal_one_with_accumulation(tmp_path: Path) -> None:
    """gloo on CPU: the same examples, the same losses; sums of floats in another order are all that differs."""
    one = run(tmp_path / "one", accumulation=2)
    two = run(tmp_path / "two", ("-m", "torch.distributed.run", "--nproc_per_node", "2"))
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    ours, reference = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(ours) == len(reference) == 8
    for a, b in zip(ours, reference, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    settings_file = tmp_path / "two" / "checkpoints" / "step-00000008" / "state.json"
    assert json.loads(settings_file.read_text())["settings"]["global_batch"] == 2


def test_nan_stops_with_the_batch_named(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    def poison(step: int, values: dict[str, float]) -> None:
        if step == 4:
            tiny_llama.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(NotFiniteError, match=r"not finite at step 5, examples 4 to 4 of process 0.*step-00000003"):
        train(settings(tmp_path), tiny_llama, Tokens(), progress=poison)
    newest = latest_state(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step-00000003"
    assert not (tmp_path / "gates").exists()


def test_evaluation_in_the_loop_is_logged(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    seen = []

    def evaluate(model: PreTrainedModel, gates: RetentionGates) -> dict[str, float]:
        seen.append(gates.bias.detach().clone())
        model.eval()
        return {"eval/kl@0.2": 0.5}

    train(settings(tmp_path, eval_every=4, gradient_checkpointing=True), tiny_llama, Tokens(), evaluate=evaluate)
    # Layers are in training mode, which gradient checkpointing needs, while a step computes and at no other time.
    assert not any(module.training for module in tiny_llama.modules())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/kl@0.2" in line] == [4, 8]
    assert not torch.equal(seen[0], seen[1])
    assert RetentionGates.from_pretrained(tmp_path / "gates").info.metrics == {"eval/kl@0.2": 0.5}


def test_offline_wandb_needs_no_account(tmp_path: Path, tiny_llama: PreTrainedModel, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train(settings(tmp_path / "run", tracker="wandb", steps=2), tiny_llama, Tokens())
    written = [path.name for path in (tmp_path / "wandb").iterdir()]
    assert any(name.startswith("offline-run") for name in written)


def test_starting_from_given_gates(tiny_model, tmp_path: Path) -> None:
    first = train(settings(tmp_path / "first", steps=2), tiny_model("llama"), Tokens())
    config = settings(tmp_path / "second", steps=1, learning_rate=1e-12, init_gates=str(tmp_path / "first" / "gates"))
    second = train(config, tiny_model("llama"), Tokens())
    torch.testing.assert_close(second.bias, first.bias)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 0", "c.yaml: got 0 as steps; accepted: a whole number of 1 or more"),
        ("lengths: [8]", r"got 8 as lengths\[0\]; accepted: a whole number of 64 or more"),
        ("learning_rat: 1", r"got unknown fields learning_rat \(meant is perhaps learning_rate\); accepted: model, "),
        ("- 1", "got a list as the document; accepted: a mapping of model, revision"),
        ("a: [", "is not YAML"),
    ],
)
def test_wrong_config_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_yaml(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match="no config file at"):
        TrainConfig.from_yaml(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eviction_budgets": (0.2,)}, "above 0 with eviction_budgets"),
        ({"prompt_share": 1.5}, "got 1.5 as prompt_share; accepted: a number from 0 to 1"),
        ({"prompt_share": 0.5, "gradient_checkpointing": True}, "set gradient_checkpointing to false"),
        (
            {"prompt_share": 0.5, "eviction_budgets": (0.2, 2.0)},
            r"got 2.0 as eviction_budgets\[1\]; accepted: a number above 0 and up to 1",
        ),
        (
            {"prompt_share": 0.5, "eviction_budgets": (0.2,), "eviction_temperature": 0.0},
            "got 0.0 as eviction_temperature; accepted: a number above 0",
        ),
        ({"facts": (3, 2)}, r"got \(3, 2\) as facts; accepted: a range"),
        ({"questions": (1, 2, 3)}, "got a list of 3 as questions; accepted: a list of 2"),
    ],
)
def test_wrong_settings_of_synthetic_documents_are_named(tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **values)


class Prompts:
    """Two documents over and over, most of each a prompt."""

    def __getitem__(self, index: int) -> Example:
        generator = torch.Generator().manual_seed(index % 2)
        ids = torch.randint(3, 128, (160,), generator=generator).tolist()
        return Example(ids, [place > 120 for place in range(160)], "text", prompt_tokens=120)


def test_soft_eviction_lowers_the_quality_loss(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    """Trained through the eviction itself, with no capacity loss at all."""
    values = {"prompt_share": 1.0, "eviction_budgets": (0.4,), "capacity_weight": 0.0, "batch_size": 2}
    train(settings(tmp_path, steps=60, **values), tiny_llama, Prompts())
    quality = [ntp + kl for _, ntp, kl, _ in losses(tmp_path)]
    assert quality[-1] < 0.97 * quality[0]
