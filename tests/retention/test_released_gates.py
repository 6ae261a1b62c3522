"""Released gates, built here in their authors' formats, against formulas written from their papers and code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from tenure.eviction import evict
from tenure.retention import RetentionGates
from tenure.retention.checkpoint import CheckpointError
from tenure.retention.gates import gate_log_beta, stacked_steps
from tenure.retention.released_gates import TRIMKV_FILE, read_released_gates

LAYERS, HIDDEN, HEADS, GROUPS, WIDTH = 3, 32, 2, 2, 512  # of the tiny model; WIDTH is that of released gates


@pytest.fixture(params=["tiny", "qwen3-4b"])
def base_model(request: pytest.FixtureRequest, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model, and a random one of two layers with the shapes that gates of Qwen3-4B have."""
    if request.param == "tiny":
        return tiny_llama
    for name, size in {"LAYERS": 2, "HIDDEN": 2560, "HEADS": 8, "GROUPS": 4}.items():
        monkeypatch.setitem(globals(), name, size)
    return wide_model()


@functools.cache
def wide_model() -> Any:
    config = Qwen3Config(
        hidden_size=2560, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=16, vocab_size=128,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def random_tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def trimkv_state(deep: bool, tied: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    outputs = [(0.2 * random_tensor(HEADS, WIDTH), random_tensor(HEADS)) for _ in range(LAYERS)]
    state = {}
    for index in range(LAYERS):
        prefix = f"model.layers.{index}.self_attn.retention_gate"
        weight, bias = outputs[0] if tied else outputs[index]
        state[f"{prefix}.linear1.weight"] = 0.3 * random_tensor(WIDTH, HIDDEN)
        state[f"{prefix}.linear1.bias"] = random_tensor(WIDTH)
        if deep:
            state[f"{prefix}.linear2.weight"] = 0.05 * random_tensor(WIDTH, WIDTH)
            state[f"{prefix}.linear2.bias"] = random_tensor(WIDTH)
        state[f"{prefix}.{'linear3' if deep else 'linear2'}.weight"] = weight
        state[f"{prefix}.bias"] = bias
    return state


def trimkv_folder(path: Path, state: dict[str, Any], **values: Any) -> Path:
    path.mkdir(exist_ok=True)
    torch.save(state, path / TRIMKV_FILE)
    document = {"hidden_size": HIDDEN, "num_key_value_heads": HEADS, "retention_gate_intermediate_size": WIDTH}
    (path / "config.json").write_text(json.dumps(document | values))
    return path


def trimkv_log_beta(state: dict[str, torch.Tensor], index: int, x: torch.Tensor, deep: bool) -> torch.Tensor:
    """log σ(W · act(… act(W₁ x + b₁)) + b), `(batch, seq, heads)`, from the paper's formula."""

    def named(name: str) -> torch.Tensor:
        return state[f"model.layers.{index}.self_attn.retention_gate.{name}"].double()

    features = x.double()
    for name in ("linear1", "linear2") if deep else ("linear1",):
        logits = features @ named(f"{name}.weight").T + named(f"{name}.bias")
        features = logits / (1 + torch.exp(-logits))
    logits = features @ named(f"{'linear3' if deep else 'linear2'}.weight").T + named("bias")
    return -torch.log1p(torch.exp(-logits))


@pytest.mark.parametrize(
    ("deep", "tied", "projection", "kind"),
    [(False, False, "per_layer", "TRIM-KV"), (True, True, "shared", "DBTrimKV"),
     (True, False, "per_layer_deep", "DBTrimKV")],
)  # fmt: skip
def test_trimkv_folders_give_the_formulas_log_beta(
    base_model: Any, tmp_path: Path, deep: bool, tied: bool, projection: str, kind: str
) -> None:
    state = trimkv_state(deep, tied)
    converted = read_released_gates(trimkv_folder(tmp_path, state, retention_gate="rg10" if deep else "rg"), base_model)
    assert converted.kind == kind and converted.policy == "retention" and converted.note.startswith("exact")
    assert converted.gates.config.projection == projection
    x = torch.randn(2, 9, HIDDEN)
    for index in range(LAYERS):
        expected = trimkv_log_beta(state, index, x, deep).transpose(1, 2)
        torch.testing.assert_close(converted.gates.log_beta(index, x).double(), expected, rtol=1e-4, atol=1e-5)
    converted.gates.save_pretrained(tmp_path / "out")
    loaded = RetentionGates.from_pretrained(tmp_path / "out", base_model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), converted.gates.parameters(), strict=True))


