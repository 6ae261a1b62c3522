"""Retention gates: from an attention layer's input to log β, the rate at which an entry's usefulness decays."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from .calibration import Calibration, load_calibration, save_calibration, weights_digest
from .checkpoint import (
    CALIBRATION_FILE,
    CheckpointInfo,
    check_layers,
    fingerprint,
    load_checkpoint,
    local_folder,
    parse_config,
    parse_weights,
    save_checkpoint,
)
from .decoder_layers import execution_device, full_attention_layers, text_config
from .gate_config import RetentionConfig
from .kvzip_gate import KVzipGate, StackedKVzipGates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


# A part of a gate's MLP: a module, or the weights of a linear layer of all layers, `(layers, in, out)` and
# `(layers, 1, out)`.
GateStep = nn.Module | tuple[torch.Tensor, torch.Tensor]


def gate_log_beta(
    config: RetentionConfig, hidden_states: torch.Tensor, steps: Iterable[GateStep], weight: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """log β of every token, by the gate of one layer or by those of all layers at once.

    `log β = logsigmoid(W · MLP(x) + b)` (TRIM-KV, retention gate; DBTrimKV, shared projection), in fp32 whatever the
    dtype of x and whatever autocast says: log β near 0 needs it.

    Args:
        config: the shape of the gates.
        hidden_states: `(batch, seq_len, hidden_size)` of one layer, or `(layers, tokens, hidden_size)` of all; the
            attention modules' inputs (after the input layernorm, before RoPE), any float dtype.
        steps: the MLP: modules for one layer; for all layers what `stacked_steps` returns.
        weight, bias: the output projection. One layer: `(num_kv_heads, gate_width)` and `(num_kv_heads,)`, or
            `(1, gate_width)` and `(1,)` if it is shared by the heads. All layers: the same, or with one for each layer
            `(layers, num_kv_heads, gate_width)` and `(layers, num_kv_heads)`.

    Returns:
        fp32, the shape of `hidden_states` with `num_kv_heads` last, each value in (-∞, 0].
    """
    with torch.autocast(hidden_states.device.type, enabled=False):
        features = hidden_states.float()
        for step in steps:
            features = torch.baddbmm(step[1], features, step[0]) if isinstance(step, tuple) else step(features)
        if config.projection == "shared_heads":
            logits = features.unflatten(-1, (config.num_kv_heads, config.gate_width)) @ weight[0] + bias
        elif weight.dim() == 3:
            logits = torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
        else:
            logits = F.linear(features, weight, bias)
        return F.logsigmoid(logits)


@torch.no_grad()
def stacked_steps(gates: RetentionGates) -> list[GateStep]:
    """The MLPs of all layers as steps of `gate_log_beta`: a copy of their weights, to which later changes are lost."""
    steps: list[GateStep] = []
    if gates.config.projection == "fast_kvzip":
        bodies = [copy.deepcopy(gates.bodies[str(index)][0]) for index in gates.layer_indices]  # type: ignore[index]
        return [StackedKVzipGates(bodies).requires_grad_(False)]
    for parts in zip(*(gates.bodies[str(index)] for index in gates.layer_indices), strict=True):
        if isinstance(parts[0], nn.Linear):
            weight = torch.stack([part.weight.detach().T for part in parts])
            steps.append((weight, torch.stack([part.bias.detach() for part in parts]).unsqueeze(1)))
        else:
            steps.append(parts[0])
    return steps


class RetentionGates(nn.Module):
    """The gates of all full-attention layers of one model (TRIM-KV and DBTrimKV, Bui et al.).

    The parameters stay in fp32 whatever the model's dtype: log β near 0 needs it.

    Attributes:
        config: the shape of the gates.
        info: where they come from: base model, training, metrics.
        calibration: the budget that `tenure calibrate` found for them, or None.
        bodies: one small MLP a layer, keyed by the layer's index.
        weight, bias: the output projection. `shared`: `(num_kv_heads, gate_width)` and `(num_kv_heads,)`, the same
            for all layers; `shared_heads`: `(1, gate_width)` and `(1,)`, the same for all layers and heads;
            `per_layer`, `per_layer_deep`: `(num_layers, num_kv_heads, gate_width)` and `(num_layers, num_kv_heads)`;
            `fast_kvzip`: the identity and zeros.
    """

    def __init__(self, config: RetentionConfig, info: CheckpointInfo | None = None) -> None:
        super().__init__()
        self.config = config
        self.info = info or CheckpointInfo()
        self.calibration: Calibration | None = None
        width, heads = config.gate_width, config.num_kv_heads
        self.bodies = nn.ModuleDict({str(index): self._body() for index in config.layer_indices})
        shape = {
            "per_layer": (len(config.layer_indices), heads),
            "per_layer_deep": (len(config.layer_indices), heads),
            "shared": (heads,),
            "shared_heads": (1,),
            "fast_kvzip": (heads,),
        }[config.projection]
        width = heads if config.projection == "fast_kvzip" else width
        self.weight = nn.Parameter(torch.empty(*shape, width, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(*shape, dtype=torch.float32))
        self._row = {index: row for row, index in enumerate(config.layer_indices)}
        self.reset_parameters()

    def _body(self) -> nn.Sequential:
        from transformers.activations import ACT2FN

        config, fp32 = self.config, torch.float32  # whatever torch's default dtype is
        if config.projection == "fast_kvzip":
            sizes = config.num_groups, config.gate_width, config.num_sinks
            return nn.Sequential(KVzipGate(config.hidden_size, config.num_kv_heads, *sizes))
        layers = [nn.Linear(config.hidden_size, config.gate_width, dtype=fp32), ACT2FN[config.activation]]
        if config.projection in ("shared", "per_layer_deep"):
            layers += [nn.Linear(config.gate_width, config.gate_width, dtype=fp32), ACT2FN[config.activation]]
        elif config.projection == "shared_heads":
            features = config.num_kv_heads * config.gate_width
            layers += [nn.Linear(config.gate_width, features, dtype=fp32), ACT2FN[config.activation]]
        return nn.Sequential(*layers)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights N(0, init_std), biases 0, output bias `initial_bias`."""
        for module in self.bodies.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=self.config.init_std)
                if module.bias is not None:
                    module.bias.zero_()
        if self.config.projection == "fast_kvzip":
            self.weight.copy_(torch.eye(self.config.num_kv_heads))
            self.bias.zero_()
            return
        self.weight.normal_(std=self.config.init_std)
        self.bias.fill_(self.config.initial_bias)

    @classmethod
    def for_model(cls, model: PreTrainedModel, **overrides: object) -> RetentionGates:
        """Fresh gates for all full-attention layers of `model`, on its device."""
        gates = cls(RetentionConfig.for_model(model, **overrides), CheckpointInfo.for_model(model))
        return gates.to(execution_device(model))

    @property
    def layer_indices(self) -> tuple[int, ...]:
        return self.config.layer_indices

    @torch.no_grad()
    def of_layers(self, layer_indices: Iterable[int]) -> RetentionGates:
        """A copy with the gates of some layers, without a calibration."""
        chosen = tuple(layer_indices)
        part = RetentionGates(replace(self.config, layer_indices=chosen), self.info).to(self.bias.device)
        state = {
            name: tensor for name, tensor in self.state_dict().items() if name.split(".")[0] != "bodies"
            or int(name.split(".")[1]) in chosen
        }  # fmt: skip
        if self.config.projection == "per_layer":
            rows = [self._row[index] for index in chosen]
            state |= {"weight": self.weight[rows], "bias": self.bias[rows]}
        part.load_state_dict(state)
        return part.requires_grad_(False)

    def log_beta(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """log β of every token for one layer.

        Args:
            layer_idx: a layer in `layer_indices`.
            hidden_states: `(batch, seq_len, hidden_size)`, the attention module's input (after the input
                layernorm, before RoPE), any float dtype.

        Returns:
            fp32 `(batch, num_kv_heads, seq_len)`, each value in (-∞, 0].
        """
        weight, bias = self.weight, self.bias
        if self.config.projection in ("per_layer", "per_layer_deep"):
            row = self._row[layer_idx]
            weight, bias = weight[row], bias[row]
        return gate_log_beta(self.config, hidden_states, [self.bodies[str(layer_idx)]], weight, bias).transpose(1, 2)

    def check_model(self, model: PreTrainedModel, same_base: bool = True) -> None:
        """Refuses a model these gates were not made for.

        Args:
            same_base: also compare the fingerprint of the base model, when the gates carry one.

        Raises:
            UnsupportedModelError: tenure cannot attach to the model.
            ValueError: naming what differs.
        """
        dtypes = {parameter.dtype for parameter in self.parameters()} - {torch.float32}
        if dtypes:
            raise ValueError(f"got gates in {dtypes.pop()}; accepted: torch.float32 (gates.float()), for any model")
        layers = full_attention_layers(model)
        found = {
            "hidden_size": int(text_config(model).hidden_size),
            "num_kv_heads": layers[0].all_kv_heads,
            "layer_indices": tuple(layer.layer_idx for layer in layers),
        }
        name = f"{type(model).__name__} {getattr(model.config, '_name_or_path', '')}".strip()
        wrong = [f"{k} {getattr(self.config, k)} against {v}" for k, v in found.items() if getattr(self.config, k) != v]
        if wrong:
            raise ValueError(f"the gates do not fit {name}: {'; '.join(wrong)} in the model")
        if same_base and self.info.base_fingerprint and self.info.base_fingerprint != fingerprint(model):
            if model.dtype == torch.float16:  # which rounds small weights otherwise than bfloat16
                if self.info.base_model != str(getattr(model.config, "_name_or_path", "")):
                    logger.warning("the gates were trained on %s; in float16 it cannot be told whether this %s has "
                                   "these weights: load it in bfloat16 or float32 to be sure",
                                   self.info.base_model or "another model", name)  # fmt: skip
                return
            raise ValueError(
                f"the gates were trained on {self.info.base_model or 'another model'}, not on {name} (same shape, "
                "other weights); use that model, or train gates for this one"
            )

    def save_pretrained(
        self, folder: str | os.PathLike, info: CheckpointInfo | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Writes `tenure_config.json` and `gates.safetensors` into `folder`, atomically, and then `calibration.json`.

        A calibration that was measured on other weights, for example before more training, is left out with a warning.

        Args:
            info: replaces `self.info` in the file.
            dtype: dtype of the stored weights; bf16 halves the file.
        """
        state = {name: tensor.detach().to(dtype) for name, tensor in self.state_dict().items()}
        save_checkpoint(folder, self.config, state, info or self.info, dtype)
        if self.calibration is not None and self.calibration.weights != weights_digest(state):
            logger.warning("the gates' calibration was measured on other weights and is not saved in %s", folder)
        elif self.calibration is not None:
            save_calibration(Path(folder), self.calibration)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, model: PreTrainedModel | None = None, revision: str | None = None
    ) -> RetentionGates:
        """Loads gates from a folder, by name, or from the Hub.

        Args:
            source: a folder; `demo` for the gates that come with the library; or `hub:owner/name`.
            model: if given, the gates are checked against it and moved to its device.
            revision: of the Hub repository.

        Raises:
            CheckpointError: files absent, truncated or altered; a newer schema; missing or unexpected keys; weights
                that are not finite; a calibration that is broken or belongs to other gates.
            ValueError: the gates do not belong to `model`.
        """
        where = local_folder(source, revision)
        document, weights = load_checkpoint(where)
        config, info = parse_config(document, str(source))
        check_layers(weights, config.layer_indices, str(source))
        with torch.device("meta"):  # shapes alone: sizes that only the configuration has are not allocated
            expected = cls(config).state_dict()
        state = parse_weights(weights, expected, str(source))
        gates = cls(config, info)
        gates.load_state_dict(state)
        gates.calibration = load_calibration(where, gates.state_dict())
        if model is not None:
            gates.check_model(model)
            gates.to(execution_device(model))
        return gates

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads the files to `repo_id` on the Hub, creating it if needed; returns the address of the commit.

        A calibration that lies there of gates before these is removed.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload retention gates",
                delete_patterns=CALIBRATION_FILE,
            )  # fmt: skip
            return str(commit)
