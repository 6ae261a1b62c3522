"""A tiny random vision-language model (SmolVLM's class) for `image_processor`, and picture files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from tenure.retention import RetentionGates
from tenure.scripts.soak.tiny_served import IMAGE_SIDE, image_processor


def tiny_model(processor: Any) -> Any:
    """A random model for it, fp32, eval mode."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama", "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    vision = {
        "model_type": "idefics3_vision", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": IMAGE_SIDE, "patch_size": 4,
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=processor.image_token_id
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.connector.parameters():
            parameter.normal_(std=0.3)  # images that differ have tokens that differ
    return model


def save_with_gates(root: Path) -> None:
    """The model and its processor in `root/model`, gates for it in `root/gates`."""
    processor = image_processor()
    model = tiny_model(processor)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    RetentionGates.for_model(model, gate_width=4, initial_bias=3.0).save_pretrained(root / "gates")


def save_pictures(folder: Path, count: int) -> list[Path]:
    """Plain pictures of different colours."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (20, 12), (40 * number % 256, 255 - 60 * number % 256, 90)).save(path)
    return paths
