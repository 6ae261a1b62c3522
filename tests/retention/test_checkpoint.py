"""Gates on disk: what comes back, and one clear error for everything that may be wrong with a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from tenure.retention import CheckpointError, CheckpointInfo, RetentionGates, fingerprint
from tenure.retention.checkpoint import CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture
def gates(tiny_llama: PreTrainedModel) -> RetentionGates:
    torch.manual_seed(0)
    return RetentionGates.for_model(tiny_llama, gate_width=16)


@pytest.fixture
def folder(gates: RetentionGates, tmp_path: Path) -> Path:
    gates.save_pretrained(tmp_path / "gates", CheckpointInfo("tiny", metrics={"needle": 1.0}))
    return tmp_path / "gates"


def rewrite_config(folder: Path, **values: object) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text()) | values
    (folder / CONFIG_FILE).write_text(json.dumps(document))


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """New weights with a matching checksum, as another program might write them."""
    import hashlib

    content = save(tensors)
    (folder / WEIGHTS_FILE).write_bytes(content)
    rewrite_config(folder, weights_sha256=hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("projection", ["per_layer", "shared", "shared_heads"])
def test_round_trip(tiny_llama: PreTrainedModel, tmp_path: Path, projection: str) -> None:
    gates = RetentionGates.for_model(tiny_llama, gate_width=16, projection=projection)
    gates.save_pretrained(tmp_path)
    loaded = RetentionGates.from_pretrained(tmp_path, tiny_llama)
    assert loaded.config == gates.config and loaded.info == gates.info
    for name, tensor in gates.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert sorted(os.listdir(tmp_path)) == [WEIGHTS_FILE, CONFIG_FILE]


def test_bf16_halves_the_file_and_loads_as_fp32(gates: RetentionGates, tmp_path: Path) -> None:
    gates.save_pretrained(tmp_path / "a")
    gates.save_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in "ab"]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = RetentionGates.from_pretrained(tmp_path / "b")
    assert loaded.bias.dtype == torch.float32
    torch.testing.assert_close(loaded.weight, gates.weight, rtol=1e-2, atol=1e-3)


def test_info_is_kept(folder: Path) -> None:
    assert RetentionGates.from_pretrained(folder).info.metrics == {"needle": 1.0}


def test_truncated_weights(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=r"gates.safetensors \(\d+ bytes\) is not the file .* is truncated"):
        RetentionGates.from_pretrained(folder)


def test_newer_schema(folder: Path) -> None:
    rewrite_config(folder, schema_version=99)
    with pytest.raises(CheckpointError, match="schema version 99; this version of tenure reads up to 1"):
        RetentionGates.from_pretrained(folder)


def test_missing_and_unexpected_keys_are_named_together(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors["extra"] = tensors.pop("bias")
    tensors["weight"] = tensors["weight"][:1].clone()
    rewrite_weights(folder, tensors)
    with pytest.raises(
        CheckpointError, match=r"missing \['bias'\], unexpected \['extra'\], wrong shapes \['weight \(1, 16\) instead"
    ):
        RetentionGates.from_pretrained(folder)


def test_not_a_safetensors_file(folder: Path) -> None:
    import hashlib

    for content in (b"not tensors", b"", (3).to_bytes(8, "little") + b"[0]"):
        (folder / WEIGHTS_FILE).write_bytes(content)
        rewrite_config(folder, weights_sha256=hashlib.sha256(content).hexdigest())
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", float("nan"), "weight in gates.safetensors has numbers that are not finite or beyond 1e"),
        ("bias", float("inf"), "bias in gates.safetensors has numbers that are not finite"),
        ("bodies.1.0.weight", -1e38, "bodies.1.0.weight in gates.safetensors has numbers that are not finite"),
    ],
)
def test_weights_that_would_give_no_log_beta(folder: Path, name: str, value: float, message: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[name].view(-1)[-1] = value
    rewrite_weights(folder, tensors)
    with pytest.raises(CheckpointError, match=message):
        RetentionGates.from_pretrained(folder)


def test_weights_of_whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite_weights(folder, tensors | {"bias": tensors["bias"].int()})
    with pytest.raises(CheckpointError, match=r"bias in gates\.safetensors is torch\.int32; accepted: "):
        RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2**40}, "got 1099511627776 as hidden_size; accepted: a whole number from 1 to"),
        (
            {"hidden_size": 2**23, "gate_width": 2**23},
            r"wrong shapes \['bodies.0.0.bias \(16,\) instead of \(8388608,\)",
        ),
        ({"layer_indices": list(range(10**5))}, "got 100000 items as gates.layer_indices; accepted: up to 65536"),
        (
            {"layer_indices": list(range(4096))},
            r"it lacks those of the layers 3, 4, .* and 4083 more, and has those of no",
        ),
        ({"layer_indices": [0, 1]}, "and has those of the layers 2, which tenure_config.json does not name"),
        ({"activation": "none"}, "got 'none' as activation; accepted: transformers' names"),
    ],
)
def test_sizes_that_only_the_configuration_has_are_not_built(folder: Path, change: dict, message: str) -> None:
    """2^23 squared weights a layer are 256 TB: nothing of that size may be made before the file is compared."""
    document = json.loads((folder / CONFIG_FILE).read_text())
    rewrite_config(folder, gates=document["gates"] | change)
    with pytest.raises(CheckpointError, match=message):
        RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_absent_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": "x"}'])
def test_broken_configuration(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="is not a gates configuration"):
        RetentionGates.from_pretrained(folder)


def test_unknown_field(folder: Path) -> None:
    document = json.loads((folder / CONFIG_FILE).read_text())
    rewrite_config(folder, gates=document["gates"] | {"depth": 3})
    with pytest.raises(CheckpointError, match="got unknown fields depth; accepted: hidden_size, num_kv_heads"):
        RetentionGates.from_pretrained(folder)


@pytest.mark.parametrize(
    "source",
    ["/nowhere/at/all", "./nothing", "a/b/c", "owner/name", "examples/absent", "hub:a", "hub:a/b/c", "hub:../b"],
)
def test_no_such_folder(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(CheckpointError, match=r"no gates at .*; accepted: a folder, demo, or hub:owner/name"):
        RetentionGates.from_pretrained(source)


def test_gates_of_the_hub(folder: Path, gates: RetentionGates, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def give(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        if (repository, revision) != ("me/gates", "v1"):
            raise OSError("404")
        assert allow_patterns == [CONFIG_FILE, WEIGHTS_FILE, "calibration.json"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    found = RetentionGates.from_pretrained("hub:me/gates", revision="v1")
    assert found.config == gates.config
    with pytest.raises(CheckpointError, match="the Hub did not give the gates 'hub:me/other': 404"):
        RetentionGates.from_pretrained("hub:me/other", revision="v1")


def test_the_shipped_gates_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of this name is ./demo
    assert RetentionGates.from_pretrained("demo").info.base_model.endswith("SmolLM2-135M-Instruct")
    with pytest.raises(CheckpointError, match=f"has no {CONFIG_FILE}"):
        RetentionGates.from_pretrained("./demo")


def test_wrong_base_model(gates: RetentionGates, tiny_llama: PreTrainedModel, tiny_model, tmp_path: Path) -> None:
    gates.save_pretrained(tmp_path)
    RetentionGates.from_pretrained(tmp_path, tiny_llama)
    RetentionGates.from_pretrained(tmp_path, tiny_llama.bfloat16())  # another dtype is the same model
    other = tiny_model("llama")
    torch.manual_seed(5)
    other.get_input_embeddings().weight.data.normal_()
    assert fingerprint(other) != gates.info.base_fingerprint
    with pytest.raises(ValueError, match=r"were trained on LlamaForCausalLM, not on LlamaForCausalLM .same shape"):
        RetentionGates.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match="do not fit Qwen3ForCausalLM"):
        RetentionGates.from_pretrained(tmp_path, tiny_model("qwen3", num_hidden_layers=2))


def test_a_kill_while_saving_leaves_the_old_files(gates: RetentionGates, tmp_path: Path) -> None:
    """The process dies after the new weights' bytes are written and before they get their name."""
    gates.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    script = (
        "import os, signal, sys\n"
        "from tenure.retention import RetentionGates\n"
        "gates = RetentionGates.from_pretrained(sys.argv[1])\n"
        "gates.bias.data += 1\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "gates.save_pretrained(sys.argv[1])\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
    assert result.returncode == -9, result.stderr
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    RetentionGates.from_pretrained(tmp_path)


def test_push_to_hub_uploads_both_files(gates: RetentionGates, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    uploaded = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, **kwargs: object) -> None:
            uploaded["created"] = repo_id, kwargs

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str, delete_patterns: str) -> str:
            uploaded["files"] = sorted(os.listdir(folder_path))
            uploaded["removed"] = delete_patterns
            RetentionGates.from_pretrained(folder_path)
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert gates.push_to_hub("me/gates", private=True, token="t") == "https://hub/commit"
    assert uploaded["files"] == [WEIGHTS_FILE, CONFIG_FILE]
    assert uploaded["removed"] == "calibration.json"  # of gates that were there before
    assert uploaded["created"] == ("me/gates", {"private": True, "exist_ok": True})
