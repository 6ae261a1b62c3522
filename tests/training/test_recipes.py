"""The recipes of configs/ are valid settings, and SLURM's script queues a job again exactly when it should."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from tenure.retention import gate_config
from tenure.training import TrainConfig, train_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    config = TrainConfig.from_yaml(path)
    assert config.mixed_precision == "bf16" and config.output_dir == f"runs/{path.stem}"


def submit(tmp_path: Path, status: int, *arguments: str) -> tuple[int, list[str]]:
    """Runs the script with stand-ins for SLURM's commands and for python; its status and their calls."""
    calls = tmp_path / "calls"
    for name, body in {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && echo node1; true',
        "srun": 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NTASKS=4 "$@"',
        "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> "$CALLS"; exit {status}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n",
    }  # fmt: skip
    done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_an_interrupted_job_is_queued_again_and_a_failed_one_is_not(tmp_path: Path) -> None:
    command = "3 1 4 node1 scripts/train_gates.py --config a.yaml --seed 2"
    calls = ["scontrol show hostnames n", command, "scontrol requeue 7"]
    assert submit(tmp_path, 75, "a.yaml", "--seed", "2") == (75, calls)
    for status in (0, 1):
        (tmp_path / "calls").unlink()
        assert submit(tmp_path, status, "a.yaml", "--seed", "2") == (status, ["scontrol show hostnames n", command])
    (tmp_path / "calls").unlink()
    assert submit(tmp_path, 0) == (2, [])


def test_the_settings_name_the_projections_of_the_gates() -> None:
    """They repeat the list, so that help needs no torch."""
    assert get_args(train_config.Projection) == get_args(gate_config.Projection)