def test_only_the_bias_differs_by_layer(tiny_llama: Any, tmp_path: Path) -> None:
    """The published files are thought to be so: tying is decided by the tensors, never assumed."""
    state = trimkv_state(deep=True, tied=True)
    state["model.layers.2.self_attn.retention_gate.bias"] = random_tensor(HEADS)
    gates = read_released_gates(trimkv_folder(tmp_path, state), tiny_llama).gates
    assert gates.config.projection == "per_layer_deep"
    x = torch.randn(1, 5, HIDDEN)
    expected = trimkv_log_beta(state, 2, x, deep=True).transpose(1, 2)
    torch.testing.assert_close(gates.log_beta(2, x).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_tensor_that_is_stored_once(tiny_llama: Any, tmp_path: Path) -> None:
    state = trimkv_state(deep=True, tied=True)
    for index in (1, 2):
        for name in ("linear3.weight", "bias"):
            del state[f"model.layers.{index}.self_attn.retention_gate.{name}"]
    assert read_released_gates(trimkv_folder(tmp_path, state), tiny_llama).gates.config.projection == "shared"


@pytest.mark.parametrize("mlp", [True, False])
def test_kvzap_scores_rank_entries_as_ours_do(base_model: Any, tmp_path: Path, mlp: bool) -> None:
    torch.manual_seed(2)
    state = {}
    for index in range(LAYERS):
        if mlp:
            for step, shape in ((0, (WIDTH, HIDDEN)), (2, (HEADS, WIDTH))):
                state[f"layers.{index}.{step}.weight"] = torch.randn(shape)
                state[f"layers.{index}.{step}.bias"] = torch.randn(shape[0])
        else:
            state[f"layers.{index}.weight"] = torch.randn(HEADS, HIDDEN)
            state[f"layers.{index}.bias"] = torch.randn(HEADS)
    save_file(state, tmp_path / "model.safetensors")
    converted = read_released_gates(tmp_path, base_model)
    assert converted.policy == "gate_score" and "no decay" in converted.note
    x = torch.randn(1, 7, HIDDEN)
    for index in range(LAYERS):
        score = x.double()
        if mlp:
            score = score @ state[f"layers.{index}.0.weight"].double().T + state[f"layers.{index}.0.bias"]
            score = score * 0.5 * (1 + torch.erf(score / 2**0.5))
        name = f"layers.{index}.2" if mlp else f"layers.{index}"
        score = score @ state[f"{name}.weight"].double().T + state[f"{name}.bias"]
        expected = F.logsigmoid(score).transpose(1, 2)
        torch.testing.assert_close(converted.gates.log_beta(index, x).double(), expected, rtol=1e-4, atol=1e-5)


def kvzip_layer(dim: int = 16, sinks: int = 16) -> dict[str, torch.Tensor]:
    return {
        "q_proj.weight": random_tensor(HEADS * GROUPS * dim, HIDDEN),
        "q_proj.bias": random_tensor(HEADS * GROUPS * dim),
        "k_proj.weight": random_tensor(HEADS * dim, HIDDEN), "q_norm.weight": 1 + 0.2 * random_tensor(dim),
        "k_norm.weight": 1 + 0.2 * random_tensor(dim), "k_base": random_tensor(HEADS, 1, sinks, dim),
        "b": random_tensor(HEADS, 1, GROUPS),
    }  # fmt: skip


def kvzip_score(layer: dict[str, torch.Tensor], x: torch.Tensor, head: int) -> torch.Tensor:
    """A head's scores of tokens `(seq, hidden)`, one at a time, from the paper's formula in float64."""
    layer = {name: tensor.double() for name, tensor in layer.items()}
    groups, dim = layer["b"].shape[-1], len(layer["q_norm.weight"])

    def norm(vector: torch.Tensor, name: str) -> torch.Tensor:
        return vector / (vector.square().mean() + 1e-6).sqrt() * layer[name]

    scores = []
    for token in x.double():
        key = norm((layer["k_proj.weight"] @ token)[head * dim : (head + 1) * dim], "k_norm.weight")
        found = []
        for group in range(groups):
            part = slice((head * groups + group) * dim, (head * groups + group + 1) * dim)
            query = norm((layer["q_proj.weight"] @ token + layer["q_proj.bias"])[part], "q_norm.weight")
            own = torch.exp(key @ query / dim**0.5 + layer["b"][head, 0, group])
            found.append(own / (own + torch.exp(layer["k_base"][head, 0] @ query / dim**0.5).sum()))
        scores.append(sum(found) / groups)
    return torch.stack(scores)


def test_fast_kvzips_scores_are_the_formula(base_model: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    layers = [kvzip_layer() for _ in range(LAYERS)]
    torch.save({"module": layers}, tmp_path / f"q{GROUPS}_dim16_sink16.pt")
    converted = read_released_gates(tmp_path / f"q{GROUPS}_dim16_sink16.pt", base_model)
    assert converted.kind == "Fast KVzip" and converted.policy == "gate_score"
    converted.gates.save_pretrained(tmp_path / "out")
    gates = RetentionGates.from_pretrained(tmp_path / "out", base_model)
    x = torch.randn(LAYERS, 7, HIDDEN)
    for index in range(LAYERS):
        expected = torch.stack([kvzip_score(layers[index], x[index], head) for head in range(HEADS)]).log()
        torch.testing.assert_close(gates.log_beta(index, x[index][None])[0].double(), expected, rtol=1e-4, atol=1e-5)
    stacked = gate_log_beta(gates.config, x, stacked_steps(gates), gates.weight, gates.bias)
    for index in range(LAYERS):
        torch.testing.assert_close(stacked[index].T, gates.log_beta(index, x[index][None])[0])
    ids = (torch.randperm(125)[:40] + 3)[None]
    with torch.no_grad(), evict(base_model, "gate_score", budget=10, gates=gates):
        assert base_model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 44)


def test_gate_scores_evict_without_age_and_below_a_threshold(tiny_llama: Any, tmp_path: Path) -> None:
    save_file({f"layers.{index}.{name}": tensor for index in range(LAYERS)
               for name, tensor in (("weight", torch.randn(2, HIDDEN)), ("bias", torch.zeros(2)))},
              tmp_path / "model.safetensors")  # fmt: skip
    gates = read_released_gates(tmp_path, tiny_llama).gates
    ids = (torch.randperm(125)[:40] + 3)[None]  # no token twice: the first layer would score both alike
    inputs: dict[int, torch.Tensor] = {}
    for layer in tiny_llama.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.__setitem__(module.layer_idx, kwargs["hidden_states"].detach()),
            with_kwargs=True,
        )
    for options, kept in (({"budget": 10}, 10), ({"budget": 39, "policy": "gate_score(threshold=0.5)"}, None)):
        values = {"policy": "gate_score", "scope": "head", "sinks": 0, "recent": 0, "buffer": 0} | options
        with torch.no_grad(), evict(tiny_llama, gates=gates, **values):  # pyright: ignore[reportArgumentType]
            cache = tiny_llama(ids, use_cache=True).past_key_values
        for index in range(LAYERS):
            score = gates.log_beta(index, inputs[index])[0]
            for head in range(HEADS):
                wanted = (
                    score[head].topk(kept).indices.sort().values if kept else
                    (score[head] >= F.logsigmoid(torch.tensor(0.5))).nonzero().flatten()
                )  # fmt: skip
                assert positions(cache, index, head) == wanted.tolist()


