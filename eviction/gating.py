"""log β of one token for all layers at once: in decoding, a call a layer would cost more than the attention."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..retention.gates import RetentionGates


class StackedGates:
    """The gates' parameters stacked over layers: a second copy for as long as the session lasts.

    Attributes:
        gates: the gates they were made from; later changes to them are not seen.
    """

    @torch.no_grad()
    def __init__(self, gates: RetentionGates) -> None:
        self.gates = gates
        bodies = [gates.bodies[str(index)] for index in gates.layer_indices]
        # Each step of the MLP: an activation, or the weights (layers, in, out) and biases (layers, 1, out) of a Linear.
        self._steps: list[nn.Module | tuple[torch.Tensor, torch.Tensor]] = []
        for parts in zip(*bodies, strict=True):
            if isinstance(parts[0], nn.Linear):
                weight = torch.stack([part.weight.detach().t() for part in parts])
                self._steps.append((weight, torch.stack([part.bias.detach() for part in parts]).unsqueeze(1)))
            else:
                self._steps.append(parts[0])

    @torch.no_grad()
    def log_beta(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """log β of one token a row in every layer.

        Args:
            hidden_states: `(batch, 1, hidden_size)` of each layer, in the order of the gates' layers.

        Returns:
            fp32 `(layers, batch * num_kv_heads)`.
        """
        config = self.gates.config
        with torch.autocast(hidden_states[0].device.type, enabled=False):
            features = torch.cat(hidden_states, dim=1).transpose(0, 1).float()  # (layers, batch, hidden)
            for step in self._steps:
                features = torch.baddbmm(step[1], features, step[0]) if isinstance(step, tuple) else step(features)
            weight, bias = self.gates.weight, self.gates.bias
            if config.projection == "shared_heads":
                logits = features.unflatten(-1, (config.num_kv_heads, config.gate_width)) @ weight[0] + bias
            elif config.projection == "per_layer":
                logits = torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))
            else:
                logits = F.linear(features, weight, bias)
            return F.logsigmoid(logits).flatten(1)
