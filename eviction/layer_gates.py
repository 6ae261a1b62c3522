"""The gates of a model's layers, each on the device of its layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..retention.gates import RetentionGates, gate_log_beta, stacked_steps
from ..retention.head_shards import UNDIVIDED, HeadShards


class LayerGates:
    """log β while a model runs, of one layer, or of a token in all layers at once.

    A model that is placed on several devices has a part of its gates on each: copies, to which later changes of the
    gates are lost. Gates on the one device of a model are used as they are.
    """

    def __init__(
        self, gates: RetentionGates, devices: Mapping[int, torch.device], shards: HeadShards = UNDIVIDED
    ) -> None:  # fmt: skip
        """Places `gates`.

        Args:
            devices: of the layers, by index.
            shards: the heads in this process, of which log β is.

        Raises:
            ValueError: the gates are on a device where no layer is.
        """
        given, places = gates.bias.device, list(dict.fromkeys(devices.values()))
        if given not in places:
            names = " and ".join(map(str, places))
            raise ValueError(f"the gates are on {given}, the model is on {names}: move them with .to()")
        self._parts, self._shards = {}, shards
        for device in places:
            own = [index for index, place in devices.items() if place == device]
            self._parts[device] = gates if len(places) == 1 else gates.of_layers(own).to(device)
        self._by_layer = {index: self._parts[device] for index, device in devices.items()}
        self._steps = {device: stacked_steps(part) for device, part in self._parts.items()}

    def log_beta(self, layer_idx: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """As `RetentionGates.log_beta`."""
        return self._shards.own(self._by_layer[layer_idx].log_beta(layer_idx, hidden_states))

    @torch.no_grad()
    def of_all_layers(self, hidden_states: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """log β of one token a row, by one call a device: one a layer would be slower.

        Args:
            hidden_states: `(batch, 1, hidden_size)` of each layer, in order.

        Returns:
            By layer index: fp32 `(batch * num_kv_heads,)`.
        """
        given, found = dict(zip(self._by_layer, hidden_states, strict=True)), {}
        for device, part in self._parts.items():
            tokens = torch.cat([given[index] for index in part.layer_indices], dim=1).transpose(0, 1)
            values = gate_log_beta(part.config, tokens, self._steps[device], part.weight, part.bias)
            values = self._shards.own(values, dim=2).flatten(1)
            found |= dict(zip(part.layer_indices, values, strict=True))
        return found
