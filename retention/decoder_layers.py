"""The full-attention layers of a transformers decoder, and the reasons for which a model is refused."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .head_shards import UNDIVIDED, HeadShards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED_FAMILIES = (
    "Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Phi-3, Gemma-3 and other decoders of transformers >= 5.2 that use its "
    "attention interface and have full-attention layers"
)
# Model types whose attention changes keys or values after it has written them to the cache.
CHANGES_KV = {
    "diffllama": "its attention splits and repeats values after they are cached",
    "jetmoe": "its attention repeats keys and values after they are cached",
}
if TYPE_CHECKING:
    from transformers.cache_utils import LinearAttentionLayer
else:
    try:
        from transformers.cache_utils import LinearAttentionLayer
    except ImportError:  # before transformers 5.5, where state-space layers have no layers in the cache

        class LinearAttentionLayer(DynamicLayer):
            """Stands for a class that no cache of this transformers has."""




class UnsupportedModelError(ValueError):
    """The model cannot be attached to; the message names the model, the reason and the supported families."""


@dataclass(frozen=True)
class AttentionLayer:
    """One full-attention layer of a decoder.

    Attributes:
        layer_idx: index of the layer in the decoder, the one its cache layer has.
        name: dotted module name, e.g. `model.layers.0.self_attn`.
        module: the attention module.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads and the key's head dimension. Where tensor
            parallelism divides the heads, those in this process.
        latent: the cache holds one latent a token, from which the module's `expand_kv` makes keys and values of all
            heads (MLA). Then `num_kv_heads` is 1 and `head_dim` is the latent's.
        shards: the division of heads among processes.
        softmax: names what its softmax has in addition ("capped logits", "learned sinks"); empty for the ordinary one.
    """

    layer_idx: int
    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    latent: bool = False
    softmax: str = ""
    shards: HeadShards = UNDIVIDED

    @property
    def all_kv_heads(self) -> int:
        """Key/value heads in all processes."""
        return self.num_kv_heads * self.shards.count


def plain_model(model: Any) -> PreTrainedModel:
    """The transformers model itself, where `model` may be a wrapper (torch.compile, peft, DistributedDataParallel).

    Raises:
        ValueError: not a model, or wrapped by DataParallel, whose replicas hooks do not reach.
    """
    from transformers import PreTrainedModel  # slow: a model's class has imported it

    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, nn.Module) and not isinstance(model, nn.DataParallel):
        inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
        if inner is not None:
            return inner
    raise ValueError(
        f"got {type(model).__name__} as model; accepted: a transformers model, also inside torch.compile, peft or "
        "DistributedDataParallel"
    )


def execution_device(model: nn.Module) -> torch.device:
    """The device on which a model computes: of its weights, or where accelerate brings offloaded ones."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def layer_device(model: PreTrainedModel, index: int) -> torch.device:
    """The device on which decoder layer `index` computes: with `device_map`, layers are on several."""
    path = _path_to_layer(full_attention_layers(model))
    layers: Any = plain_model(model).get_submodule(".".join(path[:-1]))
    return execution_device(layers[index])


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the text decoder (`model.config` itself for text-only models)."""
    return plain_model(model).config.get_text_config(decoder=True)


def full_attention_layers(model: PreTrainedModel) -> list[AttentionLayer]:
    """The causal full-attention layers of `model`, in order of `layer_idx`.

    Sliding-window and linear layers are left out: they bound their own memory. Eviction and training share these
    checks, so that no gates are trained for a model that cannot be evicted from.

    Raises:
        UnsupportedModelError: the model has no such layer, or one whose keys and values are not what its cache stores.
    """
    model = plain_model(model)
    config = text_config(model)
    takes_cache = getattr(model, "_supports_default_dynamic_cache", None)
    if takes_cache is not None and not takes_cache():
        raise unsupported(model, "it does not take transformers' DynamicCache")
    cache_layers, shards = DynamicCache(config=config).layers, HeadShards.of(model)
    if _in_pipeline(model):
        raise unsupported(model, "its layers are divided among processes (pp_size)")
    layers = []
    for name, module in model.named_modules():
        if not _is_attention(module, config):
            continue
        index = int(module.layer_idx)  # type: ignore[arg-type]
        if not 0 <= index < len(cache_layers):
            reason = f"its attention layer {name} has the index {index}, outside its cache's {len(cache_layers)} layers"
            raise unsupported(model, reason)
        if getattr(cache_layers[index], "is_sliding", False):
            continue
        reason = _reason_against(module, cache_layers[index], config)
        if reason:
            raise unsupported(model, reason)
        layers.append(_attention_layer(index, name, module, config, shards))
    if not layers:
        raise unsupported(model, "no causal full-attention layer that uses the attention interface was found")
    repeated = [index for index, count in Counter(layer.layer_idx for layer in layers).items() if count > 1]
    if repeated:
        raise unsupported(model, f"several of its attention layers share the cache layer {repeated[0]}")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """The module that owns the decoder layers (`LlamaModel` inside `LlamaForCausalLM`)."""
    model = plain_model(model)
    return decoder_of(model, full_attention_layers(model))


def decoder_of(model: PreTrainedModel, layers: list[AttentionLayer]) -> nn.Module:
    """The module that owns the decoder layers, of which some are given."""
    return model.get_submodule(".".join(_path_to_layer(layers)[:-2]))


def _path_to_layer(layers: list[AttentionLayer]) -> list[str]:
    """The names that lead to the first of these layers' decoder layer, its number last."""
    path = layers[0].name.split(".")
    while path and not path[-1].isdigit():
        path.pop()
    return path


