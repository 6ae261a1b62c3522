"""Reads gates that others have released into `RetentionGates`: TRIM-KV, DBTrimKV, KVzap and Fast KVzip."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tenure.documents import load_json, plain_line, shown

from .checkpoint import MAX_WEIGHT, CheckpointError, CheckpointInfo
from .decoder_layers import UnsupportedModelError, full_attention_layers
from .gate_config import RetentionConfig
from .gates import RetentionGates

logger = logging.getLogger(__name__)

TRIMKV_FILE = "trimkv_weights.pth"
_TRIMKV_KEY = re.compile(
    r"(?:\w+\.)*layers\.(\d+)\.self_attn\.retention_gate\.((?:linear[123]\.(?:weight|bias))|weight|bias)"
)
KVZIP_NAMES = ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b")
_KVZIP_KEY = re.compile(r"layers\.(\d+)\.(" + "|".join(re.escape(name) for name in KVZIP_NAMES) + ")")
_KVZAP_KEY = re.compile(r"(?:\w+\.)*layers\.(\d+)\.((?:[02]\.)?(?:weight|bias))")

Tensors = dict[int, dict[str, torch.Tensor]]  # by layer and name


@dataclass(frozen=True)
class ReleasedGates:
    """Converted gates, and how near they are to the released ones.

    Attributes:
        gates: on the CPU, in fp32.
        kind: the released format.
        policy: the policy of tenure that ranks entries as the authors do.
        note: in which sense the conversion is exact.
    """

    gates: RetentionGates
    kind: str
    policy: str
    note: str


def read_released_gates(source: Path, model: PreTrainedModel) -> ReleasedGates:
    """Reads a folder with `trimkv_weights.pth`, a folder or file with KVzap's safetensors, or Fast KVzip's `.pt` file.

    TRIM-KV ("rg": linear1, activation, linear2, bias) becomes `per_layer`. DBTrimKV ("rg10": linear1, linear2, linear3,
    bias) becomes `shared` if all layers hold the same linear3 and bias, which their code ties and their files need not,
    and else `per_layer_deep`; the tensors decide. KVzap's score s becomes log β = logsigmoid(s); Fast KVzip's score, in
    (0, 1), becomes log β = log s.

    Args:
        source: not changed; a pickle is read with `weights_only`, which runs no code of it.
        model: the base model of the gates.

    Raises:
        CheckpointError: no such file, a broken one, or tensors of another format or shape; the message names them.
        UnsupportedModelError: tenure cannot attach to the model.
    """
    try:
        return _read(source, model)
    except (CheckpointError, UnsupportedModelError):
        raise
    except (IndexError, RuntimeError, ValueError) as error:  # shapes that do not fit each other
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {plain_line(error)}") from None


def _read(source: Path, model: PreTrainedModel) -> ReleasedGates:
    if (source / TRIMKV_FILE).is_file():
        return _trimkv(source, model)
    if source.suffix == ".pt" and source.is_file():
        return _fast_kvzip(source, model)
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if len(files) != 1 or not files[0].is_file() or files[0].suffix != ".safetensors":
        raise CheckpointError(
            f"got {source}, which is no released gate; accepted: a folder with {TRIMKV_FILE} and config.json (TRIM-KV, "
            "DBTrimKV), one .safetensors file (KVzap), or a .pt file (Fast KVzip)"
        )
    try:
        state = load_file(files[0])
    except (SafetensorError, KeyError, OSError) as error:  # KeyError: a dtype that torch does not have
        raise CheckpointError(f"{files[0]} is not a safetensors file: {plain_line(error)}") from None
    return _kvzap(files[0], _by_layer(files[0], state, _KVZAP_KEY), model)


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise any type
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise CheckpointError(f"{path} holds more than tensors, or is broken: {plain_line(reason)}") from None


def _trimkv(source: Path, model: PreTrainedModel) -> ReleasedGates:
    path = source / TRIMKV_FILE
    state = _unpickled(path)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; accepted: tensors by name")
    tensors = _by_layer(path, state, _TRIMKV_KEY)
    deep = any("linear3.weight" in parts for parts in tensors.values())
    outputs = ("linear3.weight", "bias") if deep else ("linear2.weight", "bias")
    if deep:
        _fill_tied(tensors, outputs)
    hidden = ("linear1", "linear2") if deep else ("linear1",)
    _require(path, tensors, [f"{name}.{kind}" for name in hidden for kind in ("weight", "bias")] + [*outputs], model)
    first = next(iter(tensors.values()))
    tied = all(torch.equal(parts[name], first[name]) for parts in tensors.values() for name in outputs)
    projection = "per_layer" if not deep else "shared" if tied else "per_layer_deep"
    config = RetentionConfig.for_model(model, gate_width=first["linear1.weight"].shape[0], projection=projection)
    _check_config(source, config, "rg10" if deep else "rg")
    bodies = {row: [(parts[f"{name}.weight"], parts[f"{name}.bias"]) for name in hidden]
              for row, parts in tensors.items()}  # fmt: skip
    weight, bias = (
        first[name] if projection == "shared" else _stacked(path, [tensors[row][name] for row in config.layer_indices])
        for name in outputs
    )
    name, ties = "TRIM-KV", ""
    if deep:
        name, ties = "DBTrimKV", f" (an output projection {'for all layers' if tied else 'a layer'})"
    note = f"exact: the same log β in fp32{ties}; the released runtime rounds to bf16, by up to 10 % of log β"
    return ReleasedGates(_gates(path, config, model, bodies, weight, bias, name), name, "retention", note)


def _kvzap(path: Path, tensors: Tensors, model: PreTrainedModel) -> ReleasedGates:
    mlp = any("0.weight" in parts for parts in tensors.values())
    names = ["0.weight", "0.bias", "2.weight", "2.bias"] if mlp else ["weight", "bias"]
    _require(path, tensors, names, model)
    layers = [layer.layer_idx for layer in full_attention_layers(model)]
    if mlp:
        width, activation = tensors[layers[0]]["0.weight"].shape[0], "gelu"
        bodies = {index: [(tensors[index]["0.weight"], tensors[index]["0.bias"])] for index in layers}
        weight = _stacked(path, [tensors[index]["2.weight"] for index in layers])
        bias = _stacked(path, [tensors[index]["2.bias"] for index in layers])
    else:  # the scores are the features, and the projection the identity
        width, activation = tensors[layers[0]]["weight"].shape[0], "linear"
        bodies = {index: [(tensors[index]["weight"], tensors[index]["bias"])] for index in layers}
        weight = torch.eye(width).expand(len(layers), width, width)
        bias = torch.zeros(len(layers), width)
    config = RetentionConfig.for_model(model, gate_width=width, projection="per_layer", activation=activation)
    note = (
        "log β = logsigmoid(score) ranks entries as the score does, exactly; β is no decay, so use the policy "
        "gate_score (released setting: threshold=-4, and the last 128 tokens protected), not retention"
    )
    name = "KVzap MLP" if mlp else "KVzap linear"
    return ReleasedGates(_gates(path, config, model, bodies, weight, bias, name), name, "gate_score", note)


def _fast_kvzip(path: Path, model: PreTrainedModel) -> ReleasedGates:
    """`{"module": [a layer's tensors, …]}`, the attention layers in order."""
    state = _unpickled(path)
    modules = state.get("module") if isinstance(state, Mapping) else None
    layers = full_attention_layers(model)
    if not isinstance(modules, list) or len(modules) != len(layers):
        count = f"{len(modules)} layers" if isinstance(modules, list) else "no list 'module'"
        raise CheckpointError(f"{path} holds {count}; accepted: one gate for each of the model's {len(layers)} layers")
    flat = {f"layers.{layer.layer_idx}.{name}": tensor for layer, parts in zip(layers, modules, strict=True)
            for name, tensor in (parts.items() if isinstance(parts, Mapping) else {})}  # fmt: skip
    tensors = _by_layer(path, flat, _KVZIP_KEY)
    _require(path, tensors, list(KVZIP_NAMES), model)
    first = tensors[layers[0].layer_idx]
    sinks, (groups, dim) = first["k_base"].shape[-2], (first["b"].shape[-1], first["q_norm.weight"].shape[0])
    config = RetentionConfig.for_model(
        model, gate_width=dim, projection="fast_kvzip", num_groups=groups, num_sinks=sinks
    )
    gates = _empty(path, config, model, "Fast KVzip")
    weights: dict[str, torch.Tensor] = {"weight": gates.weight.detach(), "bias": gates.bias.detach()}
    for index, parts in tensors.items():
        for name, tensor in parts.items():
            shaped = tensor.squeeze(1) if name in ("k_base", "b") and tensor.dim() > 2 else tensor
            weights[f"bodies.{index}.0.{name}"] = shaped
    note = (
        "log β = log(score): the released score in fp32 (theirs is computed in the file's dtype); it ranks without "
        "age, so use the policy gate_score (released setting: 4 sinks and the last 8 tokens protected), not retention"
    )
    return ReleasedGates(_loaded(path, gates, weights, model), "Fast KVzip", "gate_score", note)


def _by_layer(path: Path, state: Mapping[str, Any], pattern: re.Pattern[str]) -> Tensors:
    """The tensors of a file in fp32, by layer and name.

    Raises:
        CheckpointError: a name of another form, or a value that is no floating-point tensor.
    """
    tensors: Tensors = {}
    for name, tensor in state.items():
        match = pattern.fullmatch(name) if isinstance(name, str) and len(name) <= 200 else None
        if match is None or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise CheckpointError(
                f"{path} holds {shown(name)}, which is no tensor of a known gate (see `tenure convert`)"
            )
        _check_tensor(path, name, tensor)
        tensors.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return tensors


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError for a tensor that is larger than its file, or numbers that would give no log β."""
    whole = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.ndim >= 1
    if not whole or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise CheckpointError(f"{path} holds {name} {tuple(tensor.shape)}, which has not as many numbers in the file")
    if not bool((tensor.float().abs() <= MAX_WEIGHT).all()):  # False for NaN, too
        raise CheckpointError(f"{path} holds {name} with numbers that are not finite or beyond {MAX_WEIGHT:g}")


