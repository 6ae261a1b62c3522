"""Prompts of text and images in a model's chat template, as the inputs of its forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .prompts import encode

if TYPE_CHECKING:
    import torch

_SLOT = "slot<0>slot"

Part = Any  # a text, or a PIL image


@dataclass(frozen=True)
class ImagePrompt:
    """The first part of a conversation, with its images, and the text that follows.

    Attributes:
        inputs: of the model's forward: `input_ids (1, n)`, `pixel_values` and whatever else the processor makes of
            the images. No `attention_mask`: a single row has no padding.
        rest: token ids of the text after the split: the end of the user's turn and the start of the reply.
    """

    inputs: dict[str, torch.Tensor] = field(repr=False)
    rest: list[int]

    @property
    def context_ids(self) -> list[int]:
        """Token ids of the first part; an image is as many placeholders as it has tokens."""
        return self.inputs["input_ids"][0].tolist()

    @property
    def extra(self) -> dict[str, torch.Tensor]:
        """The inputs but the token ids."""
        return {name: value for name, value in self.inputs.items() if name != "input_ids"}


def image_prompt(processor: Any, parts: Sequence[Part], question: str = "") -> ImagePrompt:
    """A user's turn of `parts`, texts and images in any order, split before `question`.

    Args:
        processor: the model's, with a chat template.

    Raises:
        ValueError: no chat template, one that drops the text, or text that spells the placeholder of an image.
    """
    return conversation_prompt(processor, [("user", parts)], question)


def conversation_prompt(processor: Any, turns: Sequence[tuple[str, Sequence[Part]]], question: str = "") -> ImagePrompt:
    """As `image_prompt`, of a conversation: roles and parts of its turns, the last of which ends with `question`."""
    parts = [part for _, given in turns for part in given]
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"prompts with images need a chat template, which this {type(processor).__name__} has not")
    token = str(getattr(processor, "image_token", "<image>"))
    for text in [*(part for part in parts if isinstance(part, str)), question]:
        if token in text:
            raise ValueError(f"got a text with {token!r}, which stands for an image; give images apart from the text")
    chat: list[dict[str, Any]] = [
        {
            "role": role,
            "content": [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image"} for one in given],
        }
        for role, given in turns
    ]
    chat[-1]["content"].append({"type": "text", "text": _SLOT})
    rendered = str(processor.apply_chat_template(chat, add_generation_prompt=True))
    before, found, after = rendered.partition(_SLOT)
    if not found:
        raise ValueError("the chat template drops a text after images; prompts with images need one that repeats it")
    images = [part for part in parts if not isinstance(part, str)]
    given: dict[str, Any] = {"images": [images]} if images else {}
    # The template has written a beginning-of-sequence token, if the model has one.
    made = processor(text=[before], **given, add_special_tokens=False, return_tensors="pt")
    inputs = {name: value for name, value in made.items() if name != "attention_mask"}
    return ImagePrompt(inputs, encode(processor.tokenizer, question + after))
