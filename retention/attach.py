"""Attaching gates to a model: inside the context its full-attention layers are retention-gated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .gates import RetentionGates
from .ops import Implementation, gated_attention
from .seams import AttentionCall, AttentionFunction, AttentionLayer, Interceptor, intercept, is_intercepted
from .segments import Segments


class Attached(Interceptor):
    """What `attach` yields.

    Attributes:
        segments: documents and padding of the last forward.
        implementation: how the gated attention is computed, see `retention.ops.gated_attention`.
    """

    def __init__(self, model: PreTrainedModel, gates: RetentionGates, implementation: Implementation) -> None:
        self.model, self.gates = model, gates
        self.implementation: Implementation = implementation
        self.segments: Segments | None = None
        self._log_beta: dict[int, torch.Tensor] = {}

    def log_beta(self) -> torch.Tensor:
        """log β of the last forward, `(layers, batch, num_kv_heads, seq_len)` fp32, with its graph.

        Raises:
            RuntimeError: the model has not run inside this context.
        """
        if len(self._log_beta) != len(self.gates.layer_indices):
            raise RuntimeError("log_beta() needs a forward of the attached model first")
        device = self.gates.bias.device
        return torch.stack([self._log_beta[index].to(device) for index in self.gates.layer_indices])

    def again(self) -> AbstractContextManager[Any]:
        """Re-attaches while gradient checkpointing runs layers of the last forward again, after the block has ended."""
        return nullcontext() if is_intercepted(self.model) else intercept(self.model, self)

    def begin(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        inputs = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if inputs is None:
            raise ValueError("the model was called without input_ids and without inputs_embeds")
        self.segments = Segments.from_inputs(
            inputs.shape[0], inputs.shape[1], kwargs.get("attention_mask"), kwargs.get("position_ids"), inputs.device
        )
        self._log_beta = {}
        return kwargs

    def call(self, layer: AttentionLayer, hidden_states: torch.Tensor) -> AttentionCall:
        log_beta = self.gates.log_beta(layer.layer_idx, hidden_states)
        # Gradient checkpointing runs a layer again in backward: the first run's graph is the one to keep.
        self._log_beta.setdefault(layer.layer_idx, log_beta)
        assert self.segments is not None
        segments, implementation = self.segments, self.implementation

        def attend(
            base: AttentionFunction,
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: Any,
            scaling: float | None = None,
            dropout: float = 0.0,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            if dropout:
                raise ValueError(f"attention dropout is {dropout}; gated attention accepts 0 (set attention_dropout=0)")
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = gated_attention(query, key, value, log_beta, scale, segments, implementation)
            return output.transpose(1, 2).contiguous(), None

        return attend


@contextmanager
def attach(
    model: PreTrainedModel, gates: RetentionGates, implementation: Implementation = "auto"
) -> Iterator[Attached]:
    """Gates the full-attention layers of `model` inside the `with` block, for whole sequences (training).

    Packed documents are recognised by restarting `position_ids` (without a mask), padding by the 2-D
    `attention_mask`. Nothing of the model is changed: outside the block it computes what it did before, bit for bit.
    To generate under a budget use `tenure.eviction.evict`.

    Raises:
        UnsupportedModelError: tenure cannot attach to the model.
        ValueError: the gates do not fit the model, or it is already inside an attach() or evict() block.
    """
    gates.check_model(model)
    attached = Attached(model, gates, implementation)
    with intercept(model, attached):
        yield attached
