"""A model whose heads are divided among two processes keeps and generates what it does in one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tenure.retention import RetentionGates
from tests.conftest import build_tiny

from . import run_tensor_parallel

pytest.importorskip("transformers.distributed")
SCRIPT = Path(run_tensor_parallel.__file__)
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, which talk over gloo, and then what this one does with the whole model."""
    folder = tmp_path_factory.mktemp("divided")
    model = build_tiny("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    model.save_pretrained(folder)
    torch.manual_seed(1)
    gates = RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)
    gates.save_pretrained(folder / "gates")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    outputs = [folder / f"{rank}.json" for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(output)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    try:
        whole = {"runs": run_tensor_parallel.run(model, gates)}
        logs = [process.communicate(timeout=TIMEOUT_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(logs)
    return [*(json.loads(output.read_text()) for output in outputs), json.loads(json.dumps(whole))]


@pytest.mark.parametrize("name", run_tensor_parallel.RUNS)
def test_kept_sets_and_tokens(outcomes: list[dict[str, Any]], name: str) -> None:
    first, second, whole = (each["runs"][name] for each in outcomes)
    assert first["tokens"] == second["tokens"] == whole["tokens"]
    kept = [
        [low + high for low, high in zip(of_first, of_second, strict=True)]
        for of_first, of_second in zip(first["kept"], second["kept"], strict=True)
    ]
    assert kept == whole["kept"]
    assert first["entries"] == second["entries"] == whole["entries"]


def test_forks_and_rejected_tokens(outcomes: list[dict[str, Any]]) -> None:
    first, second, whole = (each["runs"]["fork"] for each in outcomes)
    assert first == second == whole
    assert whole["entries"][0] > whole["entries"][1]


def test_what_needs_all_heads_is_refused(outcomes: list[dict[str, Any]]) -> None:
    for each in outcomes[:2]:
        save, train, serve = each["refused"]
        assert save == "got a cache of a model in tensor parallel; accepted: one whose process has all heads"
        assert train.startswith("got LlamaForCausalLM in tensor parallel; accepted by attach(): ")
        assert serve.startswith("got a LlamaForCausalLM in tensor parallel; accepted: ")
