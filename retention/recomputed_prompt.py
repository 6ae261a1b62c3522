"""log β of a prompt without its hidden states: backward reads the prompt again, one layer's gate at a time.

A prompt of 128K tokens has 24 GB of hidden states in a model of 4B parameters, and the gates' activations over them are
several times that. Here neither outlives its layer, for one more plain forward of the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .decoder_layers import AttentionLayer, text_decoder
from .gates import RetentionGates
from .seams import Interceptor, intercept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GatesReader(Interceptor):
    """Reads each layer's log β while the plain model runs; keeps no hidden states."""

    reads_masks = True  # the plain model's own attention runs

    def __init__(self, gates: RetentionGates) -> None:
        self.gates = gates
        self.log_beta: dict[int, torch.Tensor] = {}

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> None:
        self.log_beta[layer.layer_idx] = self.gates.log_beta(layer.layer_idx, hidden_states)


class _GradientReader(GatesReader):
    """Adds up the gates' gradients, given those of log β by layer."""

    def __init__(self, gates: RetentionGates, grads: dict[int, torch.Tensor]) -> None:
        super().__init__(gates)
        self.grads = grads
        self.parameters = list(gates.parameters())
        self.sums = [torch.zeros_like(one) for one in self.parameters]

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> None:
        with torch.enable_grad():
            log_beta = self.gates.log_beta(layer.layer_idx, hidden_states.detach())
        grad = self.grads[layer.layer_idx]
        found = torch.autograd.grad(log_beta, self.parameters, grad, allow_unused=True)
        for total, gradient in zip(self.sums, found, strict=True):
            if gradient is not None:
                total += gradient


class _RecomputedLogBeta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, model: PreTrainedModel, gates: RetentionGates, input_ids: torch.Tensor, log_beta: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        ctx.run = model, gates
        ctx.save_for_backward(input_ids)
        device = input_ids.device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return log_beta.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (model, gates), (input_ids,) = ctx.run, ctx.saved_tensors
        enabled, dtype = ctx.autocast
        reader = _GradientReader(gates, dict(zip(gates.layer_indices, grads[0], strict=True)))
        with torch.no_grad(), torch.autocast(input_ids.device.type, dtype, enabled=enabled), intercept(model, reader):
            text_decoder(model)(input_ids=input_ids, use_cache=False)
        return None, None, None, None, *reader.sums


def recomputed_log_beta(
    model: PreTrainedModel, gates: RetentionGates, input_ids: torch.Tensor, log_beta: dict[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """log β of a prompt by layer, differentiable in the gates' parameters.

    Args:
        input_ids: `(batch, prompt_len)`.
        log_beta: what `GatesReader` found for it.
    """
    stacked = torch.stack([log_beta[index] for index in gates.layer_indices])
    given = _RecomputedLogBeta.apply(model, gates, input_ids, stacked, *gates.parameters())
    assert isinstance(given, torch.Tensor)
    return dict(zip(gates.layer_indices, given, strict=True))
