"""A random model in a folder, whose answers' texts give away every token, for servers under load; tiny tokenizers."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTEXT = 1024  # tokens
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
CHARACTERS = sorted({*string.printable} - {*"\r\x0b\x0c"})
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_SIDE = 16  # pixels
IMAGE_TOKENS = 4
IMAGE_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyServed:
    """Folders of a tiny model and of its gates, as `--model` and `--gates` take them."""

    model: Path
    gates: Path


def make_tiny_served(folder: Path) -> TinyServed:
    """Writes a random Llama of three layers, its tokenizer and random gates; the same ones at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ...retention import RetentionGates

    served = TinyServed(folder / "tiny", folder / "gates")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": CONTEXT,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL) + len(CHARACTERS), **sizes)).eval()
    model.save_pretrained(served.model)
    character_tokenizer().save_pretrained(served.model)
    gates = RetentionGates.for_model(model, gate_width=8, init_std=0.5, initial_bias=2.0)
    gates.save_pretrained(served.gates)
    return served


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character of ASCII, so that equal texts are equal tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def image_processor() -> Any:
    """A byte-level processor of chats with images, each reduced to a square of `IMAGE_SIDE` and `IMAGE_TOKENS` long."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor, PreTrainedTokenizerFast

    images_only = ["<image>", "<fake_token_around_image>", "<global-img>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *images_only, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": images_only})
    size = {"longest_edge": IMAGE_SIDE}
    images = Idefics3ImageProcessorPil(do_image_splitting=False, size=size, max_image_size=size)
    return Idefics3Processor(images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=IMAGE_TEMPLATE)
