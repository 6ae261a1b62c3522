"""The models that can be computed in packed forwards, and their longest sequences."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from ..eviction.model_adapters import LENGTH_DEPENDENT, rope_parameters, rope_type
from ..retention.decoder_layers import execution_device, full_attention_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_packable(model: PreTrainedModel) -> None:
    """Refuses models whose packed forward would be another computation than that of each sequence alone.

    Raises:
        ValueError: the model's `forward` takes no `position_ids` or no `logits_to_keep`, layers share their keys and
            values, RoPE has several positions for each token, its attention is over latents (MLA), or with capped
            logits or learned sinks, which packed attention does not compute, or it is on several devices or divided
            among processes.
    """
    config = model.config.get_text_config(decoder=True)
    kind, parameters = type(model).__name__, inspect.signature(model.forward).parameters
    missing = [name for name in ("position_ids", "logits_to_keep") if name not in parameters]
    if missing:
        raise ValueError(
            f"got a {kind}, whose forward takes no {' and no '.join(missing)}; accepted: models that are given the "
            "position of each token, (1, n), and the indices of the logits to compute"
        )
    if shared := getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"got a {kind} with num_kv_shared_layers={shared}; accepted: models whose layers keep keys and "
            "values of their own"
        )
    layers = full_attention_layers(model)
    if layers[0].shards.count > 1:
        raise ValueError(f"got a {kind} in tensor parallel; accepted: models whose process has all heads")
    devices = sorted({str(execution_device(layer.module)) for layer in layers})
    if len(devices) > 1:
        raise ValueError(f"got a {kind} on {', '.join(devices)}; accepted: models on one device, that of the pages")
    if any(layer.latent for layer in layers):
        raise ValueError(f"got a {kind}, whose cache holds latents; accepted: models whose cache holds keys and values")
    if altered := {layer.softmax for layer in layers} - {""}:
        raise ValueError(
            f"got a {kind}, whose attention has {altered.pop()}; accepted: models with the ordinary softmax"
        )
    if any(rope.get("mrope_section") for rope in rope_parameters(config)):
        raise ValueError(
            f"got a {kind} whose rope_parameters have an mrope_section; accepted: models with one position for each "
            "token, position_ids (1, n)"
        )


def max_tokens(model: PreTrainedModel) -> tuple[int | None, str]:
    """The longest sequence that a packed forward computes as the model does alone, in tokens, and where that is from.

    None: the configuration has no bound. Where RoPE depends on the longest sequence of a forward, it is the length up
    to which all have the original frequencies.
    """
    config = model.config.get_text_config(decoder=True)
    limit, source = getattr(config, "max_position_embeddings", None), "the model's"
    for rope in rope_parameters(config):
        kind = rope_type(rope)
        if kind not in LENGTH_DEPENDENT:
            continue
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", limit
        )
        if original is not None and (limit is None or original <= limit):
            limit, source = original, f"as beyond it the model's RoPE ({kind!r}) depends on what else is computed,"
    return limit, source
