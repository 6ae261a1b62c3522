"""Accuracy of the model of `build_model.py` on drawings it was not trained on, and on the same facts as text.

    python examples/drawings_vlm/read_pictures.py MODEL --count 200

prints, by kind of drawing, the share of answers that are right to the last token (greedy, after the beginning of the
reply), with 95 % Wilson intervals. Numbers are ones that were never drawn in training.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from train_tower import pixels

from tenure.eval.intervals import wilson
from tenure.eval.tasks.drawings import KINDS, QUESTIONS, Drawing, draw
from tenure.scripts.loading import load_model, load_processor

REPLIES = {"number": "It shows the number", "word": "It shows the word", "shape": "It shows a"}


@torch.no_grad()
def right_answers(model: Any, processor: Any, drawings: list[Drawing], as_text: bool) -> list[bool]:
    """Whether each answer is the model's; drawings of one kind."""
    kind, tokenizer = drawings[0].kind, processor.tokenizer
    rows, starts = [], []
    for drawing in drawings:
        first = {"type": "text", "text": drawing.caption} if as_text else {"type": "image"}
        content = [first, {"type": "text", "text": f"\n{QUESTIONS[kind]}"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        prompt = text.replace("<image>", processor.replace_image_token({"rows": [[0]], "cols": [[0]]}, 0))
        start = tokenizer(prompt + REPLIES[kind])["input_ids"]
        rows.append(start + tokenizer(f" {drawing.answer}")["input_ids"])
        starts.append(len(start))
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    given = {} if as_text else {"pixel_values": pixels(drawings).to(model.dtype)}
    best = model(input_ids=ids, **given).logits.argmax(-1)  # padding follows: it changes nothing before it
    return [
        bool((best[place, start - 1 : len(row) - 1] == ids[place, start : len(row)]).all())
        for place, (row, start) in enumerate(zip(rows, starts, strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200, help="drawings of each kind")
    options = parser.parse_args()
    torch.set_num_threads(1)
    processor = load_processor(options.model)
    model, _ = load_model(options.model, "cpu", "bfloat16")
    print("| shows | pictures read | same fact as text |\n|---|---|---|")
    for kind in KINDS:
        rng = random.Random(f"read {kind}")
        drawings = [draw(rng, kind, "test") for _ in range(options.count)]
        cells = []
        for as_text in (False, True):
            right = sum(
                sum(right_answers(model, processor, drawings[start : start + 25], as_text))
                for start in range(0, len(drawings), 25)
            )
            share = wilson(right, len(drawings))
            cells.append(f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})")
        print(f"| {kind} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