def positions(cache: Any, layer: int, head: int) -> list[int]:
    """The kept positions of one head."""
    store = cache.layers[layer].store
    index, valid = store.dense_index()
    dense = store.dense(store.buffers["position"], index)[0, head]
    return sorted(dense[valid[0, head]].long().tolist())


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_faulty_files_are_named(tiny_llama: Any, tmp_path: Path, capsys: Any) -> None:
    good = trimkv_state(deep=False)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (good | {"model.layers.0.mlp.weight": torch.ones(1)}, {}, "holds 'model.layers.0.mlp.weight', which is no"),
        ({k: v for k, v in good.items() if "layers.1" not in k}, {}, r"missing \['layers.1.bias', "),
        (good | {"model.layers.0.self_attn.retention_gate.bias": torch.ones(5)}, {}, "have the shapes|does not fit"),
        (good, {"hidden_size": 64}, "hidden_size 64 instead of 32"),
        (good, {"retention_gate": "rg10"}, "retention_gate 'rg10' instead of 'rg'"),
        ([1], {}, "holds a list; accepted: tensors by name"),
        ({"x": Evil()}, {}, "holds more than tensors, or is broken"),
    ]
    for number, (state, values, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message):
            read_released_gates(trimkv_folder(tmp_path / str(number), state, **values), tiny_llama)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="is no released gate"):
        read_released_gates(tmp_path / "none", tiny_llama)
    torch.save({"module": [kvzip_layer()] * 2}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match="holds 2 layers; accepted: one gate for each of the model's 3"):
        read_released_gates(tmp_path / "two.pt", tiny_llama)
    torch.save({"module": [kvzip_layer() | {"q_norm.weight": torch.ones(7)}] * 3}, tmp_path / "norm.pt")
    with pytest.raises(CheckpointError, match="does not fit LlamaForCausalLM"):
        read_released_gates(tmp_path / "norm.pt", tiny_llama)


def test_the_command_writes_a_folder_and_says_what_is_exact(tiny_llama: Any, tmp_path: Path, capsys: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from tenure.scripts.convert import ConvertConfig, main

    tiny_llama.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path / "model")
    source = trimkv_folder(tmp_path / "released", trimkv_state(deep=False))
    config = ConvertConfig(str(source), tmp_path / "out", model=str(tmp_path / "model"))
    assert main(config) == 0
    out = capsys.readouterr().out
    assert "TRIM-KV of 3 layers" in out and "exact: the same log β" in out and "--policy retention" in out
    assert RetentionGates.from_pretrained(tmp_path / "out", tiny_llama).info.training["converted_from"] == "TRIM-KV"
    with pytest.raises(ValueError, match="which holds gates already; accepted: another folder"):
        main(config)
