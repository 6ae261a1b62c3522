"""The training loop: it learns, resumes to the last bit, survives a kill, and splits over processes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tenure.retention import RetentionGates
from tenure.training import Example, NotFiniteError, TrainConfig, train
from tenure.training.run_state import latest_state

from .runs import Tokens, losses, run, settings, weights


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


def test_kill_9_while_saving_keeps_the_last_good_checkpoint(tiny_model, tmp_path: Path) -> None:
    """The process dies inside the save of step 6: step 3 is still whole, and a resumed run ends as if nothing was."""
    train(settings(tmp_path / "whole"), tiny_model("llama"), Tokens())
    result = run(tmp_path / "killed", kill_in_save=3)
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
    two = run(tmp_path / "two", 2)
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
    train(settings(tmp_path / "run", tracker=("wandb",), steps=2), tiny_llama, Tokens())
    written = [path.name for path in (tmp_path / "wandb").iterdir()]
    assert any(name.startswith("offline-run") for name in written)


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, tiny_model, monkeypatch) -> None:
    """Named after its folder, with versions, the global batch and digests in its configuration."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    started = []
    real = wandb.init

    def noted(**options: object) -> object:
        started.append(options)
        return real(**options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(wandb, "init", noted)
    for extend in (0, 2):
        train(settings(tmp_path / "my-run", tracker=("wandb",), steps=2, extend=extend), tiny_model("llama"), Tokens())
    assert started[0]["id"] == started[1]["id"] and started[0]["name"] == "my-run" and started[0]["resume"] == "allow"
    train(settings(tmp_path / "other", tracker=("wandb",), steps=1), tiny_model("llama"), Tokens())
    assert started[2]["id"] != started[0]["id"]


def test_tensorboard_shows_losses_and_pictures(tmp_path: Path, tiny_model) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = settings(tmp_path, tracker=("tensorboard",), steps=3)
    train(config, tiny_model("llama"), Tokens())
    (folder,) = {path.parent for path in tmp_path.rglob("events.*") if path.parent.name == "tenure"}
    events = EventAccumulator(str(folder)).Reload()
    assert [one.step for one in events.Scalars("quality")] == [1, 2, 3]
    picture = events.Images("occupancy")[0]
    assert picture.width > 100 and picture.height > 100


def test_a_missing_tracker_is_an_error(tmp_path: Path, tiny_llama: PreTrainedModel, monkeypatch) -> None:
    found = {"accelerate": object()}
    monkeypatch.setattr("tenure.training.launch.find_spec", found.get)
    with pytest.raises(ImportError, match="got tracker wandb, which is not installed: pip install wandb"):
        train(settings(tmp_path, tracker=("wandb",)), tiny_llama, Tokens())


def test_losses_of_held_out_examples_are_logged(tmp_path: Path, tiny_llama: PreTrainedModel) -> None:
    held = [Tokens()[index] for index in range(100, 103)]
    train(settings(tmp_path, eval_every=4, learning_rate=1e-12), tiny_llama, Tokens(), held_out=held)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "eval/held_out_ntp" in line]
    assert [line["step"] for line in found] == [4, 8]
    logits = [tiny_llama(torch.tensor([one.input_ids])).logits[0].log_softmax(-1) for one in held]
    expected = [
        -float(scores[place - 1, one.input_ids[place]]) for one, scores in zip(held, logits, strict=True)
        for place in range(32, 64)
    ]  # fmt: skip
    # At β near 1 the student's losses are near the plain model's.
    assert found[0]["eval/held_out_ntp"] == pytest.approx(sum(expected) / len(expected), rel=0.2)
    assert found[0]["eval/held_out_kl"] > 0


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
