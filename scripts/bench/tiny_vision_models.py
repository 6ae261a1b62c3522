"""Tiny random vision-language models with inputs of two rows: one image and two images, left padding; no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .tiny_models import FULL, LINEAR, SLIDING, VOCABULARY, tiny_model

IMAGE, VIDEO, BEGIN, END = 150, 151, 152, 153  # token ids; words are 3 … 139
SIDE, PATCH = 16, 4  # pixels of a square image and of a patch

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip
LLAMA = {"model_type": "llama", "head_dim": 8, **SIZES}
QWEN2 = {"model_type": "qwen2", **SIZES}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": BEGIN, "vision_end_token_id": END,
}  # fmt: skip

Inputs = dict[str, torch.Tensor]
LIBRARY: Any = transformers  # its configurations take more than their signatures say


def picture(seed: int, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    """A random image `(3, height, width)` in [-1, 1]."""
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def prompts(image_tokens: Sequence[Sequence[int]], boundary: bool = True) -> tuple[Inputs, torch.Tensor]:
    """Prompts of words with images in them: `image_tokens[row]` lists the tokens of each of the row's images.

    Returns:
        `input_ids` and `attention_mask`, `(rows, n)`, padded on the left; and an int64 `(rows, n)`, 1 at image tokens.
    """
    generator = torch.Generator().manual_seed(11)

    def words(count: int) -> list[int]:
        return torch.randint(3, 140, (count,), generator=generator).tolist()

    rows = []
    for row, images in enumerate(image_tokens):
        ids = words(5 + 3 * row)
        for count in images:
            block = [IMAGE] * count
            ids += ([BEGIN, *block, END] if boundary else block) + words(4)
        rows.append(ids + words(14 - 2 * row))
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}, (ids == IMAGE).long()


def _patches(image: torch.Tensor, merge: int) -> tuple[torch.Tensor, list[int]]:
    """Qwen2-VL's patches of an image, two equal frames, and its grid `(1, rows, columns)`."""
    frames = image.repeat(2, 1, 1, 1)
    rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
    split = frames.reshape(1, 2, 3, rows // merge, merge, PATCH, columns // merge, merge, PATCH)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(rows * columns, -1), [1, rows, columns]


def _qwen(name: str, config: Any, merge: int = 2) -> tuple[PreTrainedModel, Inputs]:
    sizes = ((16, 24), (24, 16), (16, 16))
    images = [_patches(picture(seed, *size), merge) for seed, size in enumerate(sizes)]
    counts = [grid[1] * grid[2] // merge**2 for _, grid in images]
    inputs, types = prompts([counts[:1], counts[1:]])
    inputs["mm_token_type_ids"] = types.int()
    inputs["pixel_values"] = torch.cat([patches for patches, _ in images])
    inputs["image_grid_thw"] = torch.tensor([grid for _, grid in images])
    return tiny_model(name, config), inputs


def _square(
    name: str, config: Any, tokens: int, types: str = "", **more: torch.Tensor
) -> tuple[PreTrainedModel, Inputs]:  # fmt: skip
    """Square images of `tokens` tokens each; `types` names the argument that marks them, if there is one."""
    inputs, marks = prompts([[tokens], [tokens] * 2])
    inputs["pixel_values"] = torch.stack([picture(seed) for seed in range(3)])
    return tiny_model(name, config), inputs | more | ({types: marks} if types else {})


def _qwen2_vl() -> tuple[PreTrainedModel, Inputs]:
    config = LIBRARY.Qwen2VLConfig(
        text_config=SIZES | {"rope_parameters": dict(MROPE)}, **QWEN_IDS,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
    )  # fmt: skip
    return _qwen("Qwen2VLForConditionalGeneration", config)


def _qwen2_5_vl() -> tuple[PreTrainedModel, Inputs]:
    config = LIBRARY.Qwen2_5_VLConfig(
        text_config=SIZES | {"rope_parameters": dict(MROPE)}, **QWEN_IDS,
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
            "intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1],
        },
    )  # fmt: skip
    return _qwen("Qwen2_5_VLForConditionalGeneration", config)


QWEN3_TOWER: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4, "intermediate_size": 48,
    "num_position_embeddings": 64,
}  # fmt: skip


