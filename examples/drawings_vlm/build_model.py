"""A small vision-language model: SmolVLM's class (Idefics3), SmolLM2-135M-Instruct as its text model, a small tower.

    python examples/drawings_vlm/build_model.py FOLDER [TOWER.safetensors]

writes a folder that transformers and `tenure --model FOLDER` load: the text model's weights as they are (downloaded
once, see `tenure demo`), the tower and the connector from `tower.safetensors` beside this file, and a processor. The
tower sees 64 x 64 pixels and gives 16 tokens per image. It was trained here (train_tower.py) on drawings of numbers,
words and coloured shapes and reads nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOWER = Path(__file__).resolve().parent / "tower.safetensors"
IMAGE_SIZE, PATCH, SCALE = 64, 8, 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH // SCALE) ** 2
# Tokens of SmolLM2 that no text has, by the names that the processor of Idefics3 looks for. The vocabulary keeps its
# size, so the text model's weights and gates fit unchanged.
RENAMED = {
    "<gh_stars>": "<image>",
    "<issue_start>": "<fake_token_around_image>",
    "<issue_comment>": "<global-img>",
    "<issue_closed>": "<end_of_utterance>",
}
# SmolLM2's own, for contents that are lists of parts as well as strings, and without its default system turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_processor(text_model: Path) -> Any:
    """The processor: images are squeezed to 64 x 64 pixels and never split."""
    from transformers import AutoTokenizer, Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

    old = AutoTokenizer.from_pretrained(text_model)
    text = old.backend_tokenizer.to_str()
    for before, after in RENAMED.items():
        text = text.replace(json.dumps(before), json.dumps(after))
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", model_max_length=old.model_max_length,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(
        do_image_splitting=False, size={"longest_edge": IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=CHAT_TEMPLATE)


def make_model(text_model: Path, image_token_id: int, tower: Path | None = TOWER) -> Any:
    """The model in fp32.

    Args:
        text_model: folder of SmolLM2-135M-Instruct.
        image_token_id: stands for one token of an image.
        tower: weights of tower and connector; None: at random.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, Idefics3Config, Idefics3ForConditionalGeneration

    text = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    vision = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": PATCH, "model_type": "idefics3_vision",
    }  # fmt: skip
    config = Idefics3Config(
        text_config=text.config.to_dict(), vision_config=vision, scale_factor=SCALE, image_token_id=image_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    if tower is not None:
        given = {name: tensor.float() for name, tensor in load_file(tower).items()}
        missing, unexpected = model.model.load_state_dict(given, strict=False)
        assert not unexpected and all(name.startswith("text_model.") for name in missing), (missing, unexpected)
    return model.eval()


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print("usage: python examples/drawings_vlm/build_model.py FOLDER [TOWER.safetensors]", file=sys.stderr)
        return 2
    tower = Path(sys.argv[2]) if len(sys.argv) == 3 else TOWER
    import torch

    from tenure.training.assets import demo_model

    source = demo_model()
    processor = make_processor(source)
    model = make_model(source, processor.image_token_id, tower)
    model.to(torch.bfloat16).save_pretrained(sys.argv[1])
    processor.save_pretrained(sys.argv[1])
    print(f"wrote {sys.argv[1]}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