def unsupported(model: nn.Module, reason: str) -> UnsupportedModelError:
    """The error that says why `model` cannot be used; `reason` is a clause of one sentence."""
    kind = type(model).__name__
    return UnsupportedModelError(f"{kind} is not supported: {reason}. Supported: {SUPPORTED_FAMILIES}.")


def _is_attention(module: nn.Module, config: Any) -> bool:
    if not isinstance(getattr(module, "layer_idx", None), int) or not getattr(module, "is_causal", False):
        return False
    if getattr(module, "config", None) is not config or "Attention" not in type(module).__name__:
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    takes_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    uses_interface = hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
    takes_cache = any(p.name == "past_key_values" for p in parameters)
    return takes_kwargs and uses_interface and takes_cache


def _in_pipeline(model: PreTrainedModel) -> bool:
    """Whether transformers has divided the decoder's layers among processes."""
    mesh: Any = getattr(model, "_device_mesh", None)
    return "pp" in (getattr(mesh, "mesh_dim_names", None) or ()) and mesh["pp"].size() > 1


def _attention_layer(
    index: int, name: str, module: nn.Module, config: Any, shards: HeadShards
) -> AttentionLayer:  # fmt: skip
    num_heads = int(config.num_attention_heads) // shards.count
    if hasattr(module, "expand_kv"):  # every process has the same latents
        return AttentionLayer(index, name, module, num_heads, 1, int(module.kv_lora_rank), latent=True)  # type: ignore[arg-type]
    groups, head_dim = int(getattr(module, "num_key_value_groups", 1)), int(getattr(module, "head_dim", 0) or 0)
    softmax = "capped logits" if getattr(config, "attn_logit_softcapping", None) is not None else ""
    if getattr(module, "sinks", None) is not None:
        softmax = "learned sinks"
    return AttentionLayer(index, name, module, num_heads, num_heads // groups, head_dim, softmax=softmax, shards=shards)


def _reason_against(module: nn.Module, cache_layer: Any, config: Any) -> str:
    """Why an attention layer cannot be evicted from; empty if it can."""
    if getattr(module, "is_kv_shared_layer", False) or type(cache_layer).__name__ == "DummyLayer":
        return "some of its attention layers reuse the keys and values of another layer"
    if type(cache_layer) is not DynamicLayer:
        return f"its attention layers use the cache {type(cache_layer).__name__}"
    return CHANGES_KV.get(config.model_type, "")


def replaces_tensors(layer: Any) -> bool:
    """Whether a transformers cache layer makes new tensors at every update, so that its attributes are its state.

    State-space layers, and those that join attention and state space, write in place.
    """
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def copy_cache_layer(layer: Any) -> Any:
    """A transformers cache layer that continues independently of `layer`, sharing its tensors where that is safe."""
    return copy.copy(layer) if replaces_tensors(layer) else copy.deepcopy(layer)


class DifferentiableStates(LinearAttentionLayer):
    """A linear-attention layer that replaces its recurrent states: autograd cannot use what is written to in place."""

    @classmethod
    def of(cls, layer: LinearAttentionLayer) -> DifferentiableStates:
        """An independent copy of `layer`."""
        made = cls.__new__(cls)
        vars(made).update(copy.deepcopy(vars(layer)))
        return made

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:  # fmt: skip
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states