def _qwen3_vl() -> tuple[PreTrainedModel, Inputs]:
    config = LIBRARY.Qwen3VLConfig(
        text_config=SIZES | {"head_dim": 8, "rope_parameters": dict(MROPE)}, **QWEN_IDS,
        vision_config=QWEN3_TOWER | {"deepstack_visual_indexes": [0, 1]},
    )  # fmt: skip
    return _qwen("Qwen3VLForConditionalGeneration", config)


def _qwen3_5() -> tuple[PreTrainedModel, Inputs]:
    rope = {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    text = {"head_dim": 16, "linear_num_value_heads": 4, "layer_types": [LINEAR, FULL] * 2}
    config = LIBRARY.Qwen3_5Config(
        text_config=SIZES | text | linear | {"rope_parameters": MROPE | rope}, **QWEN_IDS,
        vision_config=dict(QWEN3_TOWER),
    )  # fmt: skip
    return _qwen("Qwen3_5ForConditionalGeneration", config)


def _glm4v() -> tuple[PreTrainedModel, Inputs]:
    rope = MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    config = LIBRARY.Glm4vConfig(
        text_config=SIZES | {"head_dim": 8, "rope_parameters": rope}, image_token_id=IMAGE, video_token_id=VIDEO,
        image_start_token_id=BEGIN, image_end_token_id=END, video_start_token_id=154, video_end_token_id=155,
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4,
            "intermediate_size": 48, "image_size": 32,
        },
    )  # fmt: skip
    return _qwen("Glm4vForConditionalGeneration", config)


def _llava() -> tuple[PreTrainedModel, Inputs]:
    tower = TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 32}
    config = LIBRARY.LlavaConfig(text_config=LLAMA, vision_config=tower, image_token_index=IMAGE)
    return _square("LlavaForConditionalGeneration", config, 16)


SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}


def _gemma3() -> tuple[PreTrainedModel, Inputs]:
    text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "layer_types": [SLIDING, FULL] * 2}
    config = LIBRARY.Gemma3Config(
        text_config=SIZES | text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=BEGIN, eoi_token_index=END,
    )  # fmt: skip
    return _square("Gemma3ForConditionalGeneration", config, 4, types="token_type_ids")


def _gemma4() -> tuple[PreTrainedModel, Inputs]:
    text = {
        "head_dim": 8, "sliding_window": 16, "layer_types": [SLIDING, FULL] * 2, "hidden_size_per_layer_input": 8,
        "use_bidirectional_attention": "vision", "vocab_size_per_layer_input": VOCABULARY,
    }  # fmt: skip
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "patch_size": PATCH, "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }  # fmt: skip
    config = LIBRARY.Gemma4Config(
        text_config=SIZES | text, vision_config=tower, audio_config=None, image_token_id=IMAGE, video_token_id=VIDEO,
        boi_token_id=BEGIN, eoi_token_id=END, audio_token_id=155, boa_token_id=156, eoa_token_index=157,
    )  # fmt: skip
    model, inputs = _square("Gemma4ForConditionalGeneration", config, 4, types="mm_token_type_ids")
    side = SIDE // PATCH
    split = inputs["pixel_values"].reshape(3, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 3, 5, 1)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
    inputs["pixel_values"] = split.reshape(3, side * side, -1)
    inputs["image_position_ids"] = places.reshape(1, side * side, 2).repeat(3, 1, 1)
    return model, inputs


