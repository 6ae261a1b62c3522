"""Tiny random models of the architectures in transformers, built from their configurations; no download."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 160
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# Sizes by the names that configurations give them; a configuration takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16, "attention_chunk_size": 16,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16, "intermediate_size_mlp": 48, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
    # compressed and indexed attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16, "index_block_size": 4,
    "index_topk_blocks": 2, "rotary_dim": 4,
    # state spaces and linear attention
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_d_ssm": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_dt_rank": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "state_size": 8,
    "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "time_step_rank": 4, "lru_width": 32,
    "attention_window_size": 16,
    # older names
    "d_model": 32, "n_embd": 32, "n_layer": 4, "n_layers": 4, "n_head": 4, "n_heads": 4, "n_positions": 512,
    "max_seq_len": 512, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_layers": 4, "num_heads": 4,
    # embeddings for each layer
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip
UNSET = object()  # leaves a field of `SIZES` at the configuration's default
LATENT = {"num_key_value_heads": 4, "head_dim": UNSET}  # heads of their own for every query, from a shared latent


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers and the settings of a tiny instance.

    Attributes:
        model_type: key of transformers' mapping of causal language models.
        settings: fields of the configuration in addition to `SIZES`, or instead of them.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self) -> PreTrainedModel:
        """The model, fp32 and in eval mode; the same weights at every call."""
        cls: Any = CONFIG_MAPPING[self.model_type]
        known = _fields(cls)
        sizes = {name: value for name, value in SIZES.items() if name in known or name.endswith("_token_id")}
        settings: dict[str, Any] = sizes | self.settings
        settings = {name: value for name, value in settings.items() if value is not UNSET}
        if "layer_types" in known and "layer_types" not in settings:
            # Every kind of layer that the architecture has by default occurs.
            kinds = list(dict.fromkeys(getattr(cls(), "layer_types", None) or ()))
            if len(kinds) > 1:
                count: int = settings.get("num_hidden_layers", SIZES["num_hidden_layers"])
                settings["layer_types"] = [kinds[index % len(kinds)] for index in range(count)]
        return tiny_model(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type], cls(**settings))


def tiny_model(name: str, config: Any) -> PreTrainedModel:
    """A random model of the class `transformers.<name>`, fp32 and in eval mode; the same weights at every call."""
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(config)
    torch.manual_seed(0)
    with torch.no_grad():  # wide enough that attention is not uniform, whatever the architecture's own start
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in parameter_name and "conv" not in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.9 / parameter.shape[-1] ** 0.5)
            elif parameter.ndim == 2 and "embed" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif "sink" in parameter_name:
                parameter.copy_(torch.randn_like(parameter))
    generation = model.generation_config
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, 1
    return model.float().eval()


def _fields(cls: type) -> set[str]:
    """Names that a configuration class and its bases declare or take."""
    names: set[str] = set()
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return names


def _all_types(*model_types: str) -> dict[str, Architecture]:
    return {model_type: Architecture(model_type) for model_type in model_types}


def _hybrid(model_type: str, first: str, second: str, **settings: Any) -> Architecture:
    return Architecture(model_type, {"layer_types": [first, second, first, second], **settings})


NO_WINDOW = {"sliding_window": None}
TEXT_ARCHITECTURES: dict[str, Architecture] = {
    **_all_types(
        "afmoe", "apertus", "arcee", "aria_text", "biogpt", "bitnet", "bloom", "codegen", "cohere", "cohere2",
        "cohere2_moe", "cwm", "deepseek_v4", "diffllama", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
        "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text",
        "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granite_swa",
        "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hrm_text", "hunyuan_v1_dense",
        "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling2_text", "inkling_text", "jais2", "jetmoe",
        "kolibri1", "laguna", "lfm3", "llama", "llama4_text", "mamba", "mellum", "mimo_v2_flash", "minimax_m2",
        "minimax_m3_vl_text", "modernbert-decoder", "mpt", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2",
        "olmo3", "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm",
        "vaultgemma", "xglm",
    ),
    **{name: Architecture(name, LATENT) for name in (
        "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
        "kimi_linear", "minicpm3", "youtu",
    )},
    **{name: Architecture(name, NO_WINDOW) for name in (
        "minimax", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "qwen3_moe", "starcoder2",
    )},
    "bamba": Architecture("bamba", {"attn_layer_indices": [1, 3]}),
    "dbrx": Architecture("dbrx", {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    }),
    "gemma2 without cap": Architecture("gemma2", {"attn_logit_softcapping": None}),
    "gemma3n_text": Architecture("gemma3n_text", {
        "num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
    }),
    "gemma4_text": _hybrid("gemma4_text", SLIDING, FULL),
    "gemma4_text, shared KV": Architecture("gemma4_text", {
        "num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2,
    }),
    "gpt_neo": Architecture("gpt_neo", {"attention_types": [[["global", "local"], 2]], "window_size": 16}),
    "granitemoehybrid": _hybrid("granitemoehybrid", "mamba", "attention"),
    "jamba": Architecture("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "lfm2": _hybrid("lfm2", "conv", FULL),
    "lfm2_moe": _hybrid("lfm2_moe", "conv", FULL, num_dense_layers=1),
    "mamba2": Architecture("mamba2", {"num_heads": 4, "head_dim": 16, "expand": 2}),
    "minimax_m3_vl_text, sparse": _hybrid("minimax_m3_vl_text", FULL, "minimax_m3_sparse"),
    "ministral": _hybrid("ministral", SLIDING, FULL),
    "mistral, all sliding": Architecture("mistral"),
    "qwen2, some sliding": Architecture("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "zamba": Architecture("zamba", {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]}),
    "zamba2": _hybrid(
        "zamba2", LINEAR, "hybrid", layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]
    ),
    "zaya": Architecture("zaya", {"num_experts_per_tok": 1}),
}  # fmt: skip
