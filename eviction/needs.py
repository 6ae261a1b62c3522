"""Whether a model has what a policy reads of it."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from ..retention.seams import AttentionLayer, UnsupportedModelError, text_config
from .policies import Policy
from .projection import has_output_weight
from .rotary import ROTARY_TYPES, rotates_queries


def check_model_has(policy: Policy, model: PreTrainedModel, layers: Iterable[AttentionLayer]) -> None:
    """Raises UnsupportedModelError, naming what is missing, unless `policy` can run on `model` with these layers."""
    reason = ""
    if "output_weight" in policy.needs:
        without = [layer.name for layer in layers if not has_output_weight(layer)]
        if without:
            reason = (
                f"the output projection as a linear layer 'o_proj' with a floating-point weight, which {without[0]} "
                "does not have"
            )
    if policy.needs & {"query_statistics", "hidden_states"} and not rotates_queries(model):
        reason = (
            f"queries before RoPE, which are known for the model types {', '.join(ROTARY_TYPES)}; this one is "
            f"{text_config(model).model_type!r}"
        )
    if reason:
        kind = type(model).__name__
        raise UnsupportedModelError(f"policy {policy.name!r} does not support {kind}: it needs {reason}")
