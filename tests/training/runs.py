"""Small training runs, in this process or, as a script, in others: `python runs.py OUTPUT_DIR JSON` trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tenure.scripts.soak.run_train_soak import shard_on_cpu
from tenure.training import Example, TrainConfig, TrainingInterrupted, train

TESTS = Path(__file__).parents[1]
SECONDS = 200  # of one run at most
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node")


class Tokens:
    """Random documents, the second half to be predicted; a function of the index alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def digest(self) -> str:
        return f"tokens {self.seed}"

    def __getitem__(self, index: int) -> Example:
        generator = torch.Generator().manual_seed(self.seed + index)
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
    return [(line["step"], line["ntp"], line["kl"], line["capacity"]) for line in lines if "ntp" in line]


def weights(output_dir: Path) -> bytes:
    return (output_dir / "gates" / "gates.safetensors").read_bytes()


def run(
    output_dir: Path, processes: int = 1, environment: dict[str, str] | None = None, **values: object
) -> subprocess.CompletedProcess[str]:
    """Trains in one other process, or in several over gloo.

    Besides settings, `values` may hold a model's `family`, `behaviours` of `main`, and `model` sizes.
    """
    launcher = (*TORCHRUN, str(processes)) if processes > 1 else ()
    command = [sys.executable, *launcher, str(Path(__file__)), str(output_dir), json.dumps(values)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | (environment or {})
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=variables, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:  # the launcher's own processes hold the pipes open too
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def signal_at(model: Any, source: Tokens, number: int, name: str) -> None:
    """Sends a signal to this process, once, when the model reads the example of a given number."""
    row, sent = source[number].input_ids, []

    def notice(module: Any, arguments: Any) -> None:
        if arguments[0][0].tolist() == row and not sent:
            sent.append(True)
            os.kill(os.getpid(), getattr(signal, name))

    model.model.embed_tokens.register_forward_pre_hook(notice)


def main(output_dir: Path, values: dict[str, Any]) -> int:
    """Trains a tiny model as `values` say; behaviours come out of them first.

    `signal`: (example, name) of `signal_at`; `own_folder`, `own_data`: every rank has its own; `poison`: examples that
    make the loss NaN; `evaluate_seconds`: duration of an evaluation; `limit_seconds`: the collectives' time limit;
    `kill_in_save`: SIGKILL while a step after this one is saved; `fsdp2`: the model is sharded.
    """
    sys.path.insert(0, str(TESTS))
    import conftest

    rank = int(os.environ.get("RANK", "0"))
    if values.pop("fsdp2", False):
        shard_on_cpu()
    model = conftest.build_tiny(values.pop("family", "llama"))  # pyright: ignore[reportAttributeAccessIssue]
    seed = rank if values.pop("own_data", False) else 0
    source = Tokens(seed)
    if "signal" in values:
        signal_at(model, source, *values.pop("signal"))
    if values.pop("own_folder", False):
        output_dir = output_dir / f"rank{rank}"
    if "poison" in values:
        poison(model, source, values.pop("poison"))
    if "kill_in_save" in values:
        kill_in_save(output_dir, values.pop("kill_in_save"))
    if "limit_seconds" in values:
        limit = timedelta(seconds=values.pop("limit_seconds"))
        torch.distributed.init_process_group("gloo", timeout=limit)
    seconds = values.pop("evaluate_seconds", None)

    def evaluate(model: Any, gates: Any) -> dict[str, float]:
        time.sleep(seconds)
        ids = torch.arange(3, 19)[None]
        return {"eval/logit": float(model(ids).logits.mean()), "eval/bias": float(gates.bias.mean())}

    try:
        train(settings(output_dir, **values), model, source, 0, None if seconds is None else evaluate)
    except TrainingInterrupted as interrupted:
        print(interrupted)
        return 75
    return 0


def poison(model: Any, source: Tokens, examples: list[int]) -> None:
    """Makes the model's states NaN wherever one of the examples is read."""
    rows = [source[index].input_ids for index in examples]

    def spoil(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        bad = arguments[0][0].tolist() in rows
        return output * float("nan") if bad else output

    model.model.embed_tokens.register_forward_hook(spoil)


def kill_in_save(output_dir: Path, step: int) -> None:
    from tenure.training import run_state

    real = run_state.write_synced

    def killed(path: Path, content: bytes) -> None:
        if (output_dir / "checkpoints" / f"step-{step:08d}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, content)

    run_state.write_synced = killed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