def _fill_tied(tensors: Tensors, names: tuple[str, ...]) -> None:
    """Gives all layers a tied tensor that a file holds once."""
    for name in names:
        holders = [index for index, parts in tensors.items() if name in parts]
        if len(holders) == 1:
            for parts in tensors.values():
                parts.setdefault(name, tensors[holders[0]][name])


def _require(path: Path, tensors: Tensors, names: list[str], model: PreTrainedModel) -> None:
    layers = [layer.layer_idx for layer in full_attention_layers(model)]
    expected = {f"layers.{index}.{name}" for index in layers for name in names}
    found = {f"layers.{index}.{name}" for index, parts in tensors.items() for name in parts}
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if missing or unexpected:
        raise CheckpointError(
            f"{path} does not hold gates of {type(model).__name__}'s {len(layers)} full-attention layers: "
            f"missing {missing[:4]}, unexpected {unexpected[:4]}"
        )


def _stacked(path: Path, tensors: list[torch.Tensor]) -> torch.Tensor:
    shapes = sorted({tuple(one.shape) for one in tensors})
    if len(shapes) > 1:
        raise CheckpointError(f"{path} does not fit: the layers' output tensors have the shapes {shapes}")
    return torch.stack(tensors)


def _check_config(source: Path, config: RetentionConfig, kind: str) -> None:
    """Compares the folder's configuration, if it is there, with tensors and model."""
    path = source / "config.json"
    if not path.is_file():
        return
    document = load_json(path)
    document = document if isinstance(document, dict) else {}
    expected = {"retention_gate": kind, "retention_gate_intermediate_size": config.gate_width,
                "hidden_size": config.hidden_size, "num_key_value_heads": config.num_kv_heads}  # fmt: skip
    wrong = [f"{name} {shown(document[name])} instead of {value!r}" for name, value in expected.items()
             if document.get(name, value) != value]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{path} does not describe these tensors and this model: {'; '.join(wrong)}")


