"""Attaching gates to a model: inside the context its full-attention layers are retention-gated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .gates import RetentionGates
from .ops import gated_attention
from .ops.gated_attention import Implementation
from .seams import AttentionCall, AttentionFunction, AttentionLayer, Interceptor, intercept, is_intercepted
from .segments import Segments


class GatedInterceptor(Interceptor):
    """Runs gates beside a model's layers and keeps what they said in the last forward."""

    def __init__(self, gates: RetentionGates) -> None:
        self.gates = gates
        self._log_beta: dict[int, torch.Tensor] = {}

    def log_beta(self) -> torch.Tensor:
        """log β of the last forward (with its prompt, if it had one), with its graph.

        Returns:
            `(layers, batch, num_kv_heads, seq_len)` fp32.
        Raises:
            RuntimeError: the model has not run inside this context.
        """
        if len(self._log_beta) != len(self.gates.layer_indices):
            raise RuntimeError("log_beta() needs a forward of the attached model first")
        device = self.gates.bias.device
        return torch.stack([self._log_beta[index].to(device) for index in self.gates.layer_indices])


def attention_call(attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]) -> AttentionCall:
    """The call that answers for a layer with `attend(query, key, value, scaling)`, `(batch, num_heads, q_len, dim)`."""

    def call(
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
        output = attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return output.transpose(1, 2).contiguous(), None

    return call


class Attached(GatedInterceptor):
    """What `attach` yields.

    Attributes:
        segments: documents and padding of the last forward.
        implementation: how the gated attention is computed, see `retention.ops.gated_attention`.
    """

    def __init__(self, model: PreTrainedModel, gates: RetentionGates, implementation: Implementation) -> None:
        super().__init__(gates)
        self.model = model
        self.implementation: Implementation = implementation
        self.segments: Segments | None = None

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

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
            return gated_attention(query, key, value, log_beta, scaling, segments, implementation)

        return attention_call(attend)


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