def _internvl() -> tuple[PreTrainedModel, Inputs]:
    tower = TOWER | {"image_size": (SIDE, SIDE), "patch_size": (PATCH, PATCH)}
    config = LIBRARY.InternVLConfig(text_config=QWEN2, vision_config=tower, image_token_id=IMAGE, image_seq_length=4)
    return _square("InternVLForConditionalGeneration", config, 4)


def _smolvlm() -> tuple[PreTrainedModel, Inputs]:
    config = LIBRARY.SmolVLMConfig(
        text_config=LLAMA, vision_config=TOWER, image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )
    model, inputs = _square("SmolVLMForConditionalGeneration", config, 4)
    images = inputs["pixel_values"]
    empty = torch.zeros_like(images[0])
    return model, inputs | {"pixel_values": torch.stack([torch.stack([images[0], empty]), images[1:]])}


def _mistral3() -> tuple[PreTrainedModel, Inputs]:
    text = {"model_type": "mistral", "sliding_window": None, "head_dim": 8, **SIZES}
    tower = TOWER | {"model_type": "pixtral"}
    config = LIBRARY.Mistral3Config(
        text_config=text, vision_config=tower, image_token_index=IMAGE, spatial_merge_size=2
    )
    return _square("Mistral3ForConditionalGeneration", config, 4, image_sizes=torch.tensor([[SIDE, SIDE]] * 3))


def _llama4() -> tuple[PreTrainedModel, Inputs]:
    text = {
        "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "attention_chunk_size": 16, "layer_types": ["chunked_attention", FULL] * 2, "no_rope_layers": [1, 0, 1, 0],
    }  # fmt: skip
    tower = TOWER | {
        "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    config = LIBRARY.Llama4Config(
        text_config=SIZES | text, vision_config=tower, image_token_index=IMAGE, boi_token_index=BEGIN,
        eoi_token_index=END,
    )  # fmt: skip
    return _square("Llama4ForConditionalGeneration", config, 4)


def _paligemma() -> tuple[PreTrainedModel, Inputs]:
    config = LIBRARY.PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 8, **SIZES}, vision_config=SIGLIP | {"projection_dim": 32},
        image_token_index=IMAGE, projection_dim=32, hidden_size=32, vocab_size=VOCABULARY,
    )  # fmt: skip
    return _square("PaliGemmaForConditionalGeneration", config, 16)


def _mllama() -> tuple[PreTrainedModel, Inputs]:
    tower = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = LIBRARY.MllamaConfig(
        text_config=SIZES | {"cross_attention_layers": [1, 3], "rope_parameters": rope}, vision_config=tower,
        image_token_index=IMAGE,
    )  # fmt: skip
    inputs, types = prompts([[1], [1, 1]], boundary=False)
    images = torch.zeros(2, 2, 2, 3, SIDE, SIDE)  # row, image, tile
    images[0, 0, 0], images[1, 0, 0], images[1, 1, 0] = picture(0), picture(1), picture(2)
    seen = torch.zeros(*types.shape, 2, 2, dtype=torch.long)  # a token attends to the images before it
    for row, marks in enumerate(types):
        for image, start in enumerate(marks.nonzero().flatten().tolist()):
            seen[row, start:, image, 0] = 1
    inputs["pixel_values"], inputs["cross_attention_mask"] = images, seen
    inputs["aspect_ratio_ids"] = torch.tensor([[1, 0], [1, 1]])
    inputs["aspect_ratio_mask"] = torch.tensor([[[1, 0], [1, 0]], [[1, 0], [1, 0]]])
    return tiny_model("MllamaForConditionalGeneration", config), inputs


# By name: functions that make a model and the arguments of its `generate`.
VISION_MODELS: dict[str, Callable[[], tuple[PreTrainedModel, Inputs]]] = {
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "glm4v": _glm4v,
    "internvl": _internvl,
    "llama4": _llama4,
    "llava": _llava,
    "mistral3": _mistral3,
    "mllama": _mllama,
    "paligemma": _paligemma,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_5": _qwen3_5,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}