def _gates(
    path: Path, config: RetentionConfig, model: PreTrainedModel,
    bodies: Mapping[int, list[tuple[torch.Tensor, torch.Tensor]]], weight: torch.Tensor, bias: torch.Tensor, kind: str,
) -> RetentionGates:  # fmt: skip
    gates = _empty(path, config, model, kind)
    state = {"weight": weight, "bias": bias}
    for index in config.layer_indices:
        for step, (matrix, offset) in enumerate(bodies[index]):
            state[f"bodies.{index}.{2 * step}.weight"] = matrix
            state[f"bodies.{index}.{2 * step}.bias"] = offset
    return _loaded(path, gates, state, model)


def _empty(path: Path, config: RetentionConfig, model: PreTrainedModel, kind: str) -> RetentionGates:
    info = CheckpointInfo.for_model(model, training={"converted_from": kind, "file": path.name})
    return RetentionGates(config, replace(info, metrics={}))


def _loaded(
    path: Path, gates: RetentionGates, state: dict[str, torch.Tensor], model: PreTrainedModel
) -> RetentionGates:  # fmt: skip
    try:
        gates.load_state_dict(state)
    except RuntimeError as error:  # one line a tensor of a wrong shape
        faults = [line.strip() for line in str(error).splitlines()[1:]]
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(faults[:3])}") from None
    return gates
